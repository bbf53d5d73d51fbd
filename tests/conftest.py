"""Shared by all tests: CPU only, a small corpus and a small study."""

import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import pytest
from tiny_study import tiny_study


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 60 text files, about 400 kB, with structure that a model can learn."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 8))) for _ in range(300)]
    for i in range(60):
        picked = rng.zipf(1.3, 1200) % len(words)
        lines = [" ".join(words[w] for w in picked[k : k + 10]) for k in range(0, 1200, 10)]
        (folder / f"{i:02d}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def study_config(corpus):
    """A study config of two budgets and three sizes that trains in seconds."""
    return tiny_study(corpus)


@pytest.fixture
def study_file(study_config, tmp_path):
    """The same as a JSON file."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(study_config))
    return path
