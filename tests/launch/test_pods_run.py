"""The container of a JobSet, started here as Kubernetes would: its command, environment and two hosts."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from tiny_study import tiny_study

from launch import worker
from launch.cli import cli
from launch.preflight.hardware import parse_target
from scaling.attempts import attempts_of
from scaling.files import CellFolder, read_json
from scaling.records import read_manifest
from scaling.train import Preempted

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(manifest: dict, index: int, volume: Path, port: int) -> subprocess.Popen:
    """Starts pod ``index`` of a JobSet's only job: environment and $(VARIABLES) as the kubelet makes them.

    What stands in for the cluster: the volume is a folder, the headless service is this machine, a host's
    chips are as many simulated CPU devices, and the image is this checkout.
    """
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    box = job["template"]["spec"]["containers"][0]
    annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
    given = {}
    for variable in box["env"]:
        if "value" in variable:
            value = re.sub(r"\$\((\w+)\)", lambda m: given[m[1]], variable["value"])
        else:
            value = annotations[re.fullmatch(r"metadata\.annotations\['(.+)'\]", field(variable))[1]]
        given[variable["name"]] = value.replace(box["workingDir"], str(volume))
    host, _ = given["JAX_COORDINATOR_ADDRESS"].split(":")
    name = manifest["metadata"]["name"]
    assert host == f"{name}-host-0-0.{manifest['spec']['network']['subdomain']}"  # pod 0's
    given |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_PLATFORMS": "cpu"}
    command = [re.sub(r"\$\((\w+)\)", lambda m: given[m[1]], w) for w in (*box["command"], *box["args"])]
    assert command[0] == "python"
    chips = box["resources"]["limits"]["google.com/tpu"]
    machine = {
        "PATH": os.environ["PATH"],
        "HOME": str(volume),
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={chips}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.Popen([sys.executable, *command[1:]], cwd=volume, env=machine | given)


def field(variable: dict) -> str:
    return variable["valueFrom"]["fieldRef"]["fieldPath"]


@pytest.mark.slow
def test_two_hosts_of_a_slice_train_a_cell_from_the_manifest_alone(corpus, tmp_path):
    """v5p-16: 2x2x2, two hosts of four chips; here two processes of four devices, joined over gloo."""
    target = parse_target("v5p-16")
    assert (target.hosts, target.devices) == (2, 8)
    config = tiny_study(corpus, budgets=(4e7,), params=(4e3,))
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    (tmp_path / "s.toml").write_text('[jobset]\nimage = "i"\nvolume = "v"\n')
    study, out = tmp_path / "studies/tiny", tmp_path / "out"
    words = ["--on", "jobset", "--dry-run", "--target", "v5p-16", "--settings", str(tmp_path / "s.toml")]
    words += ["--study", str(study), "--out", str(out), "--mesh", "1,8,1"]
    done = CliRunner().invoke(cli, ["launch", str(tmp_path / "tiny.json"), *words])
    assert done.exit_code == 0, done.output
    (cell,) = read_manifest(study)["cells"]
    manifest = yaml.safe_load((out / f"jobs/tiny-{cell['id']}.yaml").read_text())
    port = free_port()
    pods = [start(manifest, index, tmp_path, port) for index in range(target.hosts)]
    try:
        assert [pod.wait(240) for pod in pods] == [0, 0]
    finally:
        for pod in pods:
            pod.kill()
    folder = CellFolder(study, cell["id"])
    result, attempts = read_json(folder.result), attempts_of(folder)
    assert (result["status"], result["devices"]) == ("finished", 8)
    assert [a["outcome"] for a in attempts] == ["finished"]  # one of the two wrote it
    assert any((tmp_path / "cache/xla").iterdir())  # programs are kept on the volume


def test_a_pod_of_a_cancelled_study_is_not_started_again(corpus, tmp_path, monkeypatch):
    """75 asks for another try, 0 does not; a coordinator that does not answer is worth another."""
    monkeypatch.setattr(worker, "configure_jax", lambda: None)
    monkeypatch.setattr(worker, "stop_on_sigterm", lambda: None)
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path)])

    def stopped(*_):
        raise Preempted

    monkeypatch.setattr("launch.work.work", stopped)
    assert worker.main() == 75
    (tmp_path / "cancelled").touch()
    assert worker.main() == 0

    def alone(how):
        raise RuntimeError("DEADLINE_EXCEEDED: the others did not come")

    monkeypatch.setattr("scaling.hosts.initialize_distributed", alone)
    assert worker.main() == 1
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path), "--mesh", "8"])
    monkeypatch.setattr("scaling.hosts.initialize_distributed", lambda how: None)
    assert worker.main() == 2
