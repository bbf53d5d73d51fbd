"""The problems of known law as cells: what a worker runs, and what is known of the outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from scaling.theory.plrf import Equivalent, Moments, Problem, frontier, theory
from scaling.theory.structured import Structured, best_batch, excess

MOST_ENTRIES = 2**24
"""Of the features that are in memory at once: 64 MB."""


def problem_of(cell: Mapping) -> Problem:
    own = cell["trainer"]
    return Problem(own["alpha"], own["beta"], own["d"], own["ambient"], cell["train"]["batch"], own["rate"])


def run_plrf(cell: Mapping, on_step: Callable[[int], bool], keep) -> list[dict] | None:
    """The loss after the cell's last step: of ``draws`` runs the mean and its standard error.

    ``sgd`` draws features and data anew for each run, ``moments`` the features, ``equivalent`` nothing.
    """
    own, steps, seed = cell["trainer"], cell["train"]["steps"], cell["train"]["seed"]
    problem = problem_of(cell)
    if own["dynamics"] == "equivalent":
        losses = np.atleast_1d(Equivalent(problem).loss(steps))
    else:
        from scaling.theory.blocks import in_blocks
        from scaling.theory.sgd import features, sgd_losses

        if own["dynamics"] == "moments":
            drawn = (features(problem, seed, draw) for draw in range(own["draws"]))
            losses = np.array([Moments(W, problem).loss(steps) for W in drawn])
        else:
            at_once = max(1, min(own["draws"], MOST_ENTRIES // int(problem.v * problem.d)))

            def run(first, begin, each_chunk):
                more = {"first_draw": first, "on_step": each_chunk, "begin": begin}
                return sgd_losses([problem], [steps], at_once, seed, **more)

            losses = in_blocks(cell, at_once, run, on_step, keep)
            if losses is None:
                return None
    return [evaluation(steps, losses)]


def evaluation(steps: int, losses: np.ndarray) -> dict:
    """The mean of several runs' losses, as an evaluation of their cell."""
    stderr = float(losses.std(ddof=1) / len(losses) ** 0.5) if len(losses) > 1 else 0.0
    return {"step": steps, "loss": float(losses.mean()), "loss_stderr": stderr}


def plrf_truths(cells: list[Mapping]) -> dict | None:
    """The frontier's exponents of cells that differ in size and steps alone.

    Returns:
      ``a`` and ``loss`` (N* ~ C^a, loss ~ C^-loss): at these budgets, by the deterministic equivalent
      (``here``), and without bound (``limit``). None on a border between phases, with one budget, or where
      no best size can be found at these budgets.
    """
    first = problem_of(cells[0])
    f = [cell["trainer"]["d"] * cell["train"]["batch"] * float(cell["train"]["steps"]) for cell in cells]
    low, high = min(f), max(f)
    if high < 2 * low:
        return None
    fields = {"ambient": first.ambient, "batch": first.batch, "rate": first.rate}
    budgets = np.geomspace(low, high, 4)
    try:
        limit = theory(first.alpha, first.beta)
        d, loss = frontier(first.alpha, first.beta, budgets, sizes=13, **fields)
    except ValueError:
        return None
    (a, _), (x, _) = (np.polyfit(np.log(budgets), np.log(y), 1) for y in (d, loss))
    return {
        "words": f"phase {limit.phase}",
        "here": {"a": float(a), "loss": float(-x)},
        "limit": {"a": limit.size, "loss": limit.loss},
    }


def structured_of(cell: Mapping) -> Structured:
    own = cell["trainer"]
    fields = (own["decay"], own["target"], own["modes"], own["rate"], own["noise"])
    return Structured(*fields, batch=cell["train"]["batch"])


def run_structured(cell: Mapping, on_step: Callable[[int], bool], keep) -> list[dict] | None:
    """The excess loss after the cell's last step, labels' noise taken off: the mean of ``draws`` runs."""
    own, steps = cell["trainer"], cell["train"]["steps"]
    if own["dynamics"] == "moments":
        return [evaluation(steps, np.atleast_1d(excess(structured_of(cell), steps)))]
    from scaling.theory.blocks import in_blocks
    from scaling.theory.sgd import structured_losses

    draws, seed = own["draws"], cell["train"]["seed"]

    def run(first, begin, each_chunk):
        return structured_losses(structured_of(cell), [steps], draws, seed, each_chunk, begin)

    losses = in_blocks(cell, draws, run, on_step, keep)
    return None if losses is None else [evaluation(steps, losses)]


def structured_truths(cells: list[Mapping]) -> dict | None:
    """Exponents of the best batch (``a``) and of the excess (``loss``) over samples; see ``plrf_truths``.

    None without noise, with one budget, or where one sample is the best batch.
    """
    problem = structured_of(cells[0])
    samples = [cell["train"]["batch"] * float(cell["train"]["steps"]) for cell in cells]
    low, high = min(samples), max(samples)
    if problem.noise == 0 or high < 2 * low:
        return None
    budgets = np.geomspace(low, high, 3)
    try:
        batch, loss = np.array([best_batch(problem, c) for c in budgets]).T
    except ValueError:
        return None
    (a, _), (x, _) = (np.polyfit(np.log(budgets), np.log(y), 1) for y in (batch, loss))
    return {
        "words": "best batch at fixed compute",
        "here": {"a": float(a), "loss": float(-x)},
        "limit": {"a": problem.exponent, "loss": problem.exponent},
    }
