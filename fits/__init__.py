"""From a run table to laws, intervals and allocations. Needs neither flax nor an accelerator."""

from fits.errors import FitError
from fits.fit import Fit, fit_table
from fits.fitfile import read_fit, write_fit
from fits.laws import Law, PowerSum, Term, get_law, law_names
from fits.table import read_table

# last, because the functions take the names of their modules
from fits.allocate import Allocation, allocate  # isort: skip

__all__ = [
    "Allocation",
    "Fit",
    "FitError",
    "Law",
    "PowerSum",
    "Term",
    "allocate",
    "fit_table",
    "get_law",
    "law_names",
    "read_fit",
    "read_table",
    "write_fit",
]
