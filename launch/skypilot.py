"""SkyPilot tasks: Cloud TPU slices and GPU machines of many clouds, with recovery of lost spot machines.

One task is one group of cells, to be started with ``sky jobs launch``. SkyPilot's loader takes any name of an
accelerator, so that a typing error is met only when nothing is found to rent: the names here come from our
own table of hardware alone.

Names: docs.skypilot.co (task YAML, managed jobs, Cloud TPU), and its catalogue of Google Cloud; runtime
versions: "TPU software versions" of docs.cloud.google.com/tpu.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.engine import PREEMPTED
from launch.pods import (
    Setting,
    check_hosts,
    groups,
    job_files,
    refuse_bucket,
    worker,
)
from launch.preflight.hardware import GENERATIONS, Target
from scaling.attempts import MAX_FAILURES
from scaling.config import ConfigError

TPUS = {
    "v4": ("tpu-v4", "tpu-ubuntu2204-base"),
    "v5e": ("tpu-v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": ("tpu-v5p", "v2-alpha-tpuv5"),
    "v6e": ("tpu-v6e", "v2-alpha-tpuv6e"),
}
"""Generation to SkyPilot's accelerator, to which it adds the slice's number, and the machines' software."""
GPUS = {"a100": "A100-80GB", "h100": "H100", "h200": "H200", "b200": "B200"}
PORT = 8476
"""Of JAX's coordinator on the first machine."""
JOINED = f"${{SKYPILOT_NODE_IPS%%[[:space:]]*}}:{PORT},$SKYPILOT_NUM_NODES,$SKYPILOT_NODE_RANK"
"""What ``--distributed`` is on several GPU machines: the first of the addresses, one a line, is rank 0's."""
SETUP = """export PATH="$HOME/.local/bin:$PATH"
command -v uv > /dev/null || python3 -m pip install -q uv
[ -x ~/scaling/bin/python ] || uv venv -q --python 3.11 ~/scaling
uv pip install -q --python ~/scaling/bin/python '.[{extra}]'"""
"""Installs the package of ``workdir``; machines come with older Pythons. uv is where SkyPilot put it."""

SETTINGS = {
    "infra": Setting(
        "", "cloud, cloud/region or cloud/region/zone, such as gcp/us-east5/us-east5-b", r"[\w*./-]+"
    ),
    "spot": Setting(True, "true or false: machines that may be taken away"),
    "strategy": Setting("EAGER_NEXT_REGION", "EAGER_NEXT_REGION or FAILOVER", "EAGER_NEXT_REGION|FAILOVER"),
    "nfs": Setting("", "HOST:/PATH of an NFS export that every machine can mount", r"\S+:/\S*"),
    "volume": Setting("", "the name of a volume of SkyPilot, in place of nfs", r"\S+"),
    "mount": Setting("/mnt/scaling", "an absolute path: where the machines see it", r"/\S+"),
    "workdir": Setting(".", "a folder that is copied to the machines, with this package's source"),
    "setup": Setting("", "shell commands; empty: this package is installed from workdir", r"[\s\S]*"),
    "python": Setting("~/scaling/bin/python", "the interpreter that setup has made", r"\S+"),
    "disk_gb": Setting(256, "an integer of at least 50", least=50),
    "cells_per_job": Setting(1, "a positive integer: cells of one shape in one task", least=1),
    "env": Setting({}, "a table of environment variables and texts"),
}


def accelerator(target: Target) -> tuple[str, dict | None]:
    """SkyPilot's name and count of the target on one machine (or slice), and its ``accelerator_args``.

    Raises:
      ConfigError: hardware that SkyPilot does not rent.
    """
    check_hosts(target)
    if target.platform == "cuda":
        return f"{GPUS[target.generation]}:{target.chips // target.hosts}", None
    if target.generation not in TPUS:
        known = ", ".join((*TPUS, *GPUS))
        raise ConfigError(f"target is {target.name!r}; SkyPilot has {known}; for tpu7x use --on jobset")
    name, software = TPUS[target.generation]
    number = target.chips * GENERATIONS[target.generation].cores
    return f"{name}-{number}", {"runtime_version": software}


