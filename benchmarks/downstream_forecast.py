"""Benchmarks forecast a decade of compute ahead, on published models: loss from N and D, error from loss.

For each model forecast, only models of its corpus with at most a tenth of its FLOPs are looked at. They fit
Chinchilla's law of loss and, for every benchmark, a law of error in loss; both are then read at the model's N
and D, as ``scaling fit`` and ``scaling ask`` do. The same law read at the model's own loss shows how much of
an error the second step makes, and the error of the best model looked at is what a forecast has to beat.

    python benchmarks/downstream_forecast.py TABLE EVALS

TABLE has a row a model: dataset, name, params, tokens, chinchilla_multiplier and ``loss_eval1`` (C4); EVALS
is the folder exp_data/evals of github.com/mlfoundations/scaling (Gadre et al. 2024, arXiv:2403.08540).
Neither is part of this repository.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # this checkout, whatever is installed

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from fits import FitError, fit_table  # noqa: E402

DECADE = 10.0
FEWEST_RUNS = 12
LEAST_MULTIPLIER = 1.0  # of D = 20 N: shorter runs of these models are no compute-optimal training
LAWS = ("downstream_exponential", "downstream_sigmoid")
AVERAGE = "average of 17"
SUBSET = (
    "bigbench_operators", "pubmed_qa_labeled", "hellaswag_zeroshot", "boolq", "arc_easy", "coqa",
    "bigbench_dyck_languages", "lambada_openai", "bigbench_novel_concepts", "winograd",
    "bigbench_cs_algorithms", "commonsense_qa", "bigbench_qa_wikidata", "hellaswag", "copa", "squad", "piqa",
)  # fmt: skip
"""The tasks that the authors average: those on which their models leave chance behind."""


def errors(evals: Path, name: str) -> dict[str, float]:
    """A model's error on every task and on average over ``SUBSET``."""
    scores = json.loads((evals / f"evaluation_{name}_heavy.json").read_text())["eval_metrics"]["icl"]
    out = {task: 1.0 - value for task, value in scores.items()}
    return {**out, AVERAGE: float(np.mean([out[task] for task in SUBSET]))}


def read(table: Path, evals: Path) -> pd.DataFrame:
    """A row a model: dataset, name, params, tokens, flops, loss, and an error a task."""
    runs = pd.read_csv(table)
    runs = runs[runs.chinchilla_multiplier >= LEAST_MULTIPLIER]
    out = runs[["dataset", "name", "params", "tokens"]].assign(loss=runs.loss_eval1)
    out["flops"] = 6.0 * out.params * out.tokens
    more = pd.DataFrame([errors(evals, name) for name in out.name], index=out.index)
    return pd.concat([out, more], axis=1).sort_values("flops")


def curve(known: pd.DataFrame, task: str, law: str):
    """The law of a task's error in loss from ``known``, or None where it cannot be fitted."""
    table = {"eval_loss": known.loss.to_numpy(), "loss": known[task].to_numpy()}
    try:
        return fit_table(table, law, loss="least_squares", space="raw", bootstraps=0, sensitivity=False)
    except FitError:
        return None


def forecast(known: pd.DataFrame, target: pd.Series, tasks: list[str], law: str) -> list[dict]:
    """A row a task: what is forecast for the target's error, and what it is."""
    size = fit_table(known[["params", "tokens", "loss"]], bootstraps=0, sensitivity=False)
    loss = float(size.predict(params=target.params, tokens=target.tokens))
    best = known.loc[known.loss.idxmin()]
    out = []
    for task in tasks:
        fit = curve(known, task, law)
        at = [np.nan] * 2 if fit is None else [float(fit.predict(eval_loss=v)) for v in (loss, target.loss)]
        out.append({
            "model": target["name"], "task": task, "observed": target[task], "forecast": at[0],
            "at_true_loss": at[1], "unchanged": best[task], "runs": len(known), "loss": target.loss,
            "loss_forecast": loss, "status": None if fit is None else fit.status,
        })  # fmt: skip
    return out


def forecasts(runs: pd.DataFrame, law: str) -> pd.DataFrame:
    """All models with enough cheaper ones, all tasks."""
    tasks = [c for c in runs.columns if c not in ("dataset", "name", "params", "tokens", "flops", "loss")]
    out = []
    for _, own in runs.groupby("dataset"):
        for _, target in own.iterrows():
            known = own[own.flops <= target.flops / DECADE]
            if len(known) >= FEWEST_RUNS:
                out += forecast(known, target, tasks, law)
    return pd.DataFrame(out)


def points(got: pd.DataFrame) -> pd.DataFrame:
    """Absolute errors in percentage points: of the forecast, at the true loss, and of no change.

    Where a law was refused, or says what no error can be, the best model looked at stands for it: ``used``.
    """
    used = (got.status == "converged") & got.forecast.between(0, 1) & got.at_true_loss.between(0, 1)

    def off(values) -> pd.Series:
        return 100 * (values - got.observed).abs()

    return got.assign(
        used=used,
        chained=off(got.forecast.where(used, got.unchanged)),
        true_loss=off(got.at_true_loss.where(used, got.unchanged)),
        no_change=off(got.unchanged),
    )


KINDS = ("chained", "true_loss", "no_change")


def summary(all_laws: dict[str, pd.DataFrame]) -> list[str]:
    """Mean (and largest) error by law and kind of task."""
    lines = [
        "| law | tasks | forecasts | by the law | from N and D | from its own loss | no change |",
        "|" + "---|" * 7,
    ]
    for law, got in all_laws.items():
        single = got[got.task != AVERAGE]
        parts = {AVERAGE: got[got.task == AVERAGE], "the 17": single[single.task.isin(SUBSET)]}
        parts["all 46"] = single
        for name, part in parts.items():
            cells = [law, name, str(len(part)), str(int(part.used.sum()))]
            cells += [f"{part[k].mean():.1f} ({part[k].max():.1f})" for k in KINDS]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def averages(got: pd.DataFrame) -> list[str]:
    """What is forecast for the average of every model."""
    lines = ["| model | runs | loss | loss forecast | error | forecast | no change |", "|" + "---|" * 7]
    for _, row in got[got.task == AVERAGE].iterrows():
        lines.append(
            f"| {row.model} | {row.runs} | {row.loss:.3f} | {row.loss_forecast:.3f} | {row.observed:.3f} | "
            f"{row.forecast:.3f} | {row.unchanged:.3f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("evals", type=Path)
    args = parser.parse_args()
    runs = read(args.table, args.evals)
    found = {law: points(forecasts(runs, law)) for law in LAWS}
    text = ["# Benchmarks forecast a decade of compute ahead", "", *summary(found), ""]
    text += [f"`{LAWS[0]}`, the average of 17:", "", *averages(found[LAWS[0]])]
    print("\n".join(text))


if __name__ == "__main__":
    main()
