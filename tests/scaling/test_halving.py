"""Brackets against the papers' own tables and a count of what really runs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.halving import Bracket, Rung, halving, hyperband, levels, promoted


def table(least, most, eta):
    return [[(r.configs, r.resource) for r in b.rungs] for b in hyperband(least, most, eta)]


def test_the_published_table():
    # Li et al. 2018, table 1: R = 81, eta = 3
    assert table(1, 81, 3) == [
        [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
        [(34, 3), (11, 9), (3, 27), (1, 81)],
        [(15, 9), (5, 27), (1, 81)],
        [(8, 27), (2, 81)],
        [(5, 81)],
    ]


def test_eta_2_and_8_and_what_deepening_adds():
    # by hand: n = ceil(4 / (s + 1) 2^s) = 8, 16/3 -> 6, 4, 4; the package mlr3hyperband prints the same
    eight = [[(8, 1), (4, 2), (2, 4), (1, 8)], [(6, 2), (3, 4), (1, 8)], [(4, 4), (2, 8)], [(4, 8)]]
    assert table(1, 8, 2) == eight
    # at R = 16 n = ceil(5 / (s + 1) 2^s): each old bracket begins at its old resource with more of them
    sixteen = table(1, 16, 2)
    assert [b[0] for b in sixteen] == [(16, 1), (10, 2), (7, 4), (5, 8), (5, 16)]
    assert [new[0][0] - old[0][0] for new, old in zip(sixteen, eight, strict=False)] == [8, 4, 3, 1]
    for old, new in zip(eight, sixteen, strict=False):
        assert all(n[1] == o[1] and n[0] >= o[0] for n, o in zip(new, old, strict=False))


@given(st.integers(2, 5), st.integers(0, 5), st.sampled_from([1, 128, 0.3]))
def test_every_bracket_costs_about_the_same(eta, top, least):
    most = least * eta**top
    assert levels(least, most, eta) == top
    for b in hyperband(least, most, eta):
        assert b.rungs[-1].resource == pytest.approx(most) and b.rungs[-1].configs >= 1
        ran: dict[int, float] = {}  # count what runs: configuration number to the resource that it has had
        paid = 0.0
        for r in b.rungs:
            for c in range(r.configs):
                paid += r.resource - ran.get(c, 0.0)
                ran[c] = r.resource
        assert b.cost() == pytest.approx(paid) and b.cost() <= b.cost(reuse=False)
        # Li et al. 2018: B = (s_max + 1) R a bracket; the ceil adds less than one configuration, which costs
        # R eta^-s on each of the s + 1 rungs
        rungs = len(b.rungs)
        assert b.cost(reuse=False) <= ((top + 1) + rungs * eta ** (1 - rungs)) * most * (1 + 1e-9)


def test_promotion_when_a_bracket_is_extended():
    loss = {"a": 1.0, "b": 2.0, "c": 3.0, "d": math.inf, "e": 0.5, "f": 1.0}
    assert promoted("bdca", loss, 2) == ["a", "b"] and promoted("fa", loss, 1) == ["f"]
    assert promoted("abcd", loss, 4)[-1] == "d"
    assert promoted("abc", loss, 2, "preserving", others="ae") == ["e", "a"]
    assert promoted("abc", loss, 2, "efficient", further="c") == ["c", "a"]
    assert promoted("abc", loss, 1, "efficient", further="bc") == ["b", "c"]  # what is trained stays
    with pytest.raises(ValueError, match="strategy is 'x'"):
        promoted("a", loss, 1, "x")


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="eta is 1"):
        hyperband(1, 8, 1)
    with pytest.raises(ValueError, match="need 0 < least <= most"):
        levels(9, 8, 2)
    with pytest.raises(ValueError, match="configs is 0"):
        halving(0, 1, 8)
    # more halvings than configurations: the empty rungs are left out
    assert halving(3, 1, 8, 2) == Bracket((Rung(3, 1.0), Rung(1, 2.0)))
