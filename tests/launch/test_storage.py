"""Storage that fails: a full disk, a folder that cannot be written. Nothing is lost, one sentence is said."""

import contextlib
import json
import subprocess

import pytest
from click.testing import CliRunner

from launch.cli import cli
from scaling.config import validate_cell
from scaling.files import CellFolder, StudyError, read_json, write_json
from scaling.train import Execution, train


@contextlib.contextmanager
def tmpfs(path, options):
    """A small file system of our own; skips where it cannot be mounted."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip(f"mounting a small tmpfs needs root: {made.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def cell(corpus):
    return validate_cell(
        {
            "model": {"d_model": 64, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 16, "ffn_dim": 176},
            "data": {"source": "text", "path": str(corpus), "seq": 32},
            "optim": {"lr": 1e-2},
            "schedule": {"warmup_steps": 2},
            "train": {"batch": 2, "steps": 12},
            "eval": {"sequences": 8},
        }
    )


def test_full_disk_then_room(cell, tmp_path):
    whole = CellFolder(tmp_path / "whole", "c")
    train(cell, whole, Execution(checkpoint_steps=3))
    with tmpfs(tmp_path / "small", "size=1200k") as disk:
        folder = CellFolder(disk / "study", "c")
        with pytest.raises(StudyError, match="disk is full"):
            train(cell, folder, Execution(checkpoint_steps=3))
        assert not folder.result.exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        train(cell, folder, Execution(checkpoint_steps=3))
        assert folder.result.read_bytes() == whole.result.read_bytes()
        assert folder.metrics.read_bytes() == whole.metrics.read_bytes()


def test_read_only_folder(cell, tmp_path):
    with tmpfs(tmp_path / "ro", "ro") as disk, pytest.raises(StudyError, match="cannot be written"):
        train(cell, CellFolder(disk / "study", "c"))


def test_a_file_where_the_folder_should_be(cell, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written"):
        train(cell, CellFolder(tmp_path / "file", "c"))


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1} and len(list(tmp_path.iterdir())) == 1
    with tmpfs(tmp_path / "small", "size=64k") as disk:
        write_json(disk / "x.json", {"a": 1})
        with pytest.raises(StudyError, match="disk is full"):
            write_json(disk / "x.json", {"a": "b" * 10**6})
        assert json.loads((disk / "x.json").read_text()) == {"a": 1}
        assert [p.name for p in disk.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "words",
    [
        ("status", "gs://bucket/study"),
        ("run", "s3://bucket/study"),
        ("launch", "tiny.json", "--study", "gs://bucket/study"),
        ("plan", "tiny.json", "--study", "gs://bucket/study"),
    ],
)
def test_a_study_in_a_bucket_is_refused_and_it_is_said_where_it_may_lie(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2 and "'" + words[-1] + "' is a URL" in done.output
    assert "NFS" in done.output and "copy it to the bucket" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())  # no folder of the name gs:
