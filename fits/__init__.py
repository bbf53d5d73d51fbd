"""From a run table to laws, intervals and allocations. Needs neither flax nor an accelerator."""

from fits.adaptive import NextCells, next_cells
from fits.budget import Budget
from fits.design import NextRuns, next_runs, spend_for
from fits.errors import FitError
from fits.estimate import fit_table
from fits.few_clusters import few_cluster_interval
from fits.fit import Fit
from fits.fitfile import read_fit, write_fit
from fits.laws import Law, PowerSum, Question, Term, get_law, law_names, register_law
from fits.predict import Prediction, predict_run
from fits.profile import ProfileInterval, profile_interval
from fits.shared import SharedFit, shared_fit
from fits.table import read_table

# last, because the functions take the names of their modules
from fits.allocate import Allocation, allocate  # isort: skip
from fits.approaches import Approach, Comparison, approaches  # isort: skip
from fits.ask import Answer, ask, describe  # isort: skip
from fits.compare import StudyComparison, compare  # isort: skip
from fits.power import Power, power  # isort: skip
from fits.select import Selection, select  # isort: skip

__all__ = [
    "Allocation",
    "Answer",
    "Approach",
    "Budget",
    "Comparison",
    "Fit",
    "FitError",
    "Law",
    "NextCells",
    "NextRuns",
    "Power",
    "PowerSum",
    "Prediction",
    "ProfileInterval",
    "Question",
    "Selection",
    "SharedFit",
    "StudyComparison",
    "Term",
    "allocate",
    "approaches",
    "ask",
    "compare",
    "describe",
    "few_cluster_interval",
    "fit_table",
    "get_law",
    "law_names",
    "next_cells",
    "next_runs",
    "power",
    "predict_run",
    "profile_interval",
    "read_fit",
    "read_table",
    "register_law",
    "select",
    "shared_fit",
    "spend_for",
    "write_fit",
]
