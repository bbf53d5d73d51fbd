import itertools
import json
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.config import ConfigError
from scaling.data import Stream, open_data, write_token_shards


def make_documents(seed=0, count=60, vocab=1000, longest=80):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, int(rng.integers(1, longest))) for _ in range(count)]


def open_tokens(folder, **changes):
    return open_data({"source": "tokens", "path": str(folder), "heldout_fraction": 0.2, **changes})


def contents(tokens):
    return [tuple(tokens.document(d).tolist()) for d in range(tokens.documents)]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10**6),
    st.sampled_from(
        [("uint16", 1000), ("uint32", 1000), ("uint32", 2**31 - 1), (None, 2**16), (None, 2**16 + 1)]
    ),
    st.sampled_from([".npy", ".bin"]),
    st.sampled_from([1, 300, 10**9]),
)
def test_what_is_written_is_read(tmp_path_factory, seed, kind, suffix, shard_tokens):
    folder = tmp_path_factory.mktemp("shards")
    dtype, vocab = kind
    documents = [*make_documents(seed, vocab=vocab), [vocab - 1, 0]]
    write_token_shards(
        folder, documents, vocab, bytes_per_token=3.5, dtype=dtype, shard_tokens=shard_tokens, suffix=suffix
    )
    data = open_tokens(folder)
    expected = np.uint16 if dtype == "uint16" or (dtype is None and vocab == 2**16) else np.uint32
    assert data.train.dtype == data.heldout.dtype == expected
    train, heldout = contents(data.train), contents(data.heldout)
    assert Counter(train + heldout) == Counter(tuple(map(int, d)) for d in documents)
    assert not set(train) & set(heldout)
    assert 0 < len(data.heldout) <= 0.2 * sum(map(len, documents))
    assert (data.vocab, data.bytes_per_token) == (vocab, 3.5)
    shards = {1: len(documents), 10**9: 1}.get(shard_tokens, data.describe()["shards"])
    assert data.describe()["shards"] == shards == len(data.train.shards)


def test_format_on_disk_does_not_change_the_data(tmp_path):
    """Shard size and file format leave the split alone; only the order of documents' numbers enters."""
    documents = make_documents()
    opened = []
    for i, (suffix, size) in enumerate(((".npy", 10**9), (".bin", 200), (".npy", 1))):
        folder = tmp_path / str(i)
        write_token_shards(folder, documents, 1000, bytes_per_token=4, suffix=suffix, shard_tokens=size)
        opened.append(open_tokens(folder))
    assert len({data.fingerprint for data in opened}) == 1
    streams = [Stream(data.train, 16, 4, 0) for data in opened]
    for step in (0, 1, 1000):
        batches = [stream.batch_at(step) for stream in streams]
        for other in batches[1:]:
            assert all(np.array_equal(batches[0][k], other[k]) for k in other)


def test_copies_fall_on_one_side_and_apart(tmp_path):
    documents = make_documents(count=30, longest=8)
    write_token_shards(tmp_path / "s", documents * 5, 1000, bytes_per_token=4)
    for seed in range(5):
        data = open_tokens(tmp_path / "s", seed=seed)
        train = contents(data.train)
        assert not set(train) & set(contents(data.heldout))
        assert data.describe()["copied_documents"] == 150 - len({tuple(d) for d in documents})
        # Five copies side by side would be 4 of 5 neighbours; a random order makes 4 of some 120.
        assert sum(a == b for a, b in itertools.pairwise(train)) < len(train) / 5


def test_seed_and_fingerprint(tmp_path):
    documents = make_documents()
    write_token_shards(tmp_path / "a", documents, 1000, bytes_per_token=4)
    first = open_tokens(tmp_path / "a")
    assert open_tokens(tmp_path / "a").fingerprint == first.fingerprint
    assert open_tokens(tmp_path / "a", seed=1).fingerprint != first.fingerprint
    assert contents(open_tokens(tmp_path / "a", seed=1).heldout) != contents(first.heldout)
    documents[7] = documents[7].copy()
    documents[7][0] = (documents[7][0] + 1) % 1000
    write_token_shards(tmp_path / "b", documents, 1000, bytes_per_token=4)
    assert open_tokens(tmp_path / "b").fingerprint != first.fingerprint
    with pytest.raises(ConfigError, match=r"data.fingerprint is"):
        open_tokens(tmp_path / "b", fingerprint=first.fingerprint)


def test_fingerprint_covers_every_token(tmp_path):
    # Documents of one size: neither the split nor the offsets can tell the change.
    documents = np.random.default_rng(0).integers(0, 1000, (30, 20))
    seen = set()
    for change in range(4):
        documents[change, 5] = (documents[change, 5] + 1) % 1000
        write_token_shards(tmp_path / str(change), list(documents), 1000, bytes_per_token=4)
        seen.add(open_tokens(tmp_path / str(change)).fingerprint)
    assert len(seen) == 4


