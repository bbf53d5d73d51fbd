import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.config import ConfigError
from scaling.data import Stream, Tokens, heldout_batches

KEYS = ["inputs", "targets", "segment_ids", "positions", "loss_mask"]


def make(sizes, dtype=np.uint16):
    """Documents of the given sizes; each token is its own place, so every one can be told apart."""
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    return Tokens(np.arange(offsets[-1]).astype(dtype), offsets)


def equal(a, b):
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


def row_in_python(tokens, row, seq):
    """One row, token by token: what the stream must give."""
    owner = np.repeat(np.arange(tokens.documents), np.diff(tokens.offsets))
    flat = np.concatenate([tokens.document(d) for d in range(tokens.documents)])
    out = {k: [] for k in KEYS}
    segment, position = 1, 0
    for t in range(row * seq, row * seq + seq):
        if t > row * seq:
            same = owner[t] == owner[t - 1]
            segment, position = (segment, position + 1) if same else (segment + 1, 0)
        values = (flat[t], flat[t + 1], segment, position, float(owner[t] == owner[t + 1]))
        for key, value in zip(KEYS, values, strict=True):
            out[key].append(value)
    return out


corpora = st.lists(st.integers(1, 40), min_size=1, max_size=30).filter(lambda s: sum(s) >= 12)
shapes = st.tuples(corpora, st.integers(1, 11), st.integers(1, 7), st.integers(0, 2**64 - 1))


@settings(deadline=None)
@given(shapes, st.integers(0, 200), st.sampled_from([np.uint8, np.uint16, np.uint32]))
def test_batch_is_what_a_loop_over_tokens_gives(shape, step, dtype):
    sizes, seq, batch, seed = shape
    tokens = make(sizes, dtype)
    stream = Stream(tokens, seq, batch, seed)
    got = stream.batch_at(step)
    assert list(got) == KEYS
    for b, row in enumerate(stream.rows_at(step)):
        for key, values in row_in_python(tokens, int(row), seq).items():
            assert got[key][b].tolist() == values, key
    for key in KEYS:
        assert got[key].dtype == (np.float32 if key == "loss_mask" else np.int32)
        assert got[key].shape == (batch, seq)


@settings(deadline=None)
@given(shapes, st.integers(0, 3), st.booleans())
def test_every_token_is_a_target_once_an_epoch(shape, epoch, shuffle):
    sizes, seq, _, seed = shape
    tokens = make(sizes)
    stream = Stream(tokens, seq, 1, seed, shuffle)
    batches = [stream.batch_at(epoch * stream.samples_per_epoch + i) for i in range(stream.samples_per_epoch)]
    targets = np.concatenate([b["targets"].ravel() for b in batches])
    mask = np.concatenate([b["loss_mask"].ravel() for b in batches])
    used = stream.samples_per_epoch * seq
    # All but the first token of the corpus (nothing stands before it) and the tail that fills no row.
    assert sorted(targets) == list(range(1, used + 1))
    assert stream.dropped_tokens == len(tokens) - 1 - used
    assert stream.dropped_tokens < seq
    # No loss on the first token of a document, and on those alone.
    firsts = set(tokens.offsets[1:-1].tolist()) & set(range(used + 1))
    assert set(targets[mask == 0].tolist()) == firsts
    assert stream.masked_targets == len(firsts)
    assert set(mask.tolist()) <= {0.0, 1.0}


@settings(deadline=None)
@given(shapes, st.integers(0, 50), st.data())
def test_any_number_of_hosts_reads_the_same_global_batch(shape, step, data):
    sizes, seq, batch, seed = shape
    whole = Stream(make(sizes), seq, batch, seed).batch_at(step)
    cuts = sorted(data.draw(st.sets(st.integers(1, batch), max_size=3)) - {batch})
    parts = [
        Stream(make(sizes), seq, batch, seed).batch_at(step, rows=slice(a, b))
        for a, b in zip([0, *cuts], [*cuts, batch], strict=True)
    ]
    assert equal({k: np.concatenate([p[k] for p in parts]) for k in whole}, whole)


