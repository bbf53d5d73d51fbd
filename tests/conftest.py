"""Shared by all tests: CPU only, one compilation cache a run, a small corpus and a small study."""

import json
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import pytest
from few_optimisations import few_optimisations
from tiny_study import tiny_study


def pytest_configure(config):
    """Equal programs compile once a run: all its processes, those of the command line too, share a folder."""
    if hasattr(config, "workerinput") or config.option.markexpr in ("aot", "aot_gpu"):
        return  # a process of pytest-xdist has it from the one that started it; what is read off a compiler
    folder = tempfile.TemporaryDirectory(prefix="compiled-")
    config.add_cleanup(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["SCALING_COMPILATION_CACHE"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


@pytest.fixture(scope="module")
def own_programs():
    """What a file's tests compiled is not kept for the next."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture
def quick_compiles(own_programs):
    """Few optimisations: for tiny programs that run for milliseconds and are compared with a tolerance."""
    with few_optimisations():
        yield


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


@pytest.fixture(scope="module")
def slurm():
    """A real Slurm of two emulated nodes on this machine (``slurm_cluster.Cluster``)."""
    import slurm_cluster

    if why := slurm_cluster.missing():
        pytest.skip(why)
    with slurm_cluster.Cluster() as cluster:
        yield cluster