def test_a_change_after_the_first_open_is_seen(shards):
    before = open_tokens(shards).fingerprint
    path = shards / "tokens-00000.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[3] = (tokens[3] + 1) % 1000
    tokens.tofile(path)
    os.utime(path, (1, 1))  # a write within the clock's resolution keeps the time, and would not be seen
    assert open_tokens(shards).fingerprint != before
    tokens[3] = 1000
    tokens.tofile(path)
    os.utime(path, (2, 2))
    refused(shards, "holds the token id 1000")


def test_unique_tokens(tmp_path):
    write_token_shards(tmp_path / "s", make_documents(), 1000, bytes_per_token=4, shard_tokens=100)
    whole, part = open_tokens(tmp_path / "s"), open_tokens(tmp_path / "s", unique_tokens=333)
    flat = np.concatenate([whole.train.document(d) for d in range(whole.train.documents)])
    cut = np.concatenate([part.train.document(d) for d in range(part.train.documents)])
    assert np.array_equal(cut, flat[:333])


def test_bytes_per_token_of_the_heldout_documents(tmp_path):
    documents = make_documents()
    told = {tuple(map(int, d)): 2 * len(d) + i for i, d in enumerate(documents)}
    for name, size in (("one", 10**9), ("many", 100)):
        write_token_shards(
            tmp_path / name, documents, 1000, document_bytes=list(told.values()), shard_tokens=size
        )
        data = open_tokens(tmp_path / name)
        held = contents(data.heldout)
        assert data.bytes_per_token == sum(told[d] for d in held) / sum(map(len, held))
        assert data.describe()["bytes_per_token_of"] == "heldout"
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["bytes_per_token"] == sum(told.values()) / sum(map(len, documents))


@pytest.fixture
def shards(tmp_path):
    """Forty documents in .bin shards, two or more."""
    folder = tmp_path / "shards"
    documents = make_documents(count=40)
    half = sum(map(len, documents[:20]))
    write_token_shards(folder, documents, 1000, document_bytes=[7] * 40, shard_tokens=half, suffix=".bin")
    return folder


def edit(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    for key, value in changes.items():
        if value is None:
            del manifest[key]
        else:
            manifest[key] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(folder, words):
    with pytest.raises(ConfigError, match=words):
        open_tokens(folder)


def test_manifest_errors(shards):
    good = (shards / "manifest.json").read_text()
    first = json.loads(good)["shards"][0]
    for changes, words in (
        ({"colour": "red"}, r"unknown key 'colour'"),
        ({"vocabs": 5}, r"unknown key 'vocabs'; did you mean 'vocab'"),
        ({"format": "other"}, "format is 'other'; it must be 'token-shards'"),
        ({"version": 2}, "version is 2; it must be 1"),
        ({"dtype": "int64"}, "dtype is 'int64'; it must be 'uint16' or 'uint32'"),
        ({"dtype": None}, "dtype is None; it must be 'uint16' or 'uint32'"),
        ({"dtype": ["uint16"]}, r"dtype is \['uint16'\]; it must be"),
        ({"vocab": 0}, "vocab is 0; it must be a positive integer"),
        ({"vocab": True}, "vocab is True; it must be a positive integer"),
        ({"vocab": 70000}, "vocab is 70000; it must be a positive integer whose ids fit uint16"),
        ({"bytes_per_token": 0}, "bytes_per_token is 0; it must be a positive number"),
        ({"bytes_per_token": float("nan")}, "bytes_per_token is nan; it must be a positive number"),
        ({"shards": []}, r"shards is \[\]; it must be a list of shards"),
        ({"shards": [5]}, r"shards\[0\] is 5; it must be a mapping"),
        ({"shards": [{**first, "size": 1}]}, r"shards\[0\] has an unknown key 'size'"),
        ({"shards": [{**first, "count": -1}]}, r"shards\[0\].count is -1; it must be a positive integer"),
        ({"shards": [{**first, "tokens": 3}]}, r"shards\[0\].tokens is 3; it must be a file's name"),
        (
            {"shards": [{**first, "tokens": "a.zip"}]},
            r"shards\[0\].tokens is 'a.zip'; it must be .npy or .bin",
        ),
        ({"shards": [{**first, "bytes": 3}]}, r"shards\[0\].bytes is 3; it must be a file's name"),
    ):
        edit(shards, **changes)
        refused(shards, words)
        (shards / "manifest.json").write_text(good)
    (shards / "manifest.json").write_text(good[:-30])
    refused(shards, "manifest.json is not valid JSON")
    (shards / "manifest.json").write_text("[]")
    refused(shards, "the manifest is 'list'; it must be a mapping")
    (shards / "manifest.json").unlink()
    refused(shards, r"it must be a folder of token shards with a manifest.json \(No such file")


def test_a_shard_shorter_than_its_manifest(shards):
    open_tokens(shards)  # the cached index must not hide the damage
    path = shards / "tokens-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    refused(
        shards, r"tokens-00001.bin holds \d+ tokens of uint16; the manifest says \d+, and both must agree"
    )
    path.write_bytes(path.read_bytes()[:-1])
    refused(shards, r"tokens-00001.bin holds \d+ bytes; it must hold whole uint16 tokens")
    path.write_bytes(b"")
    refused(shards, "tokens-00001.bin holds 0 bytes; it must hold whole uint16 tokens")


