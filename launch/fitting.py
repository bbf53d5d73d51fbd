"""Joins the run table to ``fits``: what the commands fit, allocate and report do."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import sys
from pathlib import Path

from rich.console import Console

import fits
from fits.known import floor_words, known_floor
from launch.simulate import planted_words
from scaling.config import ConfigError
from scaling.files import StudyError, read_json, write_json
from scaling.flops import ledger
from scaling.layers import with_vocab
from scaling.recipe import FlopsOfSize, recipe_from_config, shape
from scaling.records import read_manifest, read_table

LOSSES = {
    "huber": "huber", "lad": "lad", "lsq": "least_squares", "quantile": "quantile", "expectile": "expectile",
}  # fmt: skip


@dataclasses.dataclass
class Fitted:
    """A fit, and the comparison of approaches where the table allows one."""

    fit: fits.Fit
    approaches: object | None
    why_not: str | None
    truth: dict | None = None  # what is known of a study on a synthetic source; see ``fits.known``
    planted: str | None = None  # what a simulated study was made of; see ``launch.simulate``


def is_study(path: Path) -> bool:
    return path.is_dir() and (path / "manifest.json").exists()


def fit(table: Path, options: dict) -> Fitted:
    """Fits a law to a study folder or a table file, and compares approaches 1, 2 and 3."""
    rows = read_table(table)
    reading = reading_options(options)
    fixed = {k: to_number("--fixed", k, v) for k, v in parse_pairs("--fixed", options["fixed"]).items()}
    settings = dict(
        loss=LOSSES[options["loss"]],
        **reading,
        **{k: options[k] for k in FIT_OPTIONS},
    )
    result = fits.fit_table(rows, options["law"], fixed=fixed, source=str(table), **settings)
    manifest = read_manifest(table) if is_study(table) else {}
    known = {"truth": known_floor(manifest, result), "planted": planted_words(manifest, result)}
    if set(result.law.variables) != {"N", "D"}:
        return Fitted(result, None, f"the law {result.law.name} is not in N and D", **known)
    try:
        compared = fits.approaches(
            rows,
            fit=result,
            seed=settings["seed"],
            **reading,
        )
    except fits.FitError as error:
        return Fitted(result, None, str(error), **known)
    return Fitted(result, compared, None, **known)


FIT_OPTIONS = (
    "delta", "delta_unit", "tau", "space", "weights", "stderr", "bootstraps", "cluster", "seed",
)  # fmt: skip


def reading_options(options: dict) -> dict:
    """How to read a table, from the options of a command, as keywords of ``fits``."""
    columns = parse_pairs("--map", options["columns"].split(",") if options["columns"] else [])
    return {"columns": columns, **{k: options[k] for k in ("token_unit", "param_unit", "exclude")}}


def parse_pairs(option: str, items) -> dict[str, str]:
    """``a=b`` items as a dict.

    Raises:
      ConfigError: an item of another form.
    """
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise ConfigError(f"{option} {item!r} must look like name=value")
        pairs[key.strip()] = value.strip()
    return pairs


def to_number(option: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option} {name}={text!r} must be a number") from None


def fit_path(table: Path, out: Path | None, law: str) -> Path:
    """Where a fit is kept: in its study, or beside its table."""
    if out is not None:
        return out
    return table / "fits" / f"{law}.json" if is_study(table) else table_sibling(table, f".{law}.fit.json")


def table_sibling(table: Path, suffix: str) -> Path:
    """A file in the current folder named after a table elsewhere, so that data folders stay as they are."""
    return Path(table.stem + suffix)


def save_fit(fitted: Fitted, table: Path, out: Path | None, options: dict) -> Path:
    """Writes the fit file and, beside it, the comparison of approaches."""
    path = fit_path(table, out, options["law"])
    fits.write_fit(fitted.fit, path)
    compared = path.with_name(path.stem + ".approaches.json")
    compared.unlink(missing_ok=True)  # never one of an older fit
    if fitted.approaches is not None:
        write_json(compared, fitted.approaches.to_dict())
    write_json(path.with_name(path.stem + ".command.json"), {"fit": command_line()})
    return path


def command_line() -> str:
    """The command as it was typed, for the reproducibility list."""
    return shlex.join(["scaling", *sys.argv[1:]])


def as_json(fitted: Fitted) -> dict:
    compared = None if fitted.approaches is None else fitted.approaches.to_dict()
    return {
        "fit": fitted.fit.to_dict(),
        "approaches": compared,
        "approaches_refused": fitted.why_not,
        "known_floor": fitted.truth,
        "planted": fitted.planted,
    }


def show(console: Console, fitted: Fitted, path: Path) -> None:
    """Prints the law, its doubts first, then the comparison."""
    console.print(fitted.fit)
    if fitted.truth is not None:
        console.print(floor_words(fitted.truth), soft_wrap=True)
    if fitted.planted is not None:
        console.print(fitted.planted, soft_wrap=True)
    if fitted.approaches is not None:
        console.print(fitted.approaches)
    else:
        console.print(f"approaches 1 and 2 not shown: {fitted.why_not}", soft_wrap=True)
    console.print(f"written to {path}", soft_wrap=True)


def find_fit(path: Path) -> Path:
    """The fit file meant by a study folder or a file.

    Raises:
      StudyError: there is none yet.
    """
    if path.is_file() and path.suffix == ".json":
        return path
    if not path.is_dir():
        raise StudyError(f"{path} is neither a fit file (.json) nor a fitted study folder")
    found = [
        p for p in sorted((path / "fits").glob("*.json")) if p.stem.count(".") == 0 and p.stem != "allocation"
    ]
    if not found:
        raise StudyError(f"{path} has no fit yet; make one with `scaling fit {path}`")
    chinchilla = path / "fits" / "chinchilla.json"
    return chinchilla if chinchilla in found else found[0]


def study_of(fit_file: Path) -> Path | None:
    """The study folder that a fit file lies in, if any."""
    folder = fit_file.absolute().parent.parent
    return folder if is_study(folder) else None


def cost_and_shape(study: Path | None):
    """The study's own FLOP function and shape rule, or None and None for a foreign table."""
    if study is None:
        return None, None
    manifest = read_manifest(study)
    config = manifest["config"]
    if "trainer" in config:
        return None, None
    recipe = recipe_from_config(config["recipe"])
    model = with_vocab(config["model"], manifest["data"]["vocab"])
    seq = manifest["cells"][0]["config"]["data"]["seq"]

    def buildable(params: float) -> dict:
        built = shape(recipe, model, params, seq)
        return {**built, "params": ledger(built, seq).params_total}

    return FlopsOfSize(recipe, model, seq, manifest["flops_convention"]), buildable


