"""The planner of remat and parts against brute force: every way compiled, the cheapest that fits."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_study import tiny_cell

from scaling.config import ConfigError
from scaling.flops import ledger
from scaling.memory import REMATS, abstract_step, candidates, choose, cost, step_bytes
from scaling.program import Plan, Static, compiled

pytestmark = pytest.mark.usefixtures("quick_compiles")


def brute_force(budget, ways, measure, price):
    fitting = [way for way in ways if measure(*way) <= budget]
    return min(fitting, key=lambda way: price(*way)) if fitting else None


def test_ways_halve_the_rows_down_to_one():
    assert candidates(1) == [(r, 1) for r in REMATS]
    assert [k for r, k in candidates(6) if r == "none"] == [1, 2, 4]
    assert len(candidates(8)) == 12


@given(st.data())
def test_the_planner_finds_what_brute_force_finds(data):
    """Whatever the sizes, as long as keeping more and taking more rows at once never needs less."""
    ways = candidates(8)
    kept = sorted(data.draw(st.lists(st.integers(1, 50), min_size=3, max_size=3)), reverse=True)
    fixed, prices = data.draw(st.integers(1, 50)), data.draw(st.permutations(range(12)))

    def measure(remat, parts):
        return fixed + kept[REMATS.index(remat)] * (8 // parts)

    price = dict(zip(ways, prices, strict=True))
    budget = data.draw(st.integers(1, 500))
    got = choose(budget, ways, measure, lambda *way: price[way])
    want = brute_force(budget, ways, measure, lambda *way: price[way])
    assert got.fits == (want is not None)
    if want is None:
        assert got.bytes == min(measure(*way) for way in ways)
    else:
        assert (got.remat, got.accumulate) == want
    compiled_ways = [(r, k) for r, k, _ in got.tried]
    assert len(compiled_ways) == len(set(compiled_ways)) <= 12


def test_the_cost_is_that_of_the_ledger_and_recomputing_a_forward_pass_is_a_third_more():
    model = tiny_cell("unused")["model"]
    none, dots, full = (cost(model, 8, 32, remat, 1, flops_per_byte=0) for remat in REMATS)
    account = ledger(model, 32)
    assert none == account.train_flops(8 * 32)
    head = 2 * model["d_model"] * model["vocab"]  # is not computed again
    assert full - none == 8 * 32 * (account.forward_flops_per_token() - head)
    assert none < dots < full
    assert cost(model, 8, 32, "none", 2) - cost(model, 8, 32, "none", 1) == 2400 * account.params_total
    assert cost(model, 8, 32, "none", 1, devices=4) == cost(model, 8, 32, "none", 1) / 4
    with pytest.raises(ConfigError, match="remat is 'some'"):
        cost(model, 8, 32, "some", 1)


@pytest.mark.slow
def test_on_a_real_model_the_compiled_memory_is_ordered_and_the_planner_equals_brute_force(corpus):
    """Six scanned layers, where activations outweigh the state; six programs."""
    cell = tiny_cell(corpus, model={"layers": 6}, data={"seq": 64}, train={"batch": 16})
    static, ways = Static.of(cell), [(r, k) for r in REMATS for k in (1, 16)]

    def bytes_of(remat, parts):
        plan = Plan(remat, parts)
        return step_bytes(compiled(static, plan)[0].lower(*abstract_step(static, plan, 16, 64)).compile())

    def price(remat, parts):
        return cost(cell["model"], 16, 64, remat, parts)

    table = {way: bytes_of(*way) for way in ways}
    for remat in REMATS:  # what the planner takes for granted when it leaves ways out
        assert table[remat, 1] > table[remat, 16]
    assert table["none", 1] > table["dots", 1] > table["full", 1]
    values = sorted(table.values())
    for budget in [values[0] - 1, *values, values[-1] + 1]:
        got = choose(budget, ways, lambda *way: table[way], price)
        want = brute_force(budget, ways, lambda *way: table[way], price)
        assert ((got.remat, got.accumulate) if got.fits else None) == want, budget
    jax.clear_caches()
