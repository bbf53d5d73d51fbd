"""Shards behind a remote file system: the same rows as on disk, fetched once, and little of it."""

import uuid

import fsspec
import numpy as np
import pytest

from scaling.config import ConfigError
from scaling.data import Stream, open_data, write_token_shards
from scaling.data.remote import RemoteFolder
from scaling.grid import absolute_path


def documents(count=200, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 1000, rng.integers(50, 150)) for _ in range(count)]


@pytest.fixture(params=[".npy", ".bin"])
def both(tmp_path, request):
    """One corpus on disk and in memory://: (folder, URL)."""
    local = tmp_path / "shards"
    write_token_shards(local, documents(), 1000, bytes_per_token=4.0, shard_tokens=5000, suffix=request.param)
    return local, upload(local)


def upload(local):
    url = f"memory://{uuid.uuid4().hex}/shards"
    fs, root = fsspec.core.url_to_fs(url)
    for path in local.iterdir():
        fs.pipe_file(f"{root}/{path.name}", path.read_bytes())
    return url


def section(path):
    return {"source": "tokens", "path": str(path), "heldout_fraction": 0.1, "seq": 20}


@pytest.fixture
def reads(monkeypatch):
    """The ranges that are fetched: (file's name, first byte, bytes)."""
    seen = []
    read = RemoteFolder.read

    def spied(self, name, begin=None, end=None):
        data = read(self, name, begin, end)
        seen.append((name, begin, len(data)))
        return data

    monkeypatch.setattr(RemoteFolder, "read", spied)
    return seen


def test_the_same_data_as_on_disk(both):
    local, remote = (open_data(section(path)) for path in both)
    assert remote.fingerprint == local.fingerprint and remote.bytes_per_token == 4.0
    a, b = (Stream(d.train, 20, 16, seed=5) for d in (local, remote))
    for step in range(2 * a.samples_per_epoch // 16):
        left, right = a.batch_at(step), b.batch_at(step)
        assert all(np.array_equal(left[k], right[k]) for k in left)
    for d in range(local.heldout.documents):
        assert np.array_equal(local.heldout.document(d), remote.heldout.document(d))
    assert np.array_equal(
        local.train.prefix(300).rows(np.array([0, 250]), 50)[0],
        remote.train.prefix(300).rows(np.array([0, 250]), 50)[0],
    )


def test_only_the_blocks_that_rows_need_are_fetched_and_once(both, reads, monkeypatch):
    monkeypatch.setattr("scaling.data.remote.RemoteFolder.tokens.__defaults__", (512,))
    dataset = open_data(section(both[1]))
    assert all(name.startswith("tokens") is False or size <= 4096 for name, _, size in reads)
    whole = sum(s.size for s in dataset.train.shards) * 2
    del reads[:]
    stream = Stream(dataset.train, 20, 4, seed=5)
    first = stream.batch_at(0)
    assert 0 < sum(size for _, _, size in reads) <= 4 * 3 * 2 * 512 < whole / 3
    assert all(size <= 512 for _, _, size in reads)
    del reads[:]
    again = Stream(open_data(section(both[1])).train, 20, 4, seed=5).batch_at(0)
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert not [r for r in reads if r[0].startswith("tokens") and r[2] == 512 and r[1]]  # from the cache


def test_slices_and_places_against_the_whole_array(both):
    name = next(p.name for p in sorted(both[0].iterdir()) if p.name.startswith("tokens"))
    path = both[0] / name
    whole = np.load(path) if name.endswith(".npy") else np.fromfile(path, "<u2")
    got = RemoteFolder(both[1]).tokens(name, np.dtype("<u2"), block_bytes=64)
    assert len(got) == whole.size and got.shape == whole.shape
    for b, e in [(0, 0), (0, 1), (31, 33), (32, 64), (5, whole.size), (whole.size - 1, whole.size)]:
        assert np.array_equal(got[b:e], whole[b:e])
    places = np.random.default_rng(0).integers(0, whole.size, (7, 13))
    assert np.array_equal(got[places], whole[places])
    with pytest.raises(IndexError):
        got[::2]


def test_without_digests_every_token_is_read_and_gives_the_same(tmp_path, reads):
    import json

    local = tmp_path / "old"
    write_token_shards(local, documents(), 1000, bytes_per_token=4.0, shard_tokens=5000)
    manifest = json.loads((local / "manifest.json").read_text())
    with_digests = open_data(section(upload(local))).fingerprint
    for shard in manifest["shards"]:
        del shard["digests"]
    (local / "manifest.json").write_text(json.dumps(manifest))
    del reads[:]
    assert open_data(section(upload(local))).fingerprint == with_digests
    assert sum(size for name, _, size in reads if name.startswith("tokens")) > 2 * sum(
        shard["count"] for shard in manifest["shards"]
    )


def test_changed_content_is_not_read_from_the_cache(tmp_path):
    local = tmp_path / "shards"
    write_token_shards(local, documents(), 1000, bytes_per_token=4.0)
    url = upload(local)
    first = open_data(section(url))
    before = first.train.document(0).copy()
    other = tmp_path / "other"
    write_token_shards(other, documents(seed=1), 1000, bytes_per_token=4.0)
    fs, root = fsspec.core.url_to_fs(url)
    for path in other.iterdir():
        fs.pipe_file(f"{root}/{path.name}", path.read_bytes())
    second = open_data(section(url))
    assert second.fingerprint != first.fingerprint
    assert not np.array_equal(second.train.document(0), before)


def test_file_urls_work_and_paths_of_urls_stay(both):
    local = open_data(section(both[0]))
    assert open_data(section(f"file://{both[0]}")).fingerprint == local.fingerprint
    assert absolute_path({"data": {"path": both[1]}})["data"]["path"] == both[1]


def test_bad_folders_are_named(both, tmp_path):
    with pytest.raises(ConfigError, match=r"memory://nothing/here/manifest\.json cannot be read"):
        open_data(section("memory://nothing/here"))
    with pytest.raises(ConfigError, match=r"pip install 'scaling\[cloud\]'"):
        open_data(section("nosuch://bucket/shards"))
    with pytest.raises(ConfigError, match="`scaling tokenize` makes shards"):
        open_data({**section(both[1]), "source": "text"})
    fs, root = fsspec.core.url_to_fs(both[1])
    name = next(n for n in fs.ls(root, detail=False) if "tokens-00000" in n)
    fs.pipe_file(name, fs.cat_file(name)[:-2])
    with pytest.raises(ConfigError, match="tokens-00000"):
        open_data(section(both[1]))
    fs.rm_file(name)
    with pytest.raises(ConfigError, match=r"that manifest\.json names cannot be read"):
        open_data(section(both[1]))
