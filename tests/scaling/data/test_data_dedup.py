import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leaks import longest_shared_passage

from scaling.data import dedup
from scaling.data.dedup import fingerprints, unrepeated_spans


def letters(seed, size):
    return np.random.default_rng(seed).integers(97, 123, size).astype(np.uint8).tobytes()


def kept(documents):
    return [
        [text[b:e] for b, e in spans]
        for text, spans in zip(documents, unrepeated_spans(documents), strict=True)
    ]


def window_hash_in_python(window):
    """The window hash, one window at a time."""
    m64 = 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & m64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & m64
        return x ^ (x >> 31)

    codes = [mix(((b + 1) * 0x9E3779B97F4A7C15) & m64) for b in range(256)]
    values, width = [codes[b] for b in window], 1
    while len(values) > 1:
        joined = [(a * (codes[width] | 1) + b) & m64 for a, b in zip(values[::2], values[1::2], strict=True)]
        values, width = [x ^ (x >> 29) for x in joined], 2 * width
    return mix(values[0])


def fingerprints_in_python(text):
    """Winnowing as its paper states it: the least hashes of every 73 successive windows."""
    hashes = [window_hash_in_python(text[i : i + 128]) for i in range(len(text) - 127)]
    chosen = {
        i for j in range(len(hashes) - 72) for i in range(j, j + 73) if hashes[i] == min(hashes[j : j + 73])
    }
    return {i: hashes[i] for i in sorted(chosen)}


@pytest.mark.parametrize("chunk", [1, 50, 1 << 16])
def test_fingerprints_are_the_least_hashes_of_73_windows(monkeypatch, chunk):
    monkeypatch.setattr(dedup, "_CHUNK", chunk)
    for text in (letters(0, 700), letters(1, 200), b"ab" * 150, letters(2, 150) * 3):
        hashes, places = fingerprints(np.frombuffer(text, np.uint8))
        assert dict(zip(places.tolist(), hashes.tolist(), strict=True)) == fingerprints_in_python(text)
    assert fingerprints(np.frombuffer(letters(0, 199), np.uint8))[0].size == 0


@st.composite
def overlapping_documents(draw):
    """Documents put together from a few shared passages of many lengths, and text of their own."""
    pool = [letters(i, n) for i, n in enumerate((150, 199, 200, 201, 260, 500))]
    documents = []
    for d in range(draw(st.integers(2, 6))):
        parts = []
        for p in range(draw(st.integers(1, 4))):
            if draw(st.booleans()):
                source = draw(st.sampled_from(pool))
                cut = draw(st.integers(0, 60))
                parts.append(source[cut:])
            else:
                parts.append(letters(1000 + 10 * d + p, draw(st.integers(0, 400))))
        documents.append(b"".join(parts))
    return documents


@settings(deadline=None, max_examples=200)
@given(overlapping_documents())
def test_no_two_documents_share_200_bytes(documents):
    pieces = kept(documents)
    for d, text in enumerate(documents):
        spans = unrepeated_spans(documents)[d]
        assert all(0 <= b < e <= len(text) for b, e in spans)
        assert all(e <= b for (_, e), (b, _) in itertools.pairwise(spans))
        for other in pieces[:d]:
            assert longest_shared_passage(pieces[d], other) == b""
    # The first document that is not empty keeps all of itself: nothing stands before it.
    first = next((d for d, text in enumerate(documents) if text), None)
    if first is not None:
        assert pieces[first] == [documents[first]]


def test_only_the_repeat_is_removed():
    shared, own = letters(1, 1000), [letters(2, 3000), letters(3, 2000), letters(4, 2500)]
    pieces = kept([own[0] + shared, own[1] + shared + own[2]])
    assert pieces[0] == [own[0] + shared]
    # Windows of 128 bytes at chosen places cover the passage but for fewer than 73 bytes at either end.
    before, after = pieces[1]
    assert before.startswith(own[1]) and 0 <= len(before) - len(own[1]) < 73
    assert after.endswith(own[2]) and 0 <= len(after) - len(own[2]) < 73


def test_copies_headers_and_short_documents():
    text, header = letters(1, 5000), letters(2, 600)
    assert kept([text, text]) == [[text], []]
    assert kept([text, text[1000:2000]]) == [[text], []]  # contained whole in an earlier document
    assert kept([b"short", b"short", b"shorter"]) == [[b"short"], [], [b"shorter"]]
    assert kept([b"", b"x"]) == [[], [b"x"]]
    assert kept([]) == []
    documents = [header + letters(i, 1000) for i in range(10, 20)]
    for d, pieces in enumerate(kept(documents)[1:], 1):
        assert len(pieces) == 1 and documents[d].endswith(pieces[0]) and 1000 <= len(pieces[0]) < 1073


def test_repeats_within_a_document_stay():
    text = letters(1, 400) * 4
    assert kept([text, letters(2, 500)])[0] == [text]
    # ... and all of them go where an earlier document holds the passage.
    assert kept([letters(1, 400), text])[1] == []


def test_the_check_itself_sees_a_leak():
    a, b = letters(1, 1000), letters(2, 1000)
    assert longest_shared_passage([a + b], [letters(3, 77) + a[300:550]]) == a[300:550]
    assert longest_shared_passage([a + b], [a[300:499]]) == b""