@settings(deadline=None)
@given(shapes, st.lists(st.integers(0, 3000), min_size=1, max_size=8))
def test_batch_depends_on_the_step_alone(shape, steps):
    sizes, seq, batch, seed = shape
    used = Stream(make(sizes), seq, batch, seed)  # visited in any order, forwards and back
    for step in steps:
        assert equal(used.batch_at(step), Stream(make(sizes), seq, batch, seed).batch_at(step))


def test_steps_may_run_backwards():
    tokens = make([1000] * 30)
    for batch in (1, 3):
        stream = Stream(tokens, 3, batch, 9)
        forwards = [stream.rows_at(k).tolist() for k in range(5000)]
        assert [stream.rows_at(k).tolist() for k in reversed(range(5000))] == forwards[::-1]


def test_batch_size_does_not_change_the_order_of_samples():
    tokens = make([50] * 20)
    rows = [Stream(tokens, 7, batch, 5) for batch in (1, 4, 12)]
    orders = [np.concatenate([s.rows_at(k) for k in range(600 // s.batch)]) for s in rows]
    assert np.array_equal(orders[0], orders[1]) and np.array_equal(orders[0], orders[2])


def test_order_block_edges():
    # Orders are computed 4,096 samples at a time; a batch across the edge, and one larger than a block.
    tokens = make([1000] * 30)
    one = Stream(tokens, 3, 1, 9)
    expected = np.array([int(one.rows_at(i)[0]) for i in range(10_000)])
    for batch in (7, 4095, 4096, 4097, 5000):
        stream = Stream(tokens, 3, batch, 9)
        got = np.concatenate([stream.rows_at(k) for k in range(10_000 // batch)])
        assert np.array_equal(got, expected[: got.size])


def test_seeds_and_epochs_differ_and_unshuffled_is_in_order():
    tokens = make([100] * 30)
    streams = [Stream(tokens, 10, 299, seed) for seed in (0, 1)]
    orders = {streams[s].rows_at(epoch).tobytes() for s in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    plain = Stream(tokens, 10, 299, 0, shuffle=False)
    assert plain.rows_at(0).tolist() == plain.rows_at(5).tolist() == list(range(299))


@settings(deadline=None)
@given(shapes, st.integers(0, 40))
def test_epochs_and_unique_tokens(shape, steps):
    sizes, seq, batch, seed = shape
    stream = Stream(make(sizes), seq, batch, seed)
    seen = set()
    for step in range(steps):
        seen |= set(stream.batch_at(step)["targets"].ravel().tolist())
    assert stream.unique_tokens_at(steps) == len(seen)
    assert stream.epochs_at(steps) == pytest.approx(steps * batch / stream.samples_per_epoch, rel=1e-15)


PROGRAM = """
import hashlib, numpy as np
from scaling.data import Stream, Tokens
offsets = np.concatenate([[0], np.cumsum(np.arange(1, 201) * 7919 % 300 + 1)]).astype(np.int64)
tokens = Tokens((np.arange(offsets[-1]) * 40503 % 60000).astype(np.uint16), offsets)
stream = Stream(tokens, 64, 8, 11)
digest = hashlib.sha256()
for step in (0, 1, 57, 100000, 3):
    for value in stream.batch_at(step).values():
        digest.update(value.tobytes())
print(digest.hexdigest())
"""


def test_same_in_every_process(tmp_path):
    runs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("0", "1")
    }
    # Pinned: another machine, Python or NumPy must print the same.
    assert runs == {"50a37ccc47b4cf64b5311f9c0ccfbd5cfe92a15a3f0e9135e4df722ed01c943f\n"}


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_prefetch_yields_the_same_batches(prefetch):
    stream = Stream(make([30] * 50), 8, 4, 2)
    with stream.iterate(5, 40, prefetch=prefetch) as batches:
        got = list(batches)
    assert len(got) == 35
    assert all(equal(batch, stream.batch_at(step)) for batch, step in zip(got, range(5, 40), strict=True))
    part = next(stream.iterate(5, 6, prefetch=prefetch, rows=slice(1, 3)))
    assert equal(part, stream.batch_at(5, slice(1, 3)))
    assert list(stream.iterate(7, 7, prefetch=prefetch)) == []


def readers():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def wait_for_no_readers():
    until = time.monotonic() + 30  # a generous bound on a thread's end; it takes milliseconds
    while readers() and time.monotonic() < until:
        time.sleep(0.01)
    return not readers()


def test_iterator_closes_its_thread():
    stream = Stream(make([30] * 50), 8, 4, 2)
    batches = stream.iterate(0, 10**12)
    next(batches)
    assert readers()
    batches.close()
    batches.close()
    assert wait_for_no_readers()
    with pytest.raises(StopIteration):
        next(batches)
    list(stream.iterate(0, 20))
    assert wait_for_no_readers()


def test_an_error_in_reading_reaches_the_loop_and_ends_the_thread():
    class Vanishing(Stream):
        def batch_at(self, step, rows=slice(None)):
            if step == 3:
                raise OSError("the disk is gone")
            return super().batch_at(step, rows)

    seen = 0
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in Vanishing(make([30] * 50), 8, 4, 2).iterate(0, 10):
            seen += 1
    assert seen == 3
    assert wait_for_no_readers()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seq": 30}, r"data.seq is 30; the training documents hold 30 tokens together.*at most 29"),
        ({"seq": 0}, "seq is 0; it must be from 1"),
        ({"batch": 0}, "batch is 0; it must be from 1"),
        ({"seed": -1}, "seed is -1; it must be from 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be from 0"),
    ],
)
def test_bad_streams(change, words):
    with pytest.raises(ConfigError, match=words):
        Stream(**{"tokens": make([10, 20]), "seq": 4, "batch": 2, "seed": 0, **change})


def test_bad_steps():
    stream = Stream(make([10, 20]), 4, 2, 0)
    for call in (lambda: stream.batch_at(-1), lambda: stream.iterate(3, 2), lambda: stream.iterate(-1, 2)):
        with pytest.raises(ValueError, match="step"):
            call()
    with pytest.raises(ValueError, match="prefetch is -1"):
        stream.iterate(0, 1, prefetch=-1)


@settings(deadline=None)
@given(corpora, st.integers(1, 11), st.integers(1, 7), st.data())
def test_heldout_batches(sizes, seq, batch, data):
    tokens = make(sizes)
    available = (len(tokens) - 1) // seq
    sequences = data.draw(st.integers(1, available))
    batches = heldout_batches(tokens, seq, batch, sequences)
    assert len(batches) == -(-sequences // batch)
    assert all(b[k].shape == (batch, seq) for b in batches for k in KEYS)
    stacked = {k: np.concatenate([b[k] for b in batches]) for k in KEYS}
    assert not any(stacked[k][sequences:].any() for k in KEYS)
    rows = stacked["inputs"][:sequences, 0] // seq  # the first token of a row is its own place
    for i, row in enumerate(rows):
        for key, values in row_in_python(tokens, int(row), seq).items():
            assert stacked[key][i].tolist() == values
    # Even: row i lies in the i-th of equal spans of the corpus, so none is taken twice.
    assert [int(r) for r in rows] == [int((i + 0.5) * available / sequences) for i in range(sequences)]
    assert len(set(rows.tolist())) == sequences


@pytest.mark.parametrize("sequences", [0, 8])
def test_too_small_a_heldout_set(sequences):
    with pytest.raises(ConfigError, match=rf"eval.sequences is {sequences}; .* hold 7 rows .* from 1 to 7"):
        heldout_batches(make([10, 20]), 4, 2, sequences)
    with pytest.raises(ConfigError, match=r"data.seq is 64; the held-out documents hold 30 tokens"):
        heldout_batches(make([10, 20]), 64, 2, 1)