def test_a_file_that_vanished(shards):
    open_tokens(shards)
    for name in ("tokens-00000.bin", "documents-00001.npy", "bytes-00000.npy"):
        held = (shards / name).read_bytes()
        (shards / name).unlink()
        refused(shards, rf"{name}' that manifest.json names cannot be read \(No such file")
        (shards / name).write_bytes(held)


def test_a_wrong_dtype(shards, tmp_path):
    edit(shards, dtype="uint32")
    refused(shards, "tokens-00000.bin holds .* uint32 tokens|tokens of uint32; the manifest says")
    folder = tmp_path / "npy"
    write_token_shards(folder, make_documents(), 1000, bytes_per_token=4)
    tokens = np.load(folder / "tokens-00000.npy")
    for wrong in (tokens.astype(np.int32), tokens.astype(">u2"), tokens[None]):
        np.save(folder / "tokens-00000.npy", wrong)
        refused(folder, "tokens-00000.npy holds .*; the manifest says uint16 in one dimension")
    np.save(folder / "tokens-00000.npy", tokens)
    whole = (folder / "tokens-00000.npy").read_bytes()
    (folder / "tokens-00000.npy").write_bytes(whole[:-10])
    refused(folder, "tokens-00000.npy is not a whole .npy file")


def test_an_id_beyond_the_vocabulary(shards):
    path = shards / "tokens-00001.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[5] = 1000
    tokens.tofile(path)
    refused(
        shards, r"tokens-00001.bin holds the token id 1000 \(document \d+\); ids must be below vocab = 1000"
    )


def test_wrong_document_offsets(shards):
    path = shards / "documents-00001.npy"
    offsets = np.load(path)
    for wrong, words in (
        (offsets[:-1], "must increase strictly from 0 to the shard's"),
        (offsets[1:], "must increase strictly from 0"),
        (np.insert(offsets, 3, offsets[3]), "must increase strictly from 0"),
        (np.zeros(0, np.int64), "must increase strictly from 0"),
        (offsets.astype(np.int32), "holds int32 .*; it must hold document offsets as int64"),
        (offsets[None], "it must hold document offsets as int64"),
    ):
        np.save(path, wrong)
        refused(shards, words)
    np.save(path, offsets)
    counts = np.load(shards / "bytes-00001.npy")
    for wrong, words in (
        (counts[1:], "it must hold the bytes of each document"),
        (-counts, "holds -7; counts"),
    ):
        np.save(shards / "bytes-00001.npy", wrong)
        refused(shards, words)
    for path in shards.glob("bytes-*.npy"):
        np.save(path, np.zeros_like(np.load(path)))
    refused(shards, "the held-out documents hold 0 bytes of text")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"documents": []}, "documents is empty"),
        ({"documents": [[1, 2], []]}, r"document 1 is float64 \(0,\); it must be a 1-D array of integers"),
        ({"documents": [[1.5]]}, "document 0 is float64"),
        ({"documents": [[[1]]]}, "document 0 is int64 .1, 1."),
        (
            {"documents": [[1], [3, 10]]},
            "document 1 holds the token id 10; ids must be from 0 to vocab - 1 = 9",
        ),
        ({"documents": [[-1, 3]]}, "document 0 holds the token id -1"),
        ({"vocab": 0}, "vocab is 0"),
        ({"vocab": 70000, "dtype": "uint16"}, "vocab is 70000 with dtype 'uint16'"),
        ({"vocab": 2**31}, "vocab is 2147483648"),
        ({"dtype": "int32"}, "with dtype 'int32'"),
        ({"suffix": ".txt"}, "suffix is '.txt'"),
        ({"bytes_per_token": None}, "bytes_per_token or document_bytes must be given"),
        ({"document_bytes": [1]}, "bytes_per_token or document_bytes must be given, and not both"),
        ({"bytes_per_token": None, "document_bytes": [3]}, "document_bytes gives None for document 1"),
        ({"bytes_per_token": None, "document_bytes": [3, -1]}, "document_bytes gives -1 for document 1"),
        ({"bytes_per_token": -2.0}, "bytes_per_token is -2.0"),
    ],
)
def test_writer_refuses(tmp_path, changes, words):
    good = {"documents": [[1, 2], [3]], "vocab": 10, "bytes_per_token": 4.0}
    with pytest.raises(ConfigError, match=words):
        write_token_shards(tmp_path / "s", **{**good, **changes})
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_writer_does_not_overwrite(tmp_path):
    write_token_shards(tmp_path, [[1, 2]], 10, bytes_per_token=4)
    with pytest.raises(ConfigError, match="which holds a manifest already; it must be a new folder"):
        write_token_shards(tmp_path, [[1, 2]], 10, bytes_per_token=4)
