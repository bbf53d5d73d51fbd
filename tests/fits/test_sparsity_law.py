"""Sparsity of mixtures: the formula with the published constants, the best share by its slope, its trend."""

import numpy as np
import pytest
from scipy.optimize import brentq

import fits
from fits.laws import get_law

P = get_law("sparsity").PUBLISHED


def test_the_printed_formula():
    """As the paper writes it, with lambda = -0.1666."""
    N, D, S = 7e9, 3e11, 0.875
    want = (
        16612.50 / N**0.5962 + 5455.67 / D**0.3954 + 0.4598 / (1 - S) ** -0.1666
        + 17.26 / ((1 - S) ** 0.1603 * N**0.1595) + 0.94
    )  # fmt: skip
    got = get_law("sparsity").predict(P, {"N": N, "D": D, "X": 1 - S})
    assert got == pytest.approx(want, rel=1e-13)  # powers as exponentials of logs


@pytest.mark.parametrize("size, budget", [(1e9, 1e20), (1e10, 1e21), (3e10, 1e22)])
def test_best_share_is_where_the_slope_is_zero(size, budget):
    def slope(log_x):
        X = np.exp(log_x)
        D = budget / (6 * size * X)
        return (
            P["beta"] * P["B"] * D ** -P["beta"] + P["phi"] * P["F"] * X ** P["phi"]
            - P["delta"] * P["G"] * X ** -P["delta"] * size ** -P["gamma"]
        )  # fmt: skip

    want = np.exp(brentq(slope, np.log(1e-4), 0.0, xtol=1e-13))
    got = fits.ask("sparsity", "sparsity", flops=budget, params=size)
    # the loss is flat at its minimum: a search on its values keeps about half of the 16 digits
    assert got["active_share"] == pytest.approx(want, rel=2e-6)
    # an optimum just inside the range is found as well as one in its middle
    near = fits.ask("sparsity", "sparsity", flops=budget, params=size, least_share=0.99 * want)
    assert near["active_share"] == pytest.approx(want, rel=2e-6)
    assert got["active_params"] * got["tokens"] * 6 == pytest.approx(budget, rel=1e-12)
    assert got["loss"] < got["loss_all_active"]


def test_best_sparsity_rises_with_size_and_ends_at_dense():
    def best(size, **more):
        return fits.ask("sparsity", "sparsity", flops=1e21, params=size, **more)["sparsity"]

    got = [best(n) for n in (1e9, 1e10, 1e11, 1e12)]
    assert got == sorted(got) and got[-1] > 0.99
    dense = fits.ask("sparsity", "sparsity", flops=1e22, params=1e8)
    assert dense["sparsity"] == 0 and dense["loss"] == dense["loss_all_active"]
    assert best(1e10, expert_share=0.5) < best(1e10), "less is saved where half is always at work"
    with pytest.raises(fits.FitError, match="expert_share is 2; it must be at most 1"):
        best(1e10, expert_share=2.0)
