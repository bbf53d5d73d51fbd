"""The files of `scaling launch --on jobset` and `--on skypilot`: every field, and what is refused."""

import copy
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from manifest_checks import problems
from tiny_study import tiny_study

from launch import jobset, pods, skypilot
from launch.cli import cli
from launch.preflight.hardware import parse_target
from scaling.config import ConfigError
from scaling.files import CellFolder, StudyError, write_json
from scaling.records import read_manifest

CELLS = [{"params": p, "tokens": 4e5, "seed": s} for p in (3e3, 6e3) for s in range(3)]
SETTINGS = """
[jobset]
image = "registry.example/scaling:1"
volume = "studies"
queue = "tpus"
[skypilot]
nfs = "10.0.0.2:/studies"
"""
# from "Plan TPUs in GKE" and "Run GPUs in GKE": label, shape, nodes, chips of a node
SLICES = {
    "v4-8": ("tpu-v4-podslice", "2x2x1", 1, 4),
    "v4-64": ("tpu-v4-podslice", "2x4x4", 8, 4),
    "v5e": ("tpu-v5-lite-podslice", "1x1", 1, 1),
    "v5e-4": ("tpu-v5-lite-podslice", "2x2", 1, 4),
    "v5e-8": ("tpu-v5-lite-podslice", "2x4", 1, 8),
    "v5e-64": ("tpu-v5-lite-podslice", "8x8", 16, 4),
    "v5e-256": ("tpu-v5-lite-podslice", "16x16", 64, 4),
    "v5p-8": ("tpu-v5p-slice", "2x2x1", 1, 4),
    "v5p-128": ("tpu-v5p-slice", "4x4x4", 16, 4),
    "v6e-8": ("tpu-v6e-slice", "2x4", 1, 8),
    "v6e-256": ("tpu-v6e-slice", "16x16", 64, 4),
    "tpu7x-8": ("tpu7x", "2x2x1", 1, 4),
    "tpu7x-128": ("tpu7x", "4x4x4", 16, 4),
}
NODES = {
    "a100": ("nvidia-a100-80gb", 1, 1),
    "h100-8": ("nvidia-h100-80gb", 1, 8),
    "h200-16": ("nvidia-h200-141gb", 2, 8),
    "b200-8": ("nvidia-b200", 1, 8),
}


@pytest.fixture(scope="module")
def study(corpus, tmp_path_factory):
    """A planned study of two sizes with three seeds each, in rows enough for 256 devices."""
    folder = tmp_path_factory.mktemp("pods")
    (folder / "settings.toml").write_text(SETTINGS)
    config = tiny_study(corpus, batch_tokens=256 * 32)
    config["grid"] = {"kind": "list", "cells": CELLS, "min_steps": 10, "max_epochs": 10, "tolerance": 0.1}
    config["data"]["path"] = str(corpus)
    (folder / "tiny.json").write_text(json.dumps(config))
    planned = CliRunner().invoke(
        cli, ["plan", str(folder / "tiny.json"), "--study", str(folder / "studies/tiny"), "--no-estimate"]
    )
    assert planned.exit_code == 0, planned.output
    return folder / "studies/tiny"


def launch(study, on, target, *more, settings=None):
    """What the command line says; raises what it would print as an error."""
    where = settings or study.parents[1] / "settings.toml"
    words = ["launch", str(study), "--on", on, "--dry-run", "--target", target, "--settings", str(where)]
    words += ["--mesh", mesh(target)] if mesh(target) else []
    done = CliRunner().invoke(cli, [*words, *map(str, more)])
    if done.exception:
        raise done.exception
    return done.output


def mesh(name):
    """All devices along fsdp: the tiny cells' rows are filled up."""
    devices = parse_target(name).devices
    return f"1,{devices},1" if devices > 1 else None


def written(out):
    return {
        path.stem: yaml.safe_load(path.read_text()) for path in sorted((Path(out) / "jobs").glob("*.yaml"))
    }


def one_of(study, on, target, out, *more, **how):
    launch(study, on, target, "--out", out, *more, **how)
    return next(iter(written(out).values()))


def parts(manifest):
    """The Job, the pod, its container and the container's environment."""
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    inside = job["template"]["spec"]
    box = inside["containers"][0]
    return job, inside, box, {v["name"]: v for v in box["env"]}