def files(
    study: Path, target: Target, settings: Mapping, options: Mapping, only: Sequence[str] = ()
) -> dict[str, str]:
    """The files of a launch: ``jobs/NAME.yaml`` a task each, and ``README.md``.

    Args: as ``launch.jobset.files``.

    Raises:
      ConfigError, StudyError: a target that SkyPilot does not rent, no shared folder, cells that do not fit.
    """
    for name in ("nfs", "volume"):
        refuse_bucket(name, settings[name])
    if bool(settings["nfs"]) == bool(settings["volume"]):
        raise ConfigError(
            "skypilot needs one of nfs and volume in its settings: the folder that outlives each machine"
        )
    accelerator(target)
    jobs = groups(study, only, target, options, settings["cells_per_job"])
    written = {"README.md": readme(study, target, settings, jobs)}
    return written | job_files(task, jobs, study, target, settings, options)


def task(
    name: str, job: Sequence[dict], study: Path, target: Target, settings: Mapping, options: Mapping
) -> dict:
    """The task of one group of cells, as a dict.

    A slice of TPUs is one node to SkyPilot whatever its hosts, and it runs the command on each of them.
    """
    names, arguments = accelerator(target)
    tries = options.get("max_failures", MAX_FAILURES) * len(job)
    resources = {
        **({"infra": settings["infra"]} if settings["infra"] else {}),
        "accelerators": names,
        **({"accelerator_args": arguments} if arguments else {}),
        "use_spot": settings["spot"],
        "disk_size": settings["disk_gb"],
        "job_recovery": {
            "strategy": settings["strategy"],
            "max_restarts_on_errors": tries,
            "recover_on_exit_codes": [PREEMPTED],  # asked to stop from outside: not an error
        },
    }
    volumes = {"volumes": {settings["mount"]: settings["volume"]}} if settings["volume"] else {}
    return {
        "name": name,
        "workdir": settings["workdir"],
        "num_nodes": target.hosts if target.platform == "cuda" else 1,
        "resources": resources,
        **volumes,
        "envs": {
            "JAX_PLATFORMS": f"{target.platform},cpu",
            "SCALING_COMPILATION_CACHE": f"{settings['mount']}/cache/xla",
            **settings["env"],
        },
        "setup": setup(target, settings),
        "run": run(job, study, target, settings, options),
    }


def setup(target: Target, settings: Mapping) -> str:
    """Shell commands that make a machine ready: the shared folder, then the package."""
    lines = ["set -e"]
    if settings["nfs"]:
        mount = shlex.quote(settings["mount"])
        lines += [
            "command -v mount.nfs > /dev/null || sudo apt-get install -y -qq nfs-common",
            f"sudo mkdir -p {mount}",
            f"mountpoint -q {mount} || sudo mount -t nfs {shlex.quote(settings['nfs'])} {mount}",
        ]
    install = settings["setup"] or SETUP.format(extra="tpu" if target.platform == "tpu" else "cuda")
    return "\n".join([*lines, install]) + "\n"


def run(job: Sequence[dict], study: Path, target: Target, settings: Mapping, options: Mapping) -> str:
    """Shell commands of each host; ``exec``, so that SIGTERM reaches the worker."""
    # a TPU's hosts find each other by Google's metadata; GPU machines by SkyPilot's variables
    joined = "auto" if target.platform == "tpu" else JOINED
    command = worker(job, f"studies/{study.resolve().name}", target, options, joined)
    # quoted for the shell, but for the variables and for a ~
    words = [w if JOINED in w else shlex.quote(w) for w in command[1:]]
    lines = "".join(f" \\\n  {word}" for word in words)
    return f"cd {shlex.quote(settings['mount'])}\nexec {settings['python']}{lines}\n"


def readme(study: Path, target: Target, settings: Mapping, jobs: Sequence) -> str:
    """How to start the tasks, for the person who has them."""
    name, mount = study.resolve().name, settings["mount"]
    where = settings["nfs"] or f"the volume {settings['volume']}"
    cells = sum(map(len, jobs))
    return f"""# {name} on {target}

{len(jobs)} tasks of {cells} cells, {target.chips} chips each. Every machine sees {where} as `{mount}`.

1. Copy the plan to `studies/{name}` of that folder (`rsync -a {study}/ HOST:.../studies/{name}/`), and data
   that the config names by a relative path beside `studies`.
2. Start the tasks (`workdir` is `{settings["workdir"]}`, seen from where you are), with DIR for this folder:

   ```
   for task in DIR/jobs/*.yaml; do sky jobs launch -y -d "$task"; done
   ```

3. `sky jobs queue` says which machines are up; `scaling status studies/{name}`, on any machine that sees the
   folder, which cells train.
4. `scaling collect studies/{name}` makes the table.

`scaling cancel studies/{name}` saves and stops all of them, `sky jobs cancel NAME` one. To go on, or to run a
task again: `rm -f studies/{name}/cancelled`, and start it as above; a cell that has a result is not trained
again.
"""
