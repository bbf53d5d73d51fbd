"""Tables that say too little: a clear status or a FitError, never a silent number, a warning or a crash."""

import json
import warnings

import numpy as np
import pytest
from fits_tables import planted_loss, planted_table

import fits
from fits.laws import get_law
from fits.objective import LOSSES
from fits.solve import solve

POWER_SUMS = ("chinchilla", "tied", "product", "power_N", "power_D", "power_C")
DOUBT = ("boundary", "not identified", "unconverged")


def table_of(N, D, noise=0.0, p=None):
    N, D = np.broadcast_arrays(np.asarray(N, float), np.asarray(D, float))
    error = noise * np.random.default_rng(0).standard_normal(N.size)
    return {"params": N, "tokens": D, "flops": 6 * N * D, "loss": planted_loss(N, D, p) * np.exp(error)}


def rows(table, count):
    return {k: v[:count] for k, v in table.items()}


def quick(table, law="chinchilla", **options):
    return fits.fit_table(table, law, **{"bootstraps": 30, "sensitivity": False} | options)


def test_four_rows():
    table = rows(planted_table(noise=4e-3), 4)
    with pytest.raises(fits.FitError, match="4 usable rows; chinchilla has 5 free parameters"):
        quick(table)
    fit = quick(table, "tied")  # as many parameters as rows: no residual, so nothing can be judged
    assert fit.status != "converged" or any(f["name"] == "few_rows" for f in fit.flags), fit
    three = quick(table, "power_N")
    assert "1 degrees of freedom" in str(three) or three.status != "converged", three


@pytest.mark.parametrize("law", ["chinchilla", "tied", "product", "overtraining"])
def test_one_size(law):
    fit = quick(table_of(np.full(12, 1e8), np.geomspace(1e9, 1e11, 12), noise=3e-3), law)
    assert fit.status == "not identified" and not len(fit.draws), (fit.status, fit.reasons)
    assert str(fit).startswith("flag: the law is not identified"), str(fit)


def test_one_budget():
    """On one budget N and D move against each other; two bare powers of them are still two terms, but
    with noise the offset is hardly told from either."""
    N = np.geomspace(1e8, 3e9, 9)
    fit = quick(table_of(N, 1e20 / 6 / N, noise=3e-3))
    assert fit.status in DOUBT, (fit.status, fit.reasons)
    flat = quick(table_of(N, 1e20 / 6 / N, noise=3e-3), "power_C")
    assert flat.status == "not identified", (flat.status, flat.reasons)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_floor(loss):
    """A table without an irreducible loss: E at its bound, and said."""
    fit = quick(planted_table(p={"E": 0.0, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}), loss=loss)
    assert fit.status == "boundary" and fit.params["E"] < 1e-9, (fit.status, fit.reasons)
    assert "E at its lowest the rows show no floor" in str(fit)


@pytest.mark.parametrize("law", ["power_C", "power_D"])
@pytest.mark.parametrize("loss", LOSSES)
def test_an_offset_that_runs_away(law, loss):
    """28 losses that fall by log C: without a bound E drops without end, ever closer to the straight line."""
    C = np.geomspace(1e18, 1e22, 28)
    table = {
        "params": np.sqrt(C / 120),
        "tokens": np.sqrt(C * 20 / 6),
        "flops": C,
        "loss": 14 - 0.25 * np.log(C),
    }
    held, free = (quick(table, law, loss=loss, **o) for o in ({}, {"bounds": {"E": (None, None)}}))
    assert held.params["E"] == 0.0 and held.status in DOUBT and "E" in held.diagnostics["at_bound"], held
    assert free.params["E"] < -30 and free.objective < held.objective
    assert free.status in DOUBT, (free.status, free.reasons)
    assert free.status == "boundary" or "not estimates" in str(free)


@pytest.mark.parametrize("law", POWER_SUMS)
def test_messy_subsets(epoch, kyo, overtraining, law):
    """Small random parts of real tables, with all losses and odd options: a fit or a FitError, no warning."""
    rng = np.random.default_rng(POWER_SUMS.index(law))
    gadre = overtraining.rename(columns={"loss_eval0": "loss"})
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(12):
            source = (epoch, kyo, gadre)[i % 3]
            count = int(rng.integers(4, 31))
            part = source.iloc[rng.choice(len(source), count, replace=False)].copy()
            loss = LOSSES[i % len(LOSSES)]
            options = {"loss": loss, "space": ("log", "raw")[i // 2 % 2]}
            if loss in ("quantile", "expectile"):
                options["tau"] = float(rng.choice([0.02, 0.3, 0.9]))
            if loss == "huber":
                options |= {"delta": float(rng.choice([0.1, 1.345, 30.0])), "delta_unit": "scale"}
            if i % 4 == 1:
                options["weights"] = rng.integers(0, 4, count) * 1e6
            if i % 4 == 2:
                options["stderr"] = 10.0 ** rng.uniform(-12, 1, count)
            if i % 5 == 3:
                part["loss"] = 2.5
            if i % 7 == 5:
                part.iloc[::2] = part.iloc[0].to_numpy()
            try:
                fit = quick(part, law, bootstraps=25 * (i % 2), **options)
            except fits.FitError:
                seen.add("refused")
                continue
            json.dumps(fit.to_dict(), allow_nan=False)
            assert str(fit)
            assert fit.status in ("converged", *DOUBT)
            if fit.status == "converged":
                assert np.isfinite(list(fit.params.values())).all() and fit.diagnostics["starts_agreeing"] > 1
            seen.add(fit.status)
    assert "converged" in seen and seen & {*DOUBT, "refused"}, "the parts should be both good and bad"


def test_wild_units_and_scales():
    """Loss in any unit and rows at any scale leave the exponents where they were."""
    table, law = planted_table(noise=3e-3), get_law("chinchilla")
    x = {k: np.log(table[c]) for k, c in (("N", "params"), ("D", "tokens"))}
    _, plain = solve(law, x, table["loss"])
    for factor in (1e-12, 1e12):
        _, scaled = solve(law, x, table["loss"] * factor)
        assert scaled.status == "converged" and abs(scaled.params["alpha"] - plain.params["alpha"]) < 1e-6
        _, shifted = solve(law, {k: v + np.log(factor) for k, v in x.items()}, table["loss"])
        assert shifted.status == "converged" and abs(shifted.params["beta"] - plain.params["beta"]) < 1e-6
