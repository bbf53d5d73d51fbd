"""The one error of ``fits`` that a user can cause."""


class FitError(ValueError):
    """A table, option or query that cannot be fitted or answered; one sentence says which and why."""
