"""Test-time compute: the cost token by token, the best size against a scalar search, memory's move of it."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

import fits
from fits.laws import get_law
from fits.laws.attempts import attempt_cost
from fits.planted import STUDIES

LAW, P = get_law("coverage_N"), STUDIES["coverage_N"][0]
QUESTION = LAW.questions["allocate"]
DEFAULTS = {k: v for k, (v, _) in QUESTION.takes.items()}


def allocated(constants=P, **given):
    arrays = {k: np.array([v]) for k, v in constants.items()}
    got = QUESTION.answer(LAW, arrays, DEFAULTS | given)
    return {k: float(v[0]) for k, v in got.items()}


def test_cost_token_by_token():
    """A model of 28 layers, 16 query and 8 key heads of 128, written out over the tokens of an answer."""
    N, layers, queries, keys, head, prompt, tokens, intensity = 6e8, 28, 16, 8, 128, 300, 4000, 562.5
    flops = read = shared = 0.0
    for new in range(tokens):
        flops += 2 * N + 4 * layers * queries * head * (prompt + new + 0.5)  # scores, and values
        read += 2 * (2 * layers * keys * head) * (new + 0.5)  # keys and values in two bytes each
        shared += 2 * (2 * layers * keys * head) * prompt
    got = attempt_cost(N, prompt, tokens, 2.0 * layers * keys * head, queries / keys, intensity)
    # a token at the middle of its own step makes the sums exact
    assert got == pytest.approx((flops + intensity * read, intensity * shared), rel=1e-12)


def test_the_best_size_against_a_scalar_search():
    got = allocated(flops=1e16, tokens=1000.0)

    def failures(log_n):
        N = np.exp(log_n)
        cache = DEFAULTS["cache"] * (N / 1e9) ** DEFAULTS["cache_power"]
        one, shared = attempt_cost(N, 512.0, 1000.0, cache, 4.0, DEFAULTS["intensity"])
        return float(LAW.predict(P, {"N": N, "K": (1e16 - shared) / one}))

    best = minimize_scalar(failures, bounds=(np.log(1e9), np.log(3e11)), method="bounded",
                           options={"xatol": 1e-9})  # fmt: skip
    # failures are flat at their minimum: a search on their values keeps half of the 16 digits, with a margin
    assert np.log(got["params"]) == pytest.approx(best.x, abs=1e-5)
    near = allocated(flops=1e16, tokens=1000.0, smallest=0.99 * np.exp(best.x))
    assert np.log(near["params"]) == pytest.approx(best.x, abs=1e-5)
    assert got["coverage"] == pytest.approx(1 - best.fun, rel=1e-12)
    one, shared = attempt_cost(
        got["params"], 512.0, 1000.0, 5.9e4 * (got["params"] / 1e9) ** 0.12, 4.0, 562.5
    )
    assert got["samples"] * one + shared == pytest.approx(1e16, rel=1e-12)


def test_memory_moves_the_threshold_size():
    """For hard problems and large budgets failures go as (b N^-gamma c(N))^a: a closed form of the size."""
    hard, tokens, gamma, power = {**P, "b": 8e7}, 1000.0, P["gamma"], DEFAULTS["cache_power"]
    got = allocated(hard, flops=1e24, tokens=tokens, prompt_tokens=1e-6, largest=1e13)
    cache = DEFAULTS["cache"] * tokens**2 / 2 * (2 * 4.0 + 2 * DEFAULTS["intensity"])
    ratio = cache / (2 * tokens) * (gamma - power) / (1 - gamma)  # of N^(1 - power), N in units of 1e9
    threshold = 1e9 * (ratio / 1e9) ** (1 / (1 - power))
    # b is about 8,000 at that size, and the limit is left by 1 / b
    assert got["params"] == pytest.approx(threshold, rel=1e-3)
    assert got["params_flops_only"] < threshold / 50
    assert got["coverage"] > got["coverage_flops_only"]
    longer = allocated(hard, flops=1e24, tokens=8 * tokens, prompt_tokens=1e-6, largest=1e13)
    assert longer["params"] > 5 * got["params"], "longer answers read more cache, and want larger models"


def test_budgets_below_one_attempt_and_wrong_ranges():
    got = allocated(flops=1e12, tokens=30_000.0)
    assert np.isnan([got["params"], got["samples"], got["coverage"]]).all()
    assert allocated(flops=1e15, tokens=1000.0)["samples_flops_only"] > 1
    with pytest.raises(fits.FitError, match=r"smallest is 2e\+09; it must be below largest, 1e\+09"):
        allocated(flops=1e15, tokens=1000.0, smallest=2e9, largest=1e9)


def test_size_and_law_of_one_size_agree():
    one = {"U": P["U"], "a": P["a"], "b": P["b"] * 7e9 ** -P["gamma"]}
    k = np.array([1.0, 10.0, 1e4])
    want = get_law("coverage").predict(one, {"K": k})
    # the power of N costs a few units in the last place times its log
    assert LAW.predict(P, {"N": 7e9, "K": k}) == pytest.approx(want, rel=1e-13)


def test_solutions_grow_faster_than_verifications():
    """As published, 0.57 and 0.39: together nearly the whole budget, C ~ S V."""
    law = get_law("solve_verify")
    got = {}
    for name, p in (("solutions", 0.57), ("verifications", 0.39)):
        arrays = {"K": np.array([1e-6]), "p": np.array([p])}
        got[name] = law.questions["budget"].answer(law, arrays, {"flops": 1e15, "times": 10.0})
        again = law.questions["budget"].answer(law, arrays, {"flops": 1e16, "times": 10.0})
        ratio = again["best"][0] / got[name]["best"][0]
        assert got[name]["grows"][0] == pytest.approx(ratio, rel=1e-12)
    assert got["solutions"]["grows"][0] == pytest.approx(3.715, abs=5e-4)  # 10^0.57, by hand
    assert 9 < got["solutions"]["grows"][0] * got["verifications"]["grows"][0] < 10
