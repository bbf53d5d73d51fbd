"""Data quality: the formula by a plain loop, and the published filter that loosens as compute grows."""

import numpy as np
import pytest

import fits
from fits.laws import get_law
from fits.laws.quality import mixture_loss

# of four tenths by T-MARS score, as released with the paper, in pools of 12.8M samples
UTILITY, HALF_LIFE, POOL = [0.16, 0.125, 0.1, 0.085], [6.7272727, 8.5454545, 5.2727273, 2.2727273], 12.8e6


def by_passes(floor, first, utility, half_life, pool, samples):
    """The product over passes, one by one; each pool's half-life stretched by the number of pools."""
    unique, count = pool * len(utility), len(utility)
    total = (min(samples, unique) / first) ** -np.mean(utility)
    done, j = unique, 1
    while done < samples:
        until = min(samples, done + unique)
        b = np.mean([b * 0.5 ** (j / (tau * count)) for b, tau in zip(utility, half_life, strict=True)])
        total *= (until / done) ** -b
        done, j = until, j + 1
    return floor + total


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("samples", [5e6, 3.2e7, 1.28e8, 6.4e8])
def test_mixture_by_a_plain_loop(count, samples):
    some = (0.1, 4e6, UTILITY[:count], HALF_LIFE[:count], POOL, samples)
    assert mixture_loss(*some) == pytest.approx(by_passes(*some), rel=1e-13)


def test_passes_without_end_have_an_answer():
    few, many = (mixture_loss(0.1, 4e6, UTILITY, HALF_LIFE, POOL, n * 4 * POOL) for n in (1e5, 1e16))
    assert few == many


def test_one_pool_is_the_law():
    law, D = get_law("quality"), np.geomspace(5e6, 7e8, 40)
    p = {"E": 0.1, "n0": 4e6, "b": UTILITY[0], "tau": HALF_LIFE[0]}
    got = law.predict(p, {"D": D, "U": np.full(40, POOL)})
    want = [by_passes(0.1, 4e6, UTILITY[:1], HALF_LIFE[:1], POOL, d) for d in D]
    assert got == pytest.approx(want, rel=1e-13)


def test_the_best_filter_gets_looser_as_compute_grows():
    got = [
        fits.ask("quality", "filter", tokens=n, pool=POOL, utility=UTILITY, half_life=HALF_LIFE)
        for n in (3.2e7, 1.28e8, 6.4e8, 2e9)
    ]
    kept = [a["pools"] for a in got]
    assert kept[0] == 1 and kept == sorted(kept) and kept[-1] >= 3
    for n, a in zip((3.2e7, 1.28e8, 6.4e8, 2e9), got, strict=True):
        all_of_them = [by_passes(0.1, 4e6, UTILITY[:k], HALF_LIFE[:k], POOL, n) for k in (1, 2, 3, 4)]
        assert a["loss"] == pytest.approx(min(all_of_them), rel=1e-9)
        assert a["loss_of_the_best_pool"] == pytest.approx(all_of_them[0], rel=1e-9)
        assert a["passes"] == pytest.approx(n / POOL / a["pools"], rel=1e-12)


def test_order_does_not_matter_and_lengths_must_agree():
    asked = {"tokens": 1e9, "pool": POOL}
    one = fits.ask("quality", "filter", utility=UTILITY, half_life=HALF_LIFE, **asked)
    other = fits.ask("quality", "filter", utility=UTILITY[::-1], half_life=HALF_LIFE[::-1], **asked)
    assert one["loss"] == other["loss"]
    with pytest.raises(fits.FitError, match="utility has 4 values and half_life 3"):
        fits.ask("quality", "filter", utility=UTILITY, half_life=HALF_LIFE[:3], **asked)
