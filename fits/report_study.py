"""What the report says of the study behind a fit: its cells, their cost, their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fits.report_tables import number

CONVENTION_WORDS = {
    "exact": "exact, attention's causal half",
    "full": "exact, attention as a full square",
    "6N_total": "6 N D, all parameters",
    "6N_nonembedding": "6 N D, without embeddings",
    "kaplan": "Kaplan et al. 2020, table 1",
}
FLOPS_COLUMNS = {
    "flops": "exact",
    "flops_full": "full",
    "flops_6N_total": "6N_total",
    "flops_6N_nonembedding": "6N_nonembedding",
    "flops_kaplan": "kaplan",
}
STATUS_WORDS = {
    "planned": "did not run yet",
    "running": "did not end yet",
    "diverged": "diverged",
    "failed": "failed",
    "preempted": "stopped before the end",
}
RUN_COLUMNS = {
    "cell": ("cell", None),
    "role": ("role", None),
    "params": ("N", "count"),
    "tokens": ("D", "count"),
    "flops": ("C (FLOPs)", "sci"),
    "epochs": ("epochs", "g3"),
    "seed": ("seed", "int"),
    "batch_tokens": ("batch (tokens)", "int"),
    "steps": ("steps", "int"),
    "lr": ("peak LR", "g3"),
    "loss": ("loss", "g5"),
    "loss_stderr": ("its s.e.", "g2"),
    "bits_per_byte": ("bits/byte", "g4"),
    "wall_seconds": ("time (s)", "g3"),
    "mfu": ("MFU", "percent"),
    "status": ("status", None),
}


def final_rows(table: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: its last."""
    return table[table["final"].astype(bool)]


def study_warnings(fit: Any, table: pd.DataFrame, dropped: Sequence[Mapping]) -> list[str]:
    """What to doubt about the study: cells that did not finish, were never planned, or changed since."""
    final = final_rows(table)
    out = []
    if fitted_rows(fit, table) is None:
        out.append("The study's run table has changed since the fit: fit it again before you read on.")
    for status, count in final["status"].value_counts().sort_index().items():
        if status != "finished":
            words = STATUS_WORDS.get(status, str(status))
            out.append(f"Of {len(final)} cells of the study, {count} {words}.")
    if dropped:
        few = len(dropped) == 1
        out.append(
            f"{len(dropped)} wanted cell{' was' if few else 's were'} dropped when the study was planned; "
            f"{'it is' if few else 'they are'} listed below."
        )
    return out


def bracket_sentences(study) -> tuple[list[list], list[str]]:
    """What the study's sentinel brackets say of its learning rates and batches: checklist rows, warnings."""
    from scaling.records import bracket_words

    rows, warnings = [], []
    for sentence, warning in bracket_words(study):
        rows.append(["Sentinel bracket", sentence])
        if warning:
            warnings.append("Sentinel bracket: " + sentence + ".")
    return rows, warnings


def fitted_rows(fit: Any, table: pd.DataFrame) -> pd.DataFrame | None:
    """The rows of the study's table that were given to the fit, in its order; None where they changed.

    A fit is made on the whole table or on the last row of each cell.
    """
    for rows in (table, final_rows(table)):
        if len(rows) == len(fit.rows) and not _changed(fit, rows):
            return rows.reset_index(drop=True)
    return None


def _changed(fit: Any, table: pd.DataFrame) -> bool:
    for name in ("params", "tokens", "loss"):
        then = np.array([np.nan if row[name] is None else row[name] for row in fit.rows], float)
        now = table[name].to_numpy(float)
        if not np.all((np.isnan(then) & np.isnan(now)) | (then == now)):
            return True
    return False


def dropped_table(dropped: Sequence[Mapping]) -> dict[str, Any]:
    """Cells that the plan left out."""
    form = {"params": "count", "tokens": "count", "flops": "sci"}
    rows = [[*(number(d["target"].get(k), f) for k, f in form.items()), d["reason"]] for d in dropped]
    return {"head": ["N wanted", "D wanted", "C wanted", "reason"], "rows": rows}


def sizes_table(table: pd.DataFrame) -> dict[str, Any] | None:
    """Of each size: N with and without embeddings, and training FLOPs per token under each convention."""
    done = final_rows(table)
    done = done[done["flops"].notna() & done["tokens"].notna()]
    columns = [c for c in FLOPS_COLUMNS if c in done and done[c].notna().any()]
    if not len(done):
        return None
    rows = []
    for N, group in done.groupby("params_total"):
        one = group.iloc[0]
        row = [number(N, "int")]
        row += [number(one[c], "int") for c in ("params_nonembedding", "params_embedding")]
        for column in columns:
            relative = number(one[column] / one["flops"], "g3")
            row.append([number(one[column] / one["tokens"], "count"), "(", relative, ")"])
        rows.append(row)
    head = ["N, all", "N, no embeddings", "embeddings"]
    head += ["FLOPs per token: " + CONVENTION_WORDS[FLOPS_COLUMNS[c]] for c in columns]
    return {"head": head, "rows": rows}


