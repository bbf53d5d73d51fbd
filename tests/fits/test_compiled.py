"""Newton inside XLA against the same rule in NumPy."""

import numpy as np
import pytest
from fits_tables import planted_table

from fits import compiled, newton
from fits.errors import FitError
from fits.laws import get_law
from fits.objective import RowLoss, make_problem
from fits.solve import point_starts, solve

# What a parameter may be apart. Both stop where the promised decrease is 1e-13 of the objective, so
# where the objective is curved they end far closer.
AGREE = 1e-10


def variables(table):
    return {"N": np.log(table["params"]), "D": np.log(table["tokens"])}


@pytest.mark.parametrize("law", ["chinchilla", "tied", "product", "kaplan"])
@pytest.mark.parametrize("loss", ["huber", "least_squares", "lad"])
def test_backends_agree(law, loss):
    table = planted_table(noise=3e-3, size_effect=2e-3, seed=3)
    got = {}
    for backend in ("numpy", "jax"):
        _, got[backend] = solve(get_law(law), variables(table), table["loss"], loss=loss, backend=backend)
    ours, xla = got["numpy"], got["jax"]
    assert ours.status == xla.status
    assert xla.objective == pytest.approx(ours.objective, rel=1e-12)
    # lad ends in a corner that rounding moves along: its parameters are known to its last width, 1e-10
    within = 1e-7 if loss == "lad" else AGREE
    np.testing.assert_allclose(list(xla.params.values()), list(ours.params.values()), rtol=within)


def test_raw_space_weights_and_a_fixed_parameter():
    table = planted_table(noise=3e-3, seed=4)
    weights = np.random.default_rng(0).uniform(0, 2, len(table["loss"]))
    options = {"space": "raw", "weights": weights, "fixed": {"E": 1.7}, "delta": 1e-2}
    fits = [
        solve(get_law("chinchilla"), variables(table), table["loss"], backend=b, **options)[1]
        for b in ("numpy", "jax")
    ]
    np.testing.assert_allclose(list(fits[1].params.values()), list(fits[0].params.values()), rtol=AGREE)


def test_every_lane_ends_at_the_same_place_with_the_same_verdict():
    table = planted_table(noise=3e-3, seed=5)
    problem = make_problem(get_law("chinchilla"), variables(table), table["loss"])
    weights = np.random.default_rng(1).exponential(size=(7, 42))
    starts = np.repeat(point_starts(problem, np.ones(42), 1), 7, 0)
    ours, xla = (m.newton(problem, starts, weights, RowLoss("huber", 1e-3)) for m in (newton, compiled))
    np.testing.assert_array_equal(xla.converged_B, ours.converged_B)
    np.testing.assert_array_equal(xla.at_bound_BxK, ours.at_bound_BxK)
    np.testing.assert_allclose(xla.p_BxK, ours.p_BxK, rtol=AGREE)


def test_a_bound_holds_inside_xla():
    """A floor that wants to be negative ends at zero, in both."""
    table = planted_table(noise=1e-3, seed=6)
    loss = table["loss"] - 2.0
    fits = [solve(get_law("chinchilla"), variables(table), loss, backend=b)[1] for b in ("numpy", "jax")]
    assert [(f.status, f.at_bound) for f in fits] == [("boundary", ["E"])] * 2
    np.testing.assert_allclose(fits[1].p_K, fits[0].p_K, rtol=AGREE, atol=1e-15)


def test_an_unknown_backend_is_named():
    table = planted_table()
    with pytest.raises(FitError, match="backend is 'torch'; it must be one of numpy, jax"):
        solve(get_law("chinchilla"), variables(table), table["loss"], backend="torch")
