"""Row checks (diverged, warm-up), ill-conditioning, and the strips that drop sizes and narrow the window."""

import numpy as np
import pytest
from fits_tables import planted_table

import fits
from fits import checks
from fits.laws import get_law
from fits.solve import solve
from fits.table import clean

OPTIONS = {"bootstraps": 0, "sensitivity": False}


def flags_of(fit, word):
    return [r["row"] for r in fit.rows if any(f.startswith(word) for f in r["flags"])]


def test_diverged_rows_are_listed_and_kept():
    table = planted_table(noise=1e-3)
    table["loss"][20] *= 1.3  # above smaller and shorter runs
    fit = fits.fit_table(table, **OPTIONS)
    assert flags_of(fit, "diverged") == [20] and fit.rows[20]["outcome"] == "used"
    assert any(f["code"] == "diverged" and "1 of 42" in f["text"] for f in fit.flags)
    table["loss"][20] /= 1.3 * 1.05  # as far off the surface, but lower: no divergence
    assert flags_of(fits.fit_table(table, **OPTIONS), "diverged") == []
    said = fits.fit_table(planted_table() | {"diverged": np.arange(42) == 7}, **OPTIONS)
    assert flags_of(said, "diverged") == [7]
    small = planted_table() | {"vocab_size": np.where(np.arange(42) == 3, 8, 50000)}
    assert flags_of(fits.fit_table(small, **OPTIONS), "diverged") == [3], "log 8 is 2.08"


def test_warm_up_by_tokens_and_by_steps():
    table = planted_table()
    warm = np.where(np.arange(42) == 5, 0.8, 0.02) * table["tokens"]
    fit = fits.fit_table(table | {"warmup_tokens": warm}, **OPTIONS)
    assert flags_of(fit, "warm-up") == [5] and any(f["code"] == "warm-up" for f in fit.flags)
    steps = {"warmup_steps": [600] + [10] * 41, "steps": [1000] * 42}
    assert flags_of(fits.fit_table(table | steps, **OPTIONS), "warm-up") == [0]
    for messy in ({"warmup_steps": ["?"] * 42, "steps": [0] * 42}, {"warmup_steps": [None] * 42}):
        assert flags_of(fits.fit_table(table | messy, **OPTIONS), "warm-up") == []


def test_ill_conditioning_is_said_before_it_is_hopeless():
    """D all but a power of N: the condition number lies between a sound fit's and a hopeless one's."""
    law = get_law("chinchilla")
    for wiggle, bad in ((1.0, False), (3e-3, True)):
        table = planted_table(noise=1e-4)
        table["tokens"] = 20 * table["params"] * np.exp(wiggle * np.sin(np.arange(42.0) * 7))
        del table["flops"]
        from fits_tables import planted_loss

        table["loss"] = planted_loss(table["params"], table["tokens"])
        rows = clean(table)
        _, point = solve(law, {k: rows.log_x()[k] for k in "ND"}, rows.loss)
        assert (point.condition > checks.CONDITION) == bad, point.condition
        point.status = "converged"
        alone = {"clusters": 42, "icc": 0.0, "effective_rows": 42.0}
        got = checks.fit_flags(
            law, rows, point, "row", alone, np.zeros(0, bool), 0.0,
            {}, None, np.zeros(42), [[]] * 42,
        )  # fmt: skip
        assert any(f["code"] == "ill_conditioned" for f in got) == bad


def test_strips_are_refits_of_the_rows_that_stay():
    table = planted_table(noise=2e-3)
    fit = fits.fit_table(table, bootstraps=0)
    strip = {row["what"]: row for row in fit.sensitivity}
    for what, keep in (
        ("without the size 1.68e+09", np.abs(table["params"] / 1.6777e9 - 1) > 0.01),
        ("only the runs from 9.79e+19 FLOPs", table["flops"] > 9e19),
    ):
        assert strip[what]["rows"] == keep.sum()
        alone = fits.fit_table({k: v[keep] for k, v in table.items()}, **OPTIONS)
        # both converge to the same minimum
        assert strip[what]["params"]["alpha"] == pytest.approx(alone.params["alpha"], rel=1e-6)
    assert sum(w.startswith("without the size") for w in strip) == 12
    assert sum(w.startswith("only the runs") for w in strip) == 2, "six budgets: from the third, the fourth"


def test_many_sizes_go_in_groups(epoch):
    fit = fits.fit_table(epoch, bootstraps=0)
    sizes = [r for r in fit.sensitivity if r["what"].startswith("without the sizes")]
    windows = [r["rows"] for r in fit.sensitivity if r["what"].startswith("only")]
    assert len(sizes) == 12 and sum(240 - r["rows"] for r in sizes) == 240, "every row leaves once"
    assert windows == [210, 180, 120]


def test_what_moves_the_exponent_is_flagged():
    fit = fits.fit_table(planted_table(noise=2e-3), bootstraps=60)
    a = fit.intervals["a"]["estimate"]
    moves = {r["what"]: abs(r["a"] - a) for r in fit.sensitivity if not r["what"].startswith("only")}
    ordered = sorted(moves.values())
    fit.intervals["a"]["sd"] = 0.25 * (ordered[-1] + ordered[-2])  # two of it lie between the largest two
    texts = [f["text"] for f in checks.sensitivity_flags(fit)]
    assert len(texts) == 1 and texts[0].startswith(max(moves, key=moves.get))
    fit.intervals["a"]["sd"] = 1e-12
    assert not any(f["text"].startswith("only") for f in checks.sensitivity_flags(fit)), (
        "windows move by chance"
    )


def test_rows_of_several_families_are_said_first():
    table = planted_table() | {"family": np.array(["transformer", "griffin"] * 21, object)}
    first = fits.fit_table(table, **OPTIONS).flags[0]
    assert first["code"] == "families" and "of 2 families (griffin, transformer)" in first["text"]
    alone = fits.fit_table(table, exclude=["family == 'griffin'"], **OPTIONS)
    none = fits.fit_table(table | {"family": np.full(42, None)}, **OPTIONS)
    assert not any(f["code"] == "families" for f in alone.flags + none.flags)
