import errno
import os
import shutil
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from scaling.config import ConfigError
from scaling.data import open_data
from scaling.data.cache import cache_root, cached


def open_text(folder):
    return open_data({"source": "text", "path": str(folder), "heldout_fraction": 0.2})


def entry(cache):
    (name,) = [n for n in folders(cache) if not n.startswith(".")]
    return cache / "data" / name


def folders(cache):
    """Everything in the cache but its lock files."""
    return [p.name for p in (cache / "data").iterdir() if p.is_dir()]


def test_the_second_open_reads_the_cache(text_folder, cache, monkeypatch):
    first = open_text(text_folder)

    def never(*args, **kwargs):
        raise AssertionError("built twice")

    monkeypatch.setattr("scaling.data.text.build_bytes", never)
    second = open_text(text_folder)
    assert second.fingerprint == first.fingerprint and second.describe() == first.describe()
    assert np.array_equal(second.train.shards[0], first.train.shards[0])


def test_where_the_cache_lies(monkeypatch, tmp_path):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("SCALING_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "scaling"


@pytest.mark.parametrize(
    "name", ["train.bin", "heldout.bin", "train_offsets.npy", "heldout_offsets.npy", "entry.json"]
)
@pytest.mark.parametrize("damage", ["cut", "emptied", "one byte", "removed"])
def test_a_damaged_entry_is_built_again(text_folder, cache, name, damage):
    first = open_text(text_folder)
    path = entry(cache) / name
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    else:
        if damage == "one byte":
            content[0 if name == "entry.json" else len(content) // 2] ^= 1
        path.write_bytes({"cut": content[:-1], "emptied": b"", "one byte": content}[damage])
    with pytest.warns(UserWarning, match="the cached data in .* building them again"):
        second = open_text(text_folder)
    assert second.fingerprint == first.fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third = open_text(text_folder)
    for a, b in ((second, third), (first, third)):
        # The first dataset still maps the file that was damaged, unless the damage was made aside of it.
        if a is not first or name != "train.bin":
            assert np.array_equal(a.train.shards[0], b.train.shards[0])
    assert folders(cache) == [entry(cache).name]


def test_sizes_alone_are_checked_where_the_content_is_too_large(text_folder, cache, monkeypatch):
    open_text(text_folder)
    monkeypatch.setattr("scaling.data.cache._CHECKED_BYTES", 0)
    path = entry(cache) / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="building them again"):
        open_text(text_folder)


PROGRAM = """
import sys, time
from pathlib import Path
from scaling.data import open_data, text
folder, here, ready, built = sys.argv[1], *map(Path, sys.argv[2:])
build = text.build_bytes
def build_and_tell(*args, **kwargs):
    with open(built, "a") as f:
        f.write("built\\n")
    time.sleep(0.1)  # long enough for the others to come to the lock
    return build(*args, **kwargs)
text.build_bytes = build_and_tell
here.touch()
while not ready.exists():
    time.sleep(0.001)
data = open_data({"source": "text", "path": folder, "heldout_fraction": 0.2})
print(data.fingerprint, int(data.train.shards[0].astype(int).sum()))
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_of_several_processes_one_builds(text_folder, cache, tmp_path, damaged):
    if damaged:
        open_text(text_folder)
        (entry(cache) / "train.bin").write_bytes(b"damaged")
    go, built = tmp_path / "go", tmp_path / "built"
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path), "PYTHONWARNINGS": "ignore"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, (text_folder, tmp_path / f"here{i}", go, built))],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=tmp_path,
        )
        for i in range(4)
    ]
    while not all((tmp_path / f"here{i}").exists() for i in range(4)):
        assert all(w.poll() is None for w in workers)
        time.sleep(0.01)
    go.touch()
    said = {w.communicate()[0] for w in workers}
    assert [w.returncode for w in workers] == [0] * 4
    assert built.read_text() == "built\n"
    data = open_text(text_folder)
    assert said == {f"{data.fingerprint} {int(data.train.shards[0].astype(int).sum())}\n"}
    assert folders(cache) == [entry(cache).name]


def test_a_killed_builder_frees_the_lock_and_leaves_no_entry(text_folder, cache, tmp_path):
    here, go, built = (tmp_path / name for name in ("here", "go", "built"))
    go.touch()
    program = PROGRAM.replace("time.sleep(0.1)", "time.sleep(600)")
    worker = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, (text_folder, here, go, built))],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        cwd=tmp_path,
    )
    while not built.exists():
        assert worker.poll() is None
        time.sleep(0.01)
    worker.kill()
    worker.wait()
    assert len(folders(cache)) == 1 and folders(cache)[0].startswith(".")
    assert open_text(text_folder).describe()["files"] == 40


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConfigError("bad data")])
def test_a_failed_build_leaves_nothing(cache, error):
    def build(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        cached("k", build)
    assert folders(cache) == []


def test_a_full_disk(cache):
    def build(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "x"))

    with pytest.raises(
        ConfigError, match=r"the data cache failed: the disk is full.*SCALING_CACHE names another"
    ):
        cached("k", build)
    assert folders(cache) == []


def test_an_unwritable_cache(tmp_path, monkeypatch, text_folder):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("SCALING_CACHE", str(file))
    with pytest.raises(
        ConfigError, match=r"the data cache failed: .*file.* cannot be written.*SCALING_CACHE"
    ):
        open_text(text_folder)


def test_what_killed_builders_left_is_removed_after_a_day(cache):
    old, new = cache / "data" / ".k.1.old", cache / "data" / ".k.2.new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "half").write_text("half")
    os.utime(old, (time.time() - 90_000,) * 2)
    cached("k", lambda folder: {})
    assert not old.exists() and new.exists()


def test_a_cached_file_in_use_survives_replacement(text_folder, cache):
    data = open_text(text_folder)
    before = data.train.shards[0].tobytes()
    shutil.rmtree(entry(cache))
    open_text(text_folder)
    assert data.train.shards[0].tobytes() == before
