"""The library of laws: one small class each, with its formula, its source and its units.

Variables are N (parameters), D (training tokens), C (training FLOPs), U (unique tokens), S (steps),
B (tokens a batch), and those that single laws add (``COLUMN_OF`` names their columns); L is the loss in the
table's own unit (nats a token where the table says nothing else). To add a law, write one class and put it in
``LAWS``; a law of your own needs no more than ``register_law`` or ``"file.py:ClassName"`` for a name.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from fits.errors import FitError
from fits.laws.attempts import CoverageN, SolveVerify
from fits.laws.base import COLUMN_OF, EXPONENT_BOUNDS, Law, PowerSum, Question, Term
from fits.laws.basic import Chinchilla, Kaplan, PowerC, PowerD, PowerN, Product, Tied
from fits.laws.batch import StepsBatch
from fits.laws.broken import BrokenC, BrokenD
from fits.laws.coverage import Coverage
from fits.laws.downstream import DownstreamExponential, DownstreamSigmoid
from fits.laws.energy import Energy
from fits.laws.ensemble import Ensemble
from fits.laws.growth import AverageParams, Upcycling
from fits.laws.moe import FineGrained, Leverage
from fits.laws.overtraining import Overtraining
from fits.laws.precision import PostTraining, Precision, PrecisionJoint, QatShare
from fits.laws.private import DPSGD
from fits.laws.quality import Quality
from fits.laws.recurrence import Recurrence
from fits.laws.repetition import DataConstrained, DataConstrainedTied
from fits.laws.rl import UpdatesToData
from fits.laws.sparsity import Sparsity
from fits.laws.tuning import TunedD, TunedND

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Chinchilla(), Tied(), Kaplan(), PowerN(), PowerD(), PowerC(), Product(), Overtraining(),
        DataConstrained(), DataConstrainedTied(), BrokenD(), BrokenC(), StepsBatch(), Precision(),
        PrecisionJoint(), PostTraining(), QatShare(), FineGrained(), Leverage(), Sparsity(),
        Upcycling(), AverageParams(), Quality(),
        TunedND(), TunedD(), Coverage(), CoverageN(), SolveVerify(), UpdatesToData(), DPSGD(),
        Recurrence(),
        Ensemble(), DownstreamExponential(), DownstreamSigmoid(), Energy(),
    )
}  # fmt: skip


def law_names() -> list[str]:
    """The names that ``get_law`` knows."""
    return list(LAWS)


def register_law(law: Law) -> Law:
    """Puts a law into the library under its own name, for this process; returns it.

    Raises:
      FitError: no law, a law without a name, formula or parameters, or a name that is taken.
    """
    if not isinstance(law, Law):
        raise FitError(f"the law is a {type(law).__name__}; it must be an object of a fits.Law class")
    for field in ("name", "formula", "parameters", "variables"):
        if not getattr(law, field):
            raise FitError(f"the law {type(law).__name__} has no {field}")
    unknown = [v for v in law.variables if v not in COLUMN_OF]
    if unknown:
        raise FitError(f"the law {law.name} has the variable {unknown[0]!r}; known: {', '.join(COLUMN_OF)}")
    if law.name in LAWS and type(LAWS[law.name]) is not type(law):
        raise FitError(f"the name {law.name!r} is taken by another law; choose another name")
    LAWS[law.name] = law
    return law


def get_law(law: str | Law) -> Law:
    """The law of that name, or the class of "path/to/file.py:ClassName"; a ``Law`` passes through.

    Raises:
      FitError: an unknown name, or a file without that class.
    """
    if isinstance(law, Law):
        return law
    if isinstance(law, str) and ".py:" in law:
        return _from_file(law)
    if law not in LAWS:
        raise FitError(
            f"law is {law!r}; it must be one of {', '.join(LAWS)}, a file.py:ClassName, or a fits.Law object"
        )
    return LAWS[law]


def _from_file(spec: str) -> Law:
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise FitError(f"law is {spec!r}, but {path} is not a file")
    try:
        found = runpy.run_path(path).get(name)
    except Exception as error:  # whatever a user's own file raises
        raise FitError(
            f"law is {spec!r}, and {path} cannot be run: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Law)):
        raise FitError(f"law is {spec!r}, but {path} defines no fits.Law class {name!r}")
    law = found()
    if law.name in LAWS and type(LAWS[law.name]).__name__ == name and not _is_builtin(LAWS[law.name]):
        LAWS.pop(law.name)  # the same file read again
    return register_law(law)


def _is_builtin(law: Law) -> bool:
    return type(law).__module__.startswith("fits.laws")


__all__ = [
    "COLUMN_OF",
    "EXPONENT_BOUNDS",
    "LAWS",
    "Law",
    "PowerSum",
    "Question",
    "Term",
    "get_law",
    "law_names",
    "register_law",
]
