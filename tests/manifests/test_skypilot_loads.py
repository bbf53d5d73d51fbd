"""Tasks read by SkyPilot's own loader, in an environment of its own: its pins are not ours."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from planned_files import files

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("SKYPILOT_PYTHON", ROOT / ".venv-skypilot/bin/python"))
TARGETS = {
    "v5e-64": {"tpu-v5litepod-64": 1},
    "v6e-256": {"tpu-v6e-256": 1},
    "v5p-128": {"tpu-v5p-128": 1},
    "h100-8": {"H100": 8},
    "a100-16": {"A100-80GB": 8},
}


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason=f"SkyPilot is not installed ({PYTHON}): make manifests")
def test_tasks_are_loaded_as_meant(tmp_path):
    tasks, made = tmp_path / "tasks", {}
    tasks.mkdir()
    for target in TARGETS:
        (tmp_path / target).mkdir()
        written = files(tmp_path / target, "skypilot", target)
        text = next(text for name, text in written.items() if name.startswith("jobs/"))
        (tasks / f"{target}.yaml").write_text(text)
        made[target] = yaml.safe_load(text)
    wrong = {**made["h100-8"], "num_node": 2}
    (tasks / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    home = {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PATH": os.environ["PATH"]}
    script = Path(__file__).with_name("load_tasks.py")
    done = subprocess.run(
        [str(PYTHON), str(script), str(tasks)],
        env=home,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "num_node" in found.pop("wrong")["error"]
    assert found.keys() == TARGETS.keys()
    for target, loaded in found.items():
        assert "error" not in loaded, loaded
        assert loaded["accelerators"] == TARGETS[target]
        assert (loaded["arguments"] or {}).get("runtime_version") == made[target]["resources"].get(
            "accelerator_args", {}
        ).get("runtime_version")
        assert loaded["spot"] is True and loaded["cloud"] == "gcp"
        recovery = {k: v for k, v in loaded["recovery"].items() if v is not None}
        assert recovery == made[target]["resources"]["job_recovery"]
        assert (loaded["nodes"], loaded["name"]) == (made[target]["num_nodes"], made[target]["name"])
        assert loaded["run"].strip() == made[target]["run"].strip()
