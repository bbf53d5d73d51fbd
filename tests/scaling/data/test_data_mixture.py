"""Mixtures: exact proportions, every component's own epochs, and the same batches from any step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.config import SCHEMA, ConfigError, cell_id, validate_cell, validate_section
from scaling.data import Mixture, Stream, Tokens, first_repeat, heldout_batches, open_data
from scaling.data.mixture import BLOCK, Proportions

WEIGHTS = [[0.7, 0.3], [1, 1, 1], [98, 1.5, 0.5], [0.45, 0.35, 0.15, 0.04, 0.01]]


def corpus(size, value, document=50):
    """A corpus whose tokens are all above ``value`` and tell their place."""
    offsets = np.append(np.arange(0, size, document), size).astype(np.int64)
    return Tokens((np.arange(size) + value).astype(np.uint32), offsets)


def mixture(sizes, weights, **kw):
    parts = [corpus(n, 10**6 * c, **kw) for c, n in enumerate(sizes)]
    return Mixture(parts, Proportions(weights))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_are_exact_in_every_block_and_close_in_every_run(weights):
    p = Proportions(weights)
    assert p.shares_C.sum() == BLOCK
    assert np.abs(p.shares_C / BLOCK - np.array(weights) / sum(weights)).max() < 1 / BLOCK
    sample = np.arange(3 * BLOCK)
    component, number = p.place(sample)
    counts = np.cumsum(component[:, None] == np.arange(len(weights)), axis=0)
    assert (counts[BLOCK - 1 :: BLOCK] == p.shares_C * np.arange(1, 4)[:, None]).all()
    # each count is the rounding of its share of a common time, and the time is off by all roundings together
    off = np.abs(counts - (sample[:, None] + 1) * p.shares_C / BLOCK)
    assert off.max() <= 0.5 + 0.5 * len(weights)
    for c in range(len(weights)):  # numbers run on, none twice and none left out
        assert np.array_equal(number[component == c], np.arange(counts[-1, c]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(WEIGHTS))
def test_place_count_and_inverse_agree_anywhere(sample, weights):
    p = Proportions(weights)
    component, number = (int(x[0]) for x in p.place(np.array([sample])))
    assert p.sample_of(component, number) == sample
    assert p.counts(sample)[component] == number and p.counts(sample).sum() == sample


def test_a_share_that_rounds_to_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"components\[1\].weight is 0.001 of 100.001"):
        Proportions([100, 0.001])


def test_every_component_has_its_own_epochs():
    seq, batch, steps = 10, 8, 400
    m = mixture([2001, 601], [0.5, 0.5])
    stream = Stream(m, seq, batch, seed=3)
    rows = np.concatenate([stream.rows_at(s) for s in range(steps)])
    assert (np.bincount(rows // 200 > 0) == steps * batch / 2).all()  # 200 rows, then 60
    for first, count in ((0, 200), (200, 60)):
        own = rows[(rows >= first) & (rows < first + count)]
        for epoch in range(own.size // count):
            assert len(set(own[epoch * count : (epoch + 1) * count].tolist())) == count
        assert not np.array_equal(own[:count], own[count : 2 * count])  # another order each time
    assert stream.component_epochs_at(steps) == [1600 / 200, 1600 / 60]
    assert stream.epochs_at(steps) == 1600 / 60
    assert stream.unique_tokens_at(steps) == 2600
    assert stream.unique_tokens_at(10) == (40 + 40) * seq
    assert stream.samples_per_epoch == first_repeat(m, seq)
    before = rows[: stream.samples_per_epoch].tolist()
    assert len(set(before)) == len(before) and rows[stream.samples_per_epoch] in before


def test_batches_are_the_components_own_rows():
    seq = 16
    m = mixture([1000, 500], [3, 1])
    stream = Stream(m, seq, 12, seed=0)
    singles = [Stream(part, seq, 1, seed=0) for part in m.parts]
    seen = [0, 0]
    for step in range(30):
        batch = stream.batch_at(step)
        assert (batch["inputs"][:, 0] >= 10**6).sum() == 3  # a quarter of every batch
        for b in range(12):
            c = int(batch["inputs"][b, 0] >= 10**6)
            alone = singles[c].batch_at(seen[c])
            seen[c] += 1
            assert all(np.array_equal(batch[k][b], alone[k][0]) for k in batch)


def test_resumed_sliced_and_prefetched_batches_are_the_same():
    m = mixture([5000, 3000, 800], [5, 3, 2])
    whole = [Stream(m, 8, 24, seed=1).batch_at(s) for s in range(40)]
    later = Stream(m, 8, 24, seed=1)
    with later.iterate(17, 40, prefetch=2) as batches:
        for step, batch in zip(range(17, 40), batches, strict=True):
            assert all(np.array_equal(batch[k], whole[step][k]) for k in batch)
    half = Stream(m, 8, 24, seed=1).batch_at(5, slice(12, 24))
    assert np.array_equal(half["inputs"], whole[5]["inputs"][12:])


def test_heldout_rows_keep_the_proportions():
    m = mixture([4001, 2001], [3, 1])
    batches = heldout_batches(m, 20, 16, 100)
    first = np.concatenate([b["inputs"][:, 0] for b in batches])[:100]
    assert (first >= 10**6).sum() == 25 and len(set(first.tolist())) == 100
    available = first_repeat(m, 20, "held-out")  # 200 rows of 3/4: at most 267 in proportion
    assert available == 267
    heldout_batches(m, 20, 16, available)
    with pytest.raises(ConfigError, match="from 1 to 267"):
        heldout_batches(m, 20, 16, available + 1)


def walk(seed, **kw):
    return dict(source="random_walk", vocab=64, degree=4.0, tokens=20_000, document=100, seed=seed, **kw)


def section(**changes):
    components = [{"weight": 2, **walk(1)}, {"weight": 1, **walk(2, unique_tokens=4000)}]
    return {"source": "mixture", "seq": 20, "components": components, **changes}


def test_opening_a_mixture():
    dataset = open_data(section())
    facts = dataset.describe()
    assert [round(c["share"], 4) for c in facts["components"]] == [0.6667, 0.3333]
    assert [len(p) for p in dataset.train.parts] == [19_000, 4000]
    assert dataset.entropy_rate is None and dataset.vocab == 64
    other = section()
    other["components"][0]["weight"] = 3
    assert open_data(other).fingerprint != dataset.fingerprint
    cut = section()
    del cut["components"][1]["unique_tokens"]
    assert open_data(cut).fingerprint != dataset.fingerprint
    with pytest.raises(ConfigError, match=r"data\.fingerprint is 'x'"):
        open_data(section(fingerprint="x"))


def test_the_planner_counts_epochs_of_the_most_repeated_component():
    from launch.planning import data_facts

    facts = data_facts(open_data(section()), 20)
    # a third of the samples come from 199 rows of the second component: 3 x 199 samples until one returns
    assert abs(facts["unique_tokens"] / 20 - 597) <= 3
    assert facts["heldout_tokens"] <= 2000  # two components of 1,000


def test_folders_are_not_part_of_the_id(text_folder):
    def cell(path, weight=1.0):
        return validate_cell(
            {
                "model": {"d_model": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "ffn_dim": 8},
                "data": {
                    "source": "mixture",
                    "components": [
                        {"weight": weight, "source": "text", "path": path},
                        {"weight": 1.0, "source": "stdlib"},
                    ],
                },
                "optim": {"lr": 0.01, "weight_decay": 0.1},
                "schedule": {"warmup_steps": 1},
                "train": {"batch": 1, "steps": 2},
                "eval": {},
            }
        )

    assert cell_id(cell("/here")) == cell_id(cell("/there")) != cell_id(cell("/here", 2.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"components": None}, "data.components is None"),
        ({"components": [{"weight": 1}]}, "list of two mappings"),
        ({"unique_tokens": 5}, "give it to a component"),
        ({"components": [{"weight": 0}, {"weight": 1}]}, r"components\[0\].weight is 0"),
        ({"components": [{"weight": 1, "seq": 3}, {"weight": 1}]}, "unknown key 'seq'"),
        ({"components": [{"weight": 1, "source": "mixture"}] * 2}, "a corpus of its own"),
        ({"components": [{"weight": 1, "source": "text", "path": "x"}] * 2}, "must be absolute"),
        ({"components": [{"weight": 1, "source": "text"}] * 2}, "needs a folder"),
        ({"source": "stdlib"}, "it is for 'mixture'"),
    ],
)
def test_bad_mixtures_are_named(change, said):
    with pytest.raises(ConfigError, match=said):
        validate_section("data", section(**change))
    with pytest.raises(ConfigError, match=said):
        open_data(section(**change))


def test_schema_is_hashed_as_before():
    assert all(f.content is None for s in SCHEMA.values() for k, f in s.items() if k != "components")
