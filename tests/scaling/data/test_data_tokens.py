import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.data import Stream, Tokens

offsets64 = lambda *values: np.array(values, np.int64)  # noqa: E731


@st.composite
def scattered(draw):
    """The same documents twice: scattered over shards, and laid end to end in memory."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.uint8, np.uint16, np.uint32]))
    sizes = draw(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=8), min_size=1, max_size=4))
    high = min(np.iinfo(dtype).max, 2**31 - 1)
    documents = [[rng.integers(0, high, n).astype(dtype) for n in shard] for shard in sizes]
    shards = [np.concatenate(shard) for shard in documents]
    flat = [d for shard in documents for d in shard]
    starts = np.cumsum([0, *map(len, flat)])[:-1]
    order = rng.permutation(len(flat))[: draw(st.integers(1, len(flat)))]
    offsets = np.cumsum([0, *(len(flat[d]) for d in order)], dtype=np.int64)
    together = np.concatenate([flat[d] for d in order])
    return Tokens(shards, offsets, starts[order].astype(np.int64)), Tokens(together, offsets)


@settings(deadline=None)
@given(scattered(), st.data())
def test_scattered_documents_read_as_if_laid_end_to_end(pair, data):
    there, here = pair
    assert len(there) == len(here) and there.documents == here.documents and there.dtype == here.dtype
    for d in range(here.documents):
        assert np.array_equal(there.document(d), here.document(d))
    length = data.draw(st.integers(1, len(here)))
    begin = np.array(data.draw(st.lists(st.integers(0, len(here) - length), min_size=1, max_size=5)))
    for a, b in zip(there.rows(begin, length), here.rows(begin, length), strict=True):
        assert np.array_equal(a, b)
    for i, b in enumerate(begin):
        assert np.array_equal(here.rows(begin, length)[0][i], here.shards[0][b : b + length])
    count = data.draw(st.integers(1, len(here)))
    cut = there.prefix(count)
    assert len(cut) == count
    whole = np.concatenate([cut.document(d) for d in range(cut.documents)])
    assert np.array_equal(whole, here.shards[0][:count])


def test_prefix_feeds_a_stream_with_just_those_tokens():
    tokens = Tokens(np.arange(100, dtype=np.uint16), offsets64(0, 30, 60, 100))
    stream = Stream(tokens.prefix(41), 10, 4, 0)
    assert sorted(stream.batch_at(0)["targets"].ravel()) == list(range(1, 41))


def test_a_memory_map_is_read_as_a_plain_array(tmp_path):
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "t.bin")
    tokens = Tokens(np.memmap(tmp_path / "t.bin", np.uint16, "r"), offsets64(0, 50))
    assert type(tokens.shards[0]) is np.ndarray and not tokens.shards[0].flags.owndata
    assert tokens.rows(np.array([7]), 3)[0].tolist() == [[7, 8, 9]]


@pytest.mark.parametrize(
    "shards, offsets, starts, words",
    [
        (np.zeros(4, np.int32), offsets64(0, 4), None, "uint8, uint16 or uint32"),
        (np.zeros((2, 2), np.uint8), offsets64(0, 4), None, "1-D"),
        ([np.zeros(2, np.uint8), np.zeros(2, np.uint16)], offsets64(0, 2), offsets64(0), "one dtype"),
        (np.zeros(4, np.uint8), np.array([0, 4], np.int32), None, "int64"),
        (np.zeros(4, np.uint8), offsets64(1, 4), None, "from 0"),
        (np.zeros(4, np.uint8), offsets64(0, 2, 2), None, "strictly"),
        (np.zeros(4, np.uint8), offsets64(0, 5), None, "one shard"),
        ([np.zeros(4, np.uint8)] * 2, offsets64(0, 4), None, "one shard"),
        (np.zeros(4, np.uint8), offsets64(0, 2), offsets64(0, 2), "starts is int64"),
        (np.zeros(4, np.uint8), offsets64(0, 2), offsets64(4), "within the 4 tokens"),
        (np.zeros(4, np.uint8), offsets64(0, 2), offsets64(-1), "within the 4 tokens"),
        ([np.zeros(4, np.uint8)] * 2, offsets64(0, 3), offsets64(2), "beyond the end of its shard"),
    ],
)
def test_bad_tokens(shards, offsets, starts, words):
    with pytest.raises(ValueError, match=words):
        Tokens(shards, offsets, starts)


def test_bad_places():
    tokens = Tokens(np.zeros(4, np.uint8), offsets64(0, 4))
    for d in (-1, 1):
        with pytest.raises(IndexError):
            tokens.document(d)
    for count in (0, 5):
        with pytest.raises(ValueError, match="between 1 and 4"):
            tokens.prefix(count)