def allocate(path: Path, within: float, out: Path | None, options: dict) -> fits.Allocation:
    """Allocates a budget under the limits asked for and keeps the answer beside the fit."""
    file = find_fit(path)
    study = study_of(file)
    flops, buildable = cost_and_shape(study)
    asked = {k: options[k] for k in LIMITS if options[k] is not None}
    if options["max_memory"] is not None:
        asked["max_memory_bytes"] = options["max_memory"]
    if options["max_memory"] is not None or options["max_latency"] is not None:
        asked["bytes_per_param"] = options["bytes_per_param"]
    if options["sizes"] is not None:
        asked["sizes"] = [to_number("--sizes", "size", part) for part in options["sizes"].split(",")]
    answer = fits.allocate(
        fits.read_fit(file), budget_of(options), flops=flops, within=within, shape=buildable, **asked
    )
    target = out or (study / "fits" / "allocation.json" if study else None)
    if target is not None:
        kept = {"fit_hash": file_hash(file), "asked": {"within": within, **asked}, "command": command_line()}
        write_json(target, {**answer.to_dict(), **kept})
    return answer


def ask(subject: str, question: str | None, given, out: Path | None):
    """A question to a fit, or to the published constants of a law; without one, what may be asked."""
    path = Path(subject)
    named = not path.exists() and path.suffix != ".json"
    asked = fits.get_law(subject) if named else fits.read_fit(find_fit(path))
    if question is None:
        return fits.describe(asked if named else asked.law)
    values = {k: _numbers(k, v) for k, v in parse_pairs("NAME=VALUE", given).items()}
    answer = fits.ask(asked, question, **values)
    if out is not None:
        write_json(out, {**answer.to_dict(), "command": command_line()})
    return answer


def _numbers(name: str, text: str) -> float | list[float]:
    parts = [to_number("NAME=VALUE", name, part) for part in text.split(",")]
    return parts if "," in text else parts[0]


LIMITS = (
    "unique_tokens", "max_epochs", "max_params", "min_params", "max_tokens", "tokens_per_param",
    "inference_tokens", "max_latency", "inference_chip", "inference_devices", "policy", "target_loss",
)  # fmt: skip


def budget_of(options: dict):
    """The budget in the one way that was given: FLOPs, device-hours or money.

    Raises:
      ConfigError: none of them, or several. With a loss to reach there is none: it is what is asked for.
    """
    given = [k for k in ("budget", "device_hours", "money") if options[k] is not None]
    if not given and options["target_loss"] is not None:
        return None
    if len(given) != 1 or options["target_loss"] is not None:
        raise ConfigError("give the budget in one way: --budget, --device-hours, --money or --target-loss")
    if given == ["budget"]:
        return options["budget"]
    keys = {"device_hours": "device_hours", "money": "money", "price": "price_per_device_hour"}
    values = {theirs: options[ours] for ours, theirs in keys.items() if options[ours] is not None}
    return fits.Budget(**values, chip=options["chip"], mfu=options["mfu"])