@pytest.mark.parametrize("target", SLICES)
def test_slices_of_tpus(study, tmp_path, target):
    label, shape, hosts, chips = SLICES[target]
    made = one_of(study, "jobset", target, tmp_path)
    assert problems(made) == []
    job, inside, box, env = parts(made)
    assert inside["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    assert box["resources"] == {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}}
    assert env["JAX_PLATFORMS"]["value"] == "tpu,cpu"  # else a chip that does not start means the CPU
    exclusive = made["metadata"].get("annotations", {})
    assert ("alpha.jobset.sigs.k8s.io/exclusive-topology" in exclusive) == (hosts > 1)
    name = made["metadata"]["name"]
    joined = [word for word in box["args"] if word.startswith("--distributed")]
    if hosts == 1:
        assert joined == [] and "JAX_COORDINATOR_ADDRESS" not in env
        return
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == f"{name}-host-0-0.{name}:8476"
    assert env["JAX_NUM_PROCESSES"]["value"] == str(hosts)
    index = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert joined == ["--distributed=$(JAX_COORDINATOR_ADDRESS),$(JAX_NUM_PROCESSES),$(JAX_PROCESS_ID)"]
    assert box["ports"] == [{"name": "coordinator", "containerPort": 8476}]


@pytest.mark.parametrize("target", NODES)
def test_nodes_of_gpus(study, tmp_path, target):
    label, hosts, gpus = NODES[target]
    made = one_of(study, "jobset", target, tmp_path)
    assert problems(made) == []
    job, inside, box, env = parts(made)
    assert env["JAX_PLATFORMS"]["value"] == "cuda,cpu"
    assert inside["nodeSelector"] == {"cloud.google.com/gke-accelerator": label}
    assert (job["completions"], box["resources"]["limits"]) == (hosts, {"nvidia.com/gpu": gpus})
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in box["volumeMounts"]
    assert "annotations" not in made["metadata"]


def test_every_other_field_of_a_jobset(study, tmp_path):
    settings = tmp_path / "s.toml"
    settings.write_text(
        SETTINGS.replace("[skypilot]", "\n".join([
            'namespace = "research"', 'priority = "low"', 'service_account = "trainer"', 'reservation = "r1"',
            "spot = true", "privileged = true", 'cpu = "24"', 'memory = "96Gi"', "grace_seconds = 60",
            'mount = "/data"', 'env = {LIBTPU_INIT_ARGS = "--x=1"}', "[skypilot]",
        ]))
    )  # fmt: skip
    out, entry = tmp_path / "out", read_manifest(study)["cells"][0]
    words = ["--cell", entry["id"], "--max-failures", 3, "--max-preemptions", 7, "--remat", "auto"]
    made = one_of(study, "jobset", "v5e-64", out, *words, settings=settings)
    assert problems(made) == []
    job, inside, box, env = parts(made)
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["metadata"]["name"] == f"tiny-{entry['id']}"
    assert made["metadata"]["namespace"] == "research"
    assert made["metadata"]["labels"] == {
        "scaling/study": "tiny",
        "kueue.x-k8s.io/queue-name": "tpus",
        "kueue.x-k8s.io/priority-class": "low",
    }
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 3 + 7
    rule = job["podFailurePolicy"]["rules"][0]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert made["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert inside["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert inside["nodeSelector"]["cloud.google.com/reservation-name"] == "r1"
    assert [t["key"] for t in inside["tolerations"]] == ["google.com/tpu", "cloud.google.com/gke-spot"]
    assert (inside["serviceAccountName"], inside["terminationGracePeriodSeconds"]) == ("trainer", 60)
    assert inside["volumes"] == [{"name": "studies", "persistentVolumeClaim": {"claimName": "studies"}}]
    assert box["securityContext"] == {"privileged": True} and box["image"] == "registry.example/scaling:1"
    assert box["resources"]["requests"] == {"cpu": "24", "memory": "96Gi", "google.com/tpu": 4}
    assert box["command"] == ["python", "-m", "launch.worker"] and box["workingDir"] == "/data"
    assert box["args"][0] == "studies/tiny" and box["args"][-2:] == ["--cell", entry["id"]]
    assert {"--mesh=1,64,1", "--remat=auto", "--max-failures=3"} <= set(box["args"])
    assert env["LIBTPU_INIT_ARGS"]["value"] == "--x=1"
    assert env["SCALING_COMPILATION_CACHE"]["value"] == "/data/cache/xla"
    desk = yaml.safe_load((out / "desk.yaml").read_text())
    assert desk["spec"]["containers"][0]["volumeMounts"][0]["mountPath"] == "/data"
    text = (out / "README.md").read_text()
    assert "kubectl -n research cp" in text and "v5e-64: 64 chips, 8x8, 16 hosts" in text
    head = (out / f"jobs/tiny-{entry['id']}.yaml").read_text().splitlines()[2]
    assert entry["id"] in head and f"N {entry['achieved']['params_total']:.3g}" in head


def test_the_check_itself_sees_what_validators_miss(study, tmp_path):
    made = one_of(study, "jobset", "v5e-64", tmp_path)
    for path, value in (
        (("failurePolicy", "rules", 0, "action"), "RestartAll"),
        (("failurePolicy", "rules", 0, "onJobFailureReasons"), ["PodFailure"]),
        (("failurePolicy", "rules", 0, "targetReplicatedJobs"), ["hosts"]),
        (("replicatedJobs", 0, "template", "spec", "completionMode"), "indexed"),
        (("replicatedJobs", 0, "template", "spec", "parallelism"), 15),
        (("network", "subdomain"), "other"),
    ):
        wrong = copy.deepcopy(made)
        part = wrong["spec"]
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        assert problems(wrong), path


SKY = {
    "v4-64": "tpu-v4-64",
    "v5e": "tpu-v5litepod-1",
    "v5e-64": "tpu-v5litepod-64",
    "v5p-128": "tpu-v5p-128",
    "v6e-256": "tpu-v6e-256",
    "a100-8": "A100-80GB:8",
    "h100-8": "H100:8",
    "h200-16": "H200:8",
}


@pytest.mark.parametrize("target", SKY)
def test_tasks_of_skypilot(study, tmp_path, target):
    made = one_of(study, "skypilot", target, tmp_path)
    asked = made["resources"]
    assert asked["accelerators"] == SKY[target] and asked["use_spot"] is True
    assert asked["job_recovery"] == {
        "strategy": "EAGER_NEXT_REGION",
        "max_restarts_on_errors": 2 * made["run"].count("--cell"),
        "recover_on_exit_codes": [75],
    }
    assert made["envs"]["JAX_PLATFORMS"] == ("tpu,cpu" if target.startswith("v") else "cuda,cpu")
    assert made["num_nodes"] == (2 if target == "h200-16" else 1)  # a slice of TPUs is one node
    runtime = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
    generation = target.split("-")[0]
    if generation in runtime:
        assert asked["accelerator_args"] == {"runtime_version": runtime[generation]}
    assert ("--distributed=auto" in made["run"]) == (target in ("v4-64", "v5e-64", "v5p-128", "v6e-256"))
    assert "mount -t nfs 10.0.0.2:/studies /mnt/scaling" in made["setup"]
    assert ("'.[tpu]'" in made["setup"]) == target.startswith("v")
    assert subprocess.run(["bash", "-n", "-c", made["setup"] + made["run"]]).returncode == 0


def test_gpu_machines_of_skypilot_find_the_first(study, tmp_path):
    """The task's own shell line, with an interpreter that only prints what it is given."""
    settings = tmp_path / "s.toml"
    settings.write_text(SETTINGS + f'python = "echo"\nmount = "{tmp_path}"\n')
    made = one_of(study, "skypilot", "h100-16", tmp_path / "out", settings=settings)
    machines = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    said = subprocess.run(
        ["bash", "-c", made["run"]], env=machines, capture_output=True, text=True, check=True
    )
    words = said.stdout.split()
    assert words[:3] == ["-m", "launch.worker", "studies/tiny"]
    assert "--distributed=10.0.0.1:8476,2,1" in words and "--mesh=1,16,1" in words


def test_which_cells_make_a_job(study, tmp_path):
    ids = [e["id"] for e in read_manifest(study)["cells"]]
    large = {e["id"] for e in read_manifest(study)["cells"] if e["target"]["params"] == 6e3}
    options = {"wandb": "off", "accumulate": 1, "remat": "none", "pack": "auto"}

    def jobs(target, per_job=1, only=(), **changes):
        made = pods.groups(study, only, parse_target(target), options | changes, per_job)
        return [[e["id"] for e in job] for job in made]

    assert [len(job) for job in jobs("v5e-64")] == [1] * 6
    assert {job[0] for job in jobs("v5e-64")[:3]} == large  # the most expensive first
    assert sorted(len(job) for job in jobs("v5e-64", 2)) == [1, 1, 2, 2]  # three of each shape
    assert all(set(job) <= large or not set(job) & large for job in jobs("v5e-64", 3))
    assert [len(job) for job in jobs("v5e")] == [3, 3]  # tiny cells are packed on one chip
    assert [len(job) for job in jobs("v5e", remat="auto")] == [1] * 6  # which the worker would not pack
    assert jobs("v5e-64", only=[ids[4]]) == [[ids[4]]]
    done = CellFolder(study, ids[0]).result
    write_json(done, {"status": "finished"})
    try:
        assert ids[0] not in [name for job in jobs("v5e-64") for name in job]
        with pytest.raises(StudyError, match="nothing to do"):
            jobs("v5e-64", only=[ids[0]])
    finally:
        done.unlink()


def test_a_trunk_and_its_branches_are_one_job(corpus, tmp_path):
    from launch.planning import manifest_of
    from scaling.grid import write_manifest
    from scaling.study import validate_study

    grid = {"kind": "product", "params": [3e3, 6e3], "tokens": [4e3, 8e3], "min_steps": 5, "trunks": True}
    config = tiny_study(corpus, grid=grid, schedule={"name": "wsd", "decay_fraction": 0.25})
    write_manifest(tmp_path / "s", manifest_of(validate_study(config)), False)
    options = {"wandb": "off", "accumulate": 1, "remat": "none", "pack": "auto"}
    jobs = pods.groups(tmp_path / "s", (), parse_target("v5e"), options, 1)
    assert [sorted(e["role"] for e in job) for job in jobs] == [["branch", "branch", "trunk"]] * 2
    for job in jobs:
        assert {e.get("trunk") for e in job} - {None} == {e["id"] for e in job if e["role"] == "trunk"}


def test_names_that_kubernetes_takes(tmp_path):
    job = [{"id": "0123456789abcdef"}]
    for folder, name in (("My_Study v2.1", "my-study-v2-1"), ("9lives", "s-9lives"), ("x" * 80, "x" * 24)):
        assert pods.job_name(tmp_path / folder, job) == f"{name}-0123456789abcdef"


def test_files_of_an_earlier_launch_are_replaced_and_others_kept(study, tmp_path):
    launch(study, "jobset", "v5e", "--out", tmp_path)
    cell = read_manifest(study)["cells"][0]["id"]
    launch(study, "jobset", "v5e", "--out", tmp_path, "--cell", cell)
    assert list(written(tmp_path)) == [f"tiny-{cell}"]
    (tmp_path / "jobs/mine.yaml").write_text("kind: Job\n")
    with pytest.raises(StudyError, match=r"mine.yaml was not written by `scaling launch`"):
        launch(study, "jobset", "v5e", "--out", tmp_path)
    assert list(written(tmp_path)) == ["mine", f"tiny-{cell}"]


@pytest.mark.parametrize(
    ("on", "target", "more", "message"),
    [
        ("jobset", "v5e-63", [], "v5e has slices v5e-1, v5e-4"),
        ("jobset", "v5q-64", [], "must be one of v4, v5e"),
        ("jobset", "h101-8", [], "must be one of v4, v5e"),
        ("jobset", "v5p", [], "its smallest machine is v5p-8, of four chips"),
        ("skypilot", "tpu7x-128", [], "for tpu7x use --on jobset"),
        ("skypilot", "v4", [], "its smallest machine is v4-8"),
        ("jobset", "v5e-4", ["--mesh", "1,8,1"], r"--mesh is '1,8,1'; v5e-4: 4 chips.* has 4 JAX devices"),
        ("jobset", "v5e", ["--mesh", "1,2,1"], "is one device, which needs none"),
        ("jobset", "v5e-4", ["--distributed", "auto"], "--distributed is what the file says"),
        ("jobset", "v5e-4", ["--cell", "nope"], "'nope' is not a cell of"),
        ("jobset", "v5e-4", ["--workers", "2"], "--workers is for --on local"),
    ],
)
def test_what_is_refused(study, tmp_path, on, target, more, message):
    words = [
        "launch",
        str(study),
        "--on",
        on,
        "--dry-run",
        "--target",
        target,
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(cli, [*words, "--settings", str(study.parents[1] / "settings.toml"), *more])
    assert isinstance(done.exception, (ConfigError, StudyError)), done.output
    with pytest.raises(type(done.exception), match=message):
        raise done.exception
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on", "jobset", "--target", "v5e"], "writes files and submits nothing: add --dry-run"),
        (["--on", "skypilot", "--dry-run"], "needs --target"),
        (["--dry-run"], "are for --on slurm, jobset and skypilot"),
        (["--on", "jobset", "--dry-run", "--target", "v5e"], "image is missing"),
        (["--on", "skypilot", "--dry-run", "--target", "v5e"], "one of nfs and volume"),
    ],
)
def test_what_must_be_given(study, words, message):
    done = CliRunner().invoke(cli, ["launch", str(study), *words])
    with pytest.raises((ConfigError, StudyError), match=message):
        raise done.exception


def test_cells_that_no_mesh_divides(corpus, study, tmp_path):
    """768 rows over 256 chips divide; over 1,024 devices they do not, and neither do a few heads."""
    settings = str(study.parents[1] / "settings.toml")
    words = [
        "launch",
        str(study),
        "--on",
        "jobset",
        "--dry-run",
        "--settings",
        settings,
        "--out",
        str(tmp_path),
    ]
    assert {e["config"]["train"]["batch"] for e in read_manifest(study)["cells"]} == {768}
    assert CliRunner().invoke(cli, [*words, "--target", "v5e-256"]).exit_code == 0
    assert all("--mesh=1,256,1" in parts(made)[2]["args"] for made in written(tmp_path).values())
    done = CliRunner().invoke(cli, [*words, "--target", "tpu7x-1024"])
    with pytest.raises(StudyError, match=r"do not divide over 1024 devices.* give a --mesh"):
        raise done.exception


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("jobset", 'volume = "gs://bucket/studies"', "a mounted bucket has no hard links"),
        ("skypilot", 'nfs = "s3://bucket/studies"', "a study is not read from a bucket yet"),
        ("jobset", 'imag = "x"', "unknown key 'imag'; did you mean 'image'"),
        ("jobset", "image = 3", "image is 3; it must be a container image"),
        ("jobset", 'spot = "yes"', "spot is 'yes'; it must be true or false"),
        ("jobset", "grace_seconds = 0", "grace_seconds is 0; it must be a positive integer"),
        ("jobset", "cells_per_job = true", "cells_per_job is True; it must be a positive integer"),
        ("jobset", 'queue = "My Queue"', "queue is 'My Queue'; it must be a name of small letters"),
        ("jobset", 'memory = "96 GB"', "memory is '96 GB'; it must be a quantity"),
        ("jobset", "env = {A = 1}", "env is .* it must be a table of environment variables"),
        ("jobset", 'env = {JAX_PROCESS_ID = "0"}', "JAX_PROCESS_ID', which the manifest sets itself"),
        ("skypilot", 'strategy = "NONE"', "strategy is 'NONE'; it must be EAGER_NEXT_REGION or FAILOVER"),
        ("skypilot", 'volume = "v"', "one of nfs and volume"),
        ("skypilot", "disk_gb = 10", "disk_gb is 10; it must be an integer of at least 50"),
        ("slrum", "a = 1", "unknown key 'slrum'"),
        ("jobset", "= 1", "is not TOML"),
    ],
)
def test_settings_are_checked(study, tmp_path, section, line, message):
    tables = {"jobset": {"image": '"i"', "volume": '"v"'}, "skypilot": {"nfs": '"h:/p"'}}
    tables.get(section, {}).pop(line.split(" ")[0], None)
    text = [f"[{k}]\n" + "".join(f"{a} = {b}\n" for a, b in t.items()) for k, t in tables.items()]
    head = f"[{section}]\n"
    text = [t.replace(head, f"{head}{line}\n") for t in text]
    (tmp_path / "s.toml").write_text("".join(text) + (f"{head}{line}\n" if section not in tables else ""))
    on = "skypilot" if section == "skypilot" else "jobset"
    with pytest.raises(ConfigError, match=message):
        launch(study, on, "v5e", "--out", tmp_path / "out", settings=tmp_path / "s.toml")


def test_the_readmes_settings_are_those_of_the_code():
    docs = Path(__file__).parents[2] / "docs"
    for name, engine in (("jobset", jobset), ("skypilot", skypilot)):
        text = (docs / f"launch_{name}.md").read_text()
        for field in engine.SETTINGS:
            assert f"| `{field}` |" in text, f"docs/launch_{name}.md does not tell of {field}"
