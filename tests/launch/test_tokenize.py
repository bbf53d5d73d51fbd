"""``scaling tokenize``: exact round trips, byte counts, and shards that a study can open."""

import gzip
import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from launch import tokenize as work
from launch.cli import cli
from scaling.config import ConfigError
from scaling.data import open_data

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra data: pip install '.[data]'")

WORDS = ["scaling", "law", "loss", "model", "Größe", "token", "\u6a21\u578b", "batch", "rate", "\n", "the"]


def texts(count=60, seed=0):
    rng = np.random.default_rng(seed)
    return [f"{i} " + " ".join(rng.choice(WORDS, rng.integers(20, 60))) for i in range(count)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Text files, one compressed, and JSON lines with an empty document: 60 documents in all."""
    monkeypatch.setenv("SCALING_CACHE", str(tmp_path / "cache"))
    made, inside = texts(), tmp_path / "in" / "deep"
    inside.mkdir(parents=True)
    for i in range(20):
        (inside / f"{i:02d}.txt").write_text(made[i], newline="")
    lines = [json.dumps({"text": t, "id": i}) for i, t in enumerate([*made[20:40], ""])]
    (inside / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    with gzip.open(inside / "b.jsonl.gz", "wt") as f:
        f.write("\n".join(json.dumps({"text": t}) for t in made[40:]))
    (inside / "ignored.bin").write_bytes(b"\xff")
    (inside / ".hidden.txt").write_text("hidden")
    return tmp_path / "in"


def run(*args):
    result = CliRunner().invoke(
        cli, ["tokenize", *map(str, args)], catch_exceptions=False, standalone_mode=False
    )
    return result.output


def decoded(out):
    """Every document of the shards: its text without special tokens, its ids, its recorded bytes."""
    made = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    manifest = json.loads((out / "manifest.json").read_text())
    for shard in manifest["shards"]:
        tokens, ends = np.load(out / shard["tokens"]), np.load(out / shard["documents"])
        for b, e, size in zip(ends[:-1], ends[1:], np.load(out / shard["bytes"]), strict=True):
            yield made.decode(tokens[b:e].tolist(), skip_special_tokens=True), tokens[b:e].tolist(), int(size)


def test_every_document_comes_back_exactly(folder, tmp_path):
    out = tmp_path / "out"
    done = json.loads(run(folder, "--out", out, "--vocab", 400, "--end", "--shard-tokens", 700, "--json"))
    got = list(decoded(out))
    assert sorted(text for text, _, _ in got) == sorted(texts())
    assert all(size == len(text.encode()) for text, _, size in got)
    end = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).token_to_id("<|endoftext|>")
    assert all(ids[-1] == end and end not in ids[:-1] for _, ids, _ in got)
    assert done["documents"] == 60 and done["tokens"] == sum(len(ids) for _, ids, _ in got)
    assert done["vocab"] <= 400 and done["bytes_per_token"] == pytest.approx(
        sum(size for _, _, size in got) / done["tokens"]
    )
    assert len(list(out.glob("tokens-*.npy"))) > 2


def test_a_study_opens_the_shards(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, "--out", out, "--vocab", 300, "--begin")
    dataset = open_data({"source": "tokens", "path": str(out), "heldout_fraction": 0.2, "seq": 16})
    manifest = json.loads((out / "manifest.json").read_text())
    assert dataset.vocab == manifest["vocab"] == 300
    assert dataset.describe()["tokenizer"] == manifest["tokenizer"] and len(manifest["tokenizer"]) == 32
    assert dataset.describe()["bytes_per_token_of"] == "heldout"
    begins = {int(dataset.train.document(d)[0]) for d in range(dataset.train.documents)}
    assert len(begins) == 1  # every document begins with the token


def test_a_loaded_tokenizer_gives_the_same_shards_and_fingerprint(folder, tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"
    run(folder, "--out", first, "--vocab", 350, "--end", "<end>")
    run(folder, "--out", second, "--tokenizer", first / "tokenizer.json", "--end", "<end>")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    with pytest.raises(ConfigError, match="--begin is '<no>', which the tokenizer does not have"):
        run(folder, "--out", tmp_path / "three", "--tokenizer", first / "tokenizer.json", "--begin", "<no>")


def test_text_that_spells_a_special_token_stays_text(tmp_path):
    spelled = "before <|endoftext|> after"
    done = work.tokenize(lambda: [spelled, *texts(5)], tmp_path / "out", vocab=300, end="<|endoftext|>")
    text, ids, size = next(decoded(tmp_path / "out"))
    assert text == spelled and size == len(spelled) and ids.count(ids[-1]) == 1 and done["documents"] == 6


@pytest.mark.slow  # importing datasets takes seconds
def test_the_hub_loader_streams_a_local_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read at the import: nothing is asked of a network
    pytest.importorskip("datasets", reason="needs the extra data: pip install '.[data]'")
    import pandas as pd

    pd.DataFrame({"body": texts(12)}).to_parquet(tmp_path / "rows.parquet")
    local = tmp_path / "hub"
    local.mkdir()
    (tmp_path / "rows.parquet").rename(local / "train-00000.parquet")
    assert list(work.read_hub(str(local), None, "train", "body", None)) == texts(12)
    out = tmp_path / "out"
    run("--hub", local, "--field", "body", "--limit", 5, "--out", out, "--vocab", 300)
    assert [text for text, _, _ in decoded(out)] == texts(12)[:5]
    with pytest.raises(ConfigError, match="--field 'text' must name a text"):
        list(work.read_hub(str(local), None, "train", "text", None))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(work.read_hub(str(tmp_path / "nowhere"), None, "train", "text", None))


@pytest.mark.parametrize("package", ["tokenizers", "datasets"])
def test_a_missing_package_names_the_extra(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'scaling\[data\]'"):
        if package == "datasets":
            list(work.read_hub("x", None, "train", "text", None))
        else:
            work.tokenize(lambda: texts(3), tmp_path / "out", vocab=300)


def test_bad_input_is_named(folder, tmp_path):
    def fails(said, *args):
        with pytest.raises(ConfigError, match=said):
            run(*args, "--out", tmp_path / "out")

    fails("--vocab is 200; it must be at least 257", folder, "--vocab", 200, "--end")
    fails("give one of --tokenizer", folder)
    fails("give one of PATHS", "--vocab", 300)
    fails("does not exist", tmp_path / "nothing", "--vocab", 300)
    (tmp_path / "empty").mkdir()
    fails("holds no file ending in", tmp_path / "empty", "--vocab", 300)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"txt": "b"}\n')
    fails("line 2: must be a JSON mapping with the key 'text'", bad, "--vocab", 300)
    bad.write_text('{"text": 5}\n')
    fails("line 1: 'text' is int", bad, "--vocab", 300)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    fails("is not UTF-8", tmp_path / "bad.txt", "--vocab", 300)
    (tmp_path / "bad.json").write_text("{}")
    fails("is not a tokenizer.json", folder, "--tokenizer", tmp_path / "bad.json")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "manifest.json").write_text("{}")
    fails("holds shards already", folder, "--vocab", 300)