def compare(a: Path, b: Path, budgets: list[float], out: Path | None):
    """Compares two fitted studies, each on its own FLOP function, and keeps the answer where asked."""
    files = [find_fit(p) for p in (a, b)]
    costs = [cost_and_shape(study_of(f))[0] for f in files]
    fitted = [fits.read_fit(f) for f in files]
    tops = [f.diagnostics["range"]["flops"][1] for f in fitted]
    budgets = budgets or [min(tops)]  # as far as both tables reach
    names = (a.stem, b.stem) if a.stem != b.stem else (str(a), str(b))
    result = fits.compare(*fitted, budgets, flops_a=costs[0], flops_b=costs[1], names=names)
    if out is not None:
        write_json(out, {**result.to_dict(), "command": command_line()})
    return result


def next_runs(path: Path, budget: float, quantity: str, batch: int, max_flops, within, out: Path | None):
    """The runs that teach most, and with ``within`` what must be spent; kept where asked."""
    file = find_fit(path)
    flops, _ = cost_and_shape(study_of(file))
    fitted = fits.read_fit(file)
    asked = {"quantity": quantity, "budget_target": budget, "flops": flops, "max_flops": max_flops}
    answers = {"next": fits.next_runs(fitted, batch=batch, **asked)}
    if within is not None:
        answers["spend"] = fits.spend_for(fitted, within=within, **asked)
    if out is not None:
        write_json(out, {k: v.to_dict() for k, v in answers.items()} | {"command": command_line()})
    return answers


def select(table: Path, laws: list[str], by: str, options: dict):
    """Rolling forecasts of the largest runs under each law."""
    chosen = {"laws": laws} if laws else {}
    return fits.select(read_table(table), by=by, **chosen, **reading_options(options))


def file_hash(path: Path) -> str:
    """What ties an allocation to the very fit that it was read from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def report(path: Path, out: Path | None, budget, unique_tokens, against: Path | None, laws, without) -> Path:
    """Writes the report of a fitted study or of a fit file, compared with ``against`` where that is given."""
    from fits.report import QUESTIONS, write_report

    file = find_fit(path)
    study = study_of(file)
    flops, buildable = cost_and_shape(study)
    kept = file.parent / "allocation.json"
    fitted = fits.read_fit(file)
    answer = None
    if budget is not None:
        asked = {"flops": flops, "shape": buildable, "unique_tokens": unique_tokens}
        answer = fits.allocate(fitted, budget, **asked).to_dict()
    elif study is not None and kept.exists():
        answer = read_json(kept)
        if answer["fit_hash"] != file_hash(file):  # of an older fit: ask the same of this one
            asked = answer.get("asked", {"within": answer["band"]["within"], **answer["limits"]})
            again = fits.allocate(
                fitted, None if "target_loss" in asked else answer["budget"], flops=flops, shape=buildable,
                **asked,
            )  # fmt: skip
            answer = {**again.to_dict(), "command": answer["command"]}
    frontiers = None
    if study is not None and "trainer" in read_manifest(study)["config"]:
        from launch.frontiers import of_groups

        method, data = fitted.method, fitted.data
        units = {"token_unit": data["units"]["tokens"], "param_unit": data["units"]["params"]}
        reading = {"columns": data["columns"], **units}
        frontiers = of_groups(study, "family", method["seed"], method["bootstraps"], reading)
    compared = file.with_name(file.stem + ".approaches.json")
    commands = [read_json(p)["fit"] for p in [file.with_name(file.stem + ".command.json")] if p.exists()]
    commands += [answer["command"]] if answer and "command" in answer else []
    return write_report(
        study,
        fitted,
        allocation=answer,
        approaches=read_json(compared) if compared.exists() else None,
        out=out or (study / "report.html" if study else Path(file.stem + ".report.html")),
        flops=flops,
        commands=[*commands, command_line()],
        ask=[q for q in QUESTIONS if q not in without],
        laws=laws,
        frontiers=frontiers,
        **({} if against is None else other_study(against, fitted)),
    )


def other_study(path: Path, like: fits.Fit) -> dict:
    """What a report needs to compare with another study: its fit, its FLOPs and its name.

    A table, or a study that has no fit yet, is fitted with the law, options and column names of ``like``.
    """
    if path.suffix == ".json" or (path / "fits").is_dir():
        file = find_fit(path)
        flops, _ = cost_and_shape(study_of(file))
        return {"against": fits.read_fit(file), "against_flops": flops, "against_name": path.stem}
    rows = read_table(path)
    m = like.method
    chosen = {k: m[k] for k in ("loss", "space", "weights", "stderr", "bootstraps", "seed")}
    chosen |= {"delta": m["delta_given"], "delta_unit": m["delta_unit"]} if m["loss"] == "huber" else {}
    chosen |= {"tau": m["tau"]} if m["tau"] is not None else {}
    columns = {ours: theirs for ours, theirs in like.data["columns"].items() if theirs in rows}
    units = {"token_unit": like.data["units"]["tokens"], "param_unit": like.data["units"]["params"]}
    other = fits.fit_table(
        rows,
        like.law,
        fixed=like.fixed,
        columns=columns,
        source=str(path),
        sensitivity=False,
        **units,
        **chosen,
    )
    flops, _ = cost_and_shape(path if is_study(path) else None)
    return {"against": other, "against_flops": flops, "against_name": path.stem}
