"""Random small, damaged tables under many laws: a fit with a status, or a sentence, and no warning."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from fits_tables import planted_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fits
from fits.table import clean

LAWS = ("chinchilla", "tied", "product", "power_N", "power_D", "power_C", "overtraining")
LOSSES = ("huber", "lad", "least_squares", "quantile", "expectile")
DAMAGE = (
    "nan", "inf", "negative", "zero", "text", "outlier", "duplicates", "seeds", "one size", "one budget",
    "one ratio", "constant", "rounded", "scaled", "reversed", "near the floor",
)  # fmt: skip


def damaged(rng, kinds):
    """A few rows of a planted grid, with the given damage done to random cells or to whole columns."""
    whole = pd.DataFrame(planted_table(noise=4e-3, seed=int(rng.integers(5))))
    table = whole.iloc[rng.choice(len(whole), int(rng.integers(3, 21)), replace=False)]
    table = table.reset_index(drop=True).drop(columns="flops").astype(object)
    loss = table.loss.astype(float)
    bad = {"nan": np.nan, "inf": np.inf, "negative": -1.0, "zero": 0.0, "text": "n/a"}
    for kind in kinds:
        cell = int(rng.integers(len(table))), str(rng.choice(["params", "tokens", "loss"]))
        if kind in bad:
            table.loc[cell] = bad[kind]
        elif kind == "outlier" and isinstance(table.loc[cell], float):
            table.loc[cell] *= 10.0 ** rng.uniform(-6, 6)
    columns = {
        "one size": ("params", 1e9), "one ratio": ("tokens", pd.to_numeric(table.params, "coerce") * 20),
        "one budget": ("tokens", 1e21 / 6 / pd.to_numeric(table.params, "coerce").replace(0, np.nan)),
        "constant": ("loss", 2.5), "rounded": ("loss", loss.round(1)),
        "scaled": ("loss", loss * 10.0 ** rng.uniform(-12, 12)), "reversed": ("loss", loss.to_numpy()[::-1]),
        "near the floor": ("loss", 1.8 + 1e-9 * loss),
    }  # fmt: skip
    table = table.assign(**dict(columns[kind] for kind in kinds if kind in columns))
    if "duplicates" in kinds:
        table = pd.concat([table, table.iloc[:3]], ignore_index=True)
    if "seeds" in kinds:
        again = pd.to_numeric(table.loss, "coerce") * np.exp(3e-3 * rng.standard_normal(len(table)))
        table = pd.concat([table, table.assign(loss=again)], ignore_index=True)
    return table


@settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    seed=st.integers(0, 2**32 - 1), kinds=st.lists(st.sampled_from(DAMAGE), max_size=3, unique=True),
    law=st.sampled_from(LAWS), loss=st.sampled_from(LOSSES), space=st.sampled_from(["log", "raw"]),
    cluster=st.sampled_from(["auto", "row", "compute"]), scheme=st.sampled_from(["pairs", "bayesian"]),
)  # fmt: skip
def test_a_fit_or_a_sentence(seed, kinds, law, loss, space, cluster, scheme):
    table = damaged(np.random.default_rng(seed), kinds)
    options = {"loss": loss, "space": space, "cluster": cluster, "scheme": scheme, "bootstraps": 10}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            fit = fits.fit_table(table, law, **options, sensitivity=False)
        except fits.FitError as error:
            assert len(str(error)) > 20 and "\n" not in str(error)
            return
        again = fits.Fit.from_dict(json.loads(json.dumps(fit.to_dict(), allow_nan=False)))
        assert str(fit) and again.status == fit.status
        assert len(fit.rows) == len(table)
        assert all(r["outcome"] == "used" or r["reason"] for r in fit.rows)
        if fit.status == "converged":
            assert np.isfinite(list(fit.params.values())).all()
        for ask in (
            lambda: fits.allocate(again, 1e21),
            lambda: fits.approaches(table, fit=fit, bootstraps=5),
        ):
            try:
                answer = ask()
            except fits.FitError as error:
                assert len(str(error)) > 20
                continue
            assert str(answer)
            assert not isinstance(answer, fits.Allocation) or fit.status in ("converged", "boundary")


def test_a_covariance_that_overflows_is_written_as_null():
    fit = fits.fit_table(planted_table(noise=4e-3), bootstraps=20, sensitivity=False)
    fit.covariance = [
        [np.inf if i == j == 1 else v for j, v in enumerate(r)] for i, r in enumerate(fit.covariance)
    ]
    again = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert again["covariance"]["matrix"][1][1] is None and again["covariance"]["matrix"][0][0] > 0


def test_sizes_that_the_law_does_not_need_may_be_zero():
    table = planted_table(noise=4e-3)
    table["params"] = np.where(np.arange(42) == 3, 0.0, table["params"])
    with np.errstate(all="raise"):
        assert len(clean(table, needs=("flops", "loss"))) == 42


@pytest.mark.parametrize("quantity", ["N*", "tokens_per_param", "loss*"])
def test_an_optimum_is_not_profiled_under_a_law_in_compute(quantity):
    fit = fits.fit_table(planted_table(noise=4e-3), "power_C", bootstraps=0, sensitivity=False)
    with pytest.raises(fits.FitError, match="the law power_C is in C, not N and D"):
        fits.profile_interval(fit, quantity, budget=1e21)