def exponents_table(approaches: Mapping | None) -> dict[str, Any] | None:
    """The exponents that each counting convention gives."""
    if not approaches or not approaches["conventions"]:
        return None
    rows = []
    for c in approaches["conventions"]:
        row = [c["convention"], c["params_column"], c["flops_column"]]
        row += [number(c[key], "g4") for key in ("a", "approach_2_a", "b", "alpha", "beta")]
        rows.append([*row, c["status"]])
    head = [
        "convention",
        "N is",
        "C is",
        "a, surface",
        "a, parabolas",
        "b, surface",
        "alpha",
        "beta",
        "status",
    ]
    return {"head": head, "rows": rows}


def frontier_table(rows: Sequence[Mapping]) -> dict[str, Any]:
    """Each family's exponents, measured, true at these budgets, and without bound."""
    out = []
    for row in rows:
        truth, line = row["truth"], [row["group"]]
        for key in ("a", "loss"):
            known = row["refused"] is None
            line += [number(row[k] if known else None, "g4") for k in (key, f"{key}_stderr")]
            line += [number(truth[t][key] if truth else None, "g4") for t in ("here", "limit")]
        verdict = {None: "", True: "agrees", False: "does not agree"}[row["holds"]]
        out.append([*line, row["refused"] or verdict])
    head = ["family"]
    for name in ("a of N* ~ C^a", "x of loss* ~ C^-x"):
        head += [name, "standard error", "true here", "true in the limit"]
    return {"head": [*head, ""], "rows": out}


def frontier_warnings(rows: Sequence[Mapping]) -> list[str]:
    """What to doubt of exponents that miss a known truth."""
    off = [row["group"] for row in rows if row["holds"] is False]
    return [f"The exponents of {', '.join(off)} do not agree with what is known of them."] if off else []


def run_table(table: pd.DataFrame) -> dict[str, Any]:
    """One line a cell: what it was, what came out, what it took."""
    final = final_rows(table)
    shown = {c: v for c, v in RUN_COLUMNS.items() if c in final and final[c].notna().any()}
    rows = []
    for record in final.to_dict("records"):
        row = []
        for column, (_, form) in shown.items():
            value = None if pd.isna(record[column]) else record[column]
            row.append(number(value, form) if form else str(value))
        if not pd.isna(record["reason"]):
            row[-1] += ": " + str(record["reason"])
        rows.append(row)
    return {"head": [label for label, _ in shown.values()], "rows": rows}


def settings_table(manifest: Mapping) -> dict[str, Any]:
    """Every field of the cell configs by section: its value where all cells share it, its range where not."""
    sections: dict[str, dict[str, list]] = {}
    for entry in manifest["cells"]:
        for section, fields in entry["config"].items():
            for key, value in fields.items() if isinstance(fields, Mapping) else ():
                sections.setdefault(section, {}).setdefault(key, []).append(value)
    rows = []
    for section, fields in sections.items():
        parts: list = []
        for key, values in fields.items():
            parts += [*_over_cells(key, list(dict.fromkeys(values))), ";"]
        rows.append([section, parts[:-1]])
    return {"head": ["section", "settings over all cells"], "rows": rows}


def _over_cells(key: str, seen: list) -> list:
    """One setting: its one value, its range, or its few values."""
    if len(seen) == 1:
        return [f"{key} = {'none' if seen[0] is None else seen[0]}"]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in seen):
        return [f"{key} =", number(min(seen)), "to", number(max(seen)), f"({len(seen)} values)"]
    return [f"{key} = {' or '.join(map(str, seen))}"]


def study_checklist(manifest: Mapping, table: pd.DataFrame) -> list[list]:
    """How the runs were made: question and answer."""
    final = final_rows(table)
    seeds = sorted({int(s) for s in final["seed"].dropna()})
    data = ", ".join(f"{k} {v}" for k, v in (manifest.get("data") or {}).items())
    convention = manifest["flops_convention"]
    cells = f"{len(manifest['cells'])} cells planned, {len(manifest['dropped'])} dropped"
    out = [
        ["Study", f"{manifest['study']}, revision {manifest['revision']}: {cells}"],
        ["FLOPs of the plan", CONVENTION_WORDS.get(convention, convention)],
        ["Training seeds", ", ".join(map(str, seeds)) or "none"],
        ["Training data", data or "not recorded"],
    ]
    if final["device_seconds"].notna().any():
        kinds = ", ".join(sorted(set(final["device_kind"].dropna()))) or "an unnamed device"
        spent = number(final["device_seconds"].sum(), "g4")
        out.append(["Devices and time", [kinds, ";", spent, "device seconds in all"]])
    return out
