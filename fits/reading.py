"""Numbers and column names as tables spell them: '1.3B', '100,000,000', 'params_M', 'Final Loss'."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

MULTIPLES = {
    "": 1.0, "k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6, "b": 1e9, "billion": 1e9, "t": 1e12,
    "trillion": 1e12,
}  # fmt: skip
COUNT = re.compile(
    r"(\d+(?:\.\d+)?|\d*\.\d+|[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?)\s*([kmbt]|thousand|million|billion|trillion)?"
    r"\s*(?:params?|parameters|tokens?|toks?|flops?|steps)?"
)
# what other tables call ours, once case, unit and punctuation are gone
OTHER_NAMES = {
    "params": "params param parameters nparams nparam numparams numparameters nparameters totalparams"
    " paramstotal paramcount modelparams modelsize size n",
    "tokens": "tokens token ntokens numtokens totaltokens tokenstotal traintokens trainingtokens d",
    "flops": "flops flop totalflops trainflops trainingflops flopstotal compute trainingcompute c",
    "loss": "loss finalloss valloss validationloss evalloss testloss trainloss losseval ce crossentropy l",
    "unique_tokens": "uniquetokens uniquetoken datasettokens u",
    "steps": "steps step nsteps trainsteps trainingsteps s",
    "batch_tokens": "batchtokens tokensperbatch batchsizetokens batchsize batch",
}
UNIT = re.compile(r"(?<=[\s_(\[./-])(k|m|b|t|thousands?|millions?|billions?|trillions?)[)\]]?$")


def numbers(values: np.ndarray) -> np.ndarray:
    """Float64, with NaN where a value is not a number."""
    try:
        return np.array(values, np.float64)
    except (TypeError, ValueError):
        pass
    out = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        try:
            out[i] = float(value)
        except (TypeError, ValueError):
            continue
    return out


def counts(values: np.ndarray, unit: float) -> tuple[np.ndarray, list[int]]:
    """Counts in units of one, also from text such as '1.3B' (whose unit is its own) or '100,000,000'.

    Returns:
      Float64 with NaN where a value is no number, and the positions of those read from such text.
    """
    with np.errstate(over="ignore"):  # a count beyond float64 is no finite number, and is said to be none
        out = numbers(values) * unit
    spelled = []
    for i in np.flatnonzero(np.isnan(out)):
        match = COUNT.fullmatch(values[i].strip().lower()) if isinstance(values[i], str) else None
        if match:
            multiple = MULTIPLES[match[2]] if match[2] else unit
            out[i] = float(match[1].replace(",", "")) * multiple
            spelled.append(int(i))
    return out, spelled


def likely_columns(wanted: Iterable[str], names: Sequence[str]) -> dict[str, str]:
    """Ours -> the table's column that looks to be it, by its name, for those that have one."""
    out: dict[str, str] = {}
    bare = {name: _bare(name) for name in names}
    for ours in wanted:
        known = OTHER_NAMES.get(ours, ours).split()
        free = [n for n in names if n not in out.values()]
        found = [n for word in known for n in free if bare[n] == word]
        others = {word for c in OTHER_NAMES if c != ours for word in OTHER_NAMES[c].split()}
        near = difflib.get_close_matches(ours, [bare[n] for n in free if bare[n] not in others], n=1)
        found = found or [n for n in free if bare[n] in near]
        if found:
            out[ours] = found[0]
    return out


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", UNIT.sub("", name.lower()))


def unit_in(name: str) -> float:
    """The unit that a column's name ends in: 1e6 for params_M, 1e9 for 'tokens (B)', else 1."""
    match = UNIT.search(name.lower())
    return MULTIPLES[match[1].rstrip("s") if len(match[1]) > 1 else match[1]] if match else 1.0


def say_mapping(found: Mapping[str, str]) -> str:
    """How to name these columns, as keywords of ``fits`` and as options of the command."""
    keywords = "columns={" + ", ".join(f"{ours!r}: {theirs!r}" for ours, theirs in found.items()) + "}"
    pairs = ",".join(f"{ours}={theirs}" for ours, theirs in found.items())
    options = f'--map "{pairs}"'
    for ours, unit in (("params", "param"), ("tokens", "token")):
        size = unit_in(found[ours]) if ours in found else 1.0
        if size != 1.0:
            keywords += f", {unit}_unit={size:.0e}".replace("e+0", "e").replace("e+", "e")
            options += f" --{unit}-unit {size:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{keywords} ({options})"
