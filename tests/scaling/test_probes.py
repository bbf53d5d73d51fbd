"""Probes: which tokens they look at, by brute force and by known models; and as fields of a record."""

import dataclasses

import numpy as np
import pytest
from tiny_study import tiny_cell

from scaling import probes
from scaling.data import open_data
from scaling.files import CellFolder
from scaling.records import COLUMNS, PROBES
from scaling.train import train

pytestmark = pytest.mark.usefixtures("quick_compiles")
COUNTS = np.array([0, 5, 9, 3, 0, 8, 7, 6, 5, 4, 3, 2, 9, 9, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2], float)
B, T = 3, 40


@dataclasses.dataclass
class LongestMatch:
    """Predicts what followed the last time that the row had its last ``order`` tokens: 0 nats, else 1."""

    order: int

    def __call__(self, params, batch):
        nats = np.zeros(batch["inputs"].shape)
        for b, (x, y) in enumerate(zip(batch["inputs"], batch["targets"], strict=True)):
            for t in range(len(x)):
                last = tuple(x[max(0, t - self.order + 1) : t + 1])
                earlier = [
                    s
                    for s in range(t)
                    if s >= self.order - 1 and tuple(x[s - self.order + 1 : s + 1]) == last
                ]
                nats[b, t] = 0 if earlier and y[earlier[-1]] == y[t] else 1
        return (nats * batch["loss_mask"]).sum(1), batch["loss_mask"].sum(1)


def mean(evaluate, batch):
    nats, tokens = evaluate(None, batch)
    return nats.sum() / tokens.sum()


def test_a_copier_copies_and_the_first_pass_is_new():
    first, second = probes.copying(COUNTS, B, T)
    x = np.concatenate([first["inputs"], first["targets"][:, -1:]], 1)
    np.testing.assert_array_equal(x[:, :20], x[:, 20:40])
    assert set(np.unique(x)) <= set(np.flatnonzero(COUNTS))
    assert second["loss_mask"].sum() == B * 19 and first["loss_mask"].sum() == B * 19
    copier = lambda params, b: (0 * b["loss_mask"].sum(1), b["loss_mask"].sum(1))  # noqa: E731
    assert mean(copier, second) == 0
    assert mean(LongestMatch(3), second) < 0.3 < 0.9 < mean(LongestMatch(3), first)


def test_recall_asks_for_every_pair_once():
    first, second = probes.recall(COUNTS, B, T)
    pairs = 10
    for row in range(B):
        x = np.r_[second["inputs"][row], second["targets"][row, -1]]
        told = dict(zip(x[: 2 * pairs : 2], x[1 : 2 * pairs : 2], strict=True))
        assert len(told) == pairs
        asked = [(second["inputs"][row, t], second["targets"][row, t])
                 for t in np.flatnonzero(second["loss_mask"][row])]  # fmt: skip
        assert dict(asked) == told and len(asked) == pairs
        new = [(first["inputs"][row, t], first["targets"][row, t])
               for t in np.flatnonzero(first["loss_mask"][row])]  # fmt: skip
        assert dict(new) == told
    # few known tokens: fewer pairs, all the same of different keys
    few, _ = probes.recall(np.array([0.0, 1, 2, 3, 0, 4]), B, T)
    assert few["loss_mask"].sum() == B * 2


def test_ngrams_are_those_of_the_same_document_before():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (B, T + 1))
    segments = np.where(np.arange(T) < 15, 1, 2)[None].repeat(B, 0)
    mask = np.ones((B, T), np.float32)
    mask[:, 14] = 0  # from one document to the next
    batch = {"inputs": x[:, :-1], "targets": x[:, 1:], "segment_ids": segments, "loss_mask": mask}
    (seen,), (novel,) = probes.ngrams([batch])
    np.testing.assert_array_equal(seen["loss_mask"] + novel["loss_mask"], mask)
    for b in range(B):
        for t in range(T):
            begin = 0 if t < 15 else 15
            grams = [tuple(x[b, s : s + 4]) for s in range(begin, t - 2)]
            repeated = t - begin >= 2 and tuple(x[b, t - 2 : t + 2]) in grams
            # a gram may not end past its own document
            if mask[b, t]:
                assert bool(seen["loss_mask"][b, t]) == repeated, (b, t)


def test_longer_rows_count_late_positions_alone(corpus):
    dataset = open_data(tiny_cell(corpus)["data"])
    for streamed in (False, True):
        batches = probes.longer(dataset.heldout, 8, 4, 8, streamed)
        for batch in batches:
            place = np.arange(32)[None] if streamed else batch["positions"]
            assert batch["inputs"].shape == (2, 32)
            assert not batch["loss_mask"][np.broadcast_to(place < 16, (2, 32))].any()
        assert sum(b["loss_mask"].sum() for b in batches) > 0
    assert probes.longer(dataset.heldout, 10**6, 4, 8, False) == []


@pytest.mark.parametrize("model", [{}, {"family": "mamba2", "state_dim": 8}])
def test_a_record_has_them_at_its_last_evaluation(corpus, tmp_path, model):
    cell = tiny_cell(corpus, model=model, eval={"probes": True})
    result = train(cell, CellFolder(tmp_path, "c"))
    first, last = result["evals"]
    assert "probes" not in first and set(last["probes"]) == set(PROBES) <= set(COLUMNS)
    assert all(v is not None and (k.endswith("gain") or v > 0) for k, v in last["probes"].items())
    # rows of its own text: the repeated and the novel tokens together are the held-out loss
    low, high = sorted((last["probes"]["ngram_loss"], last["probes"]["novel_loss"]))
    assert low < last["loss"] < high
    plain = train(tiny_cell(corpus, model=model), CellFolder(tmp_path, "plain"))
    assert plain["loss"] == result["loss"] and "probes" not in plain["evals"][-1]
