"""A cache folder of the tests' own, and folders of text made from a seed."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Each test builds into its own cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SCALING_CACHE", str(folder))
    return folder


@pytest.fixture
def text_folder(tmp_path):
    """Forty files of 500 to 1,500 random letters, in two folders."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "text"
    for i in range(40):
        path = folder / ("a" if i % 2 else "b") / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random_text(rng, int(rng.integers(500, 1500))))
    return folder


def random_text(rng, size):
    """Random small letters, line breaks among them."""
    return rng.choice(np.frombuffer(b"abcdefghijklmnopqrstuvwxyz \n", np.uint8), size).tobytes()
