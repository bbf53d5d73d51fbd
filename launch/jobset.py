"""JobSet manifests for Kubernetes: TPU slices and GPU nodes of GKE, with Kueue's labels.

One JobSet is one group of cells on one slice: a Job of as many indexed pods as the slice has hosts, behind a
headless service that JobSet makes. Pod 0 is JAX's coordinator. A pod that ends with an error ends its Job,
and JobSet starts all pods again, which go on from the checkpoints; how often a cell is tried is the study's
to say (``scaling.attempts``), so JobSet's own limit is only the sum of those budgets.

Names of node labels, accelerators and topologies: "Plan TPUs in GKE" and "Run GPUs in GKE" of
docs.cloud.google.com; of JobSet: jobset.sigs.k8s.io, API v1alpha2 (failure policy rules: JobSet 0.6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.engine import BAD_INPUT
from launch.pods import (
    LABEL,
    REQUIRED,
    Setting,
    as_yaml,
    check_hosts,
    chips_per_host,
    groups,
    job_files,
    refuse_bucket,
    short_name,
    worker,
)
from launch.preflight.hardware import Target
from scaling.attempts import MAX_FAILURES, MAX_PREEMPTIONS
from scaling.config import ConfigError

TPUS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
"""Generation to GKE's label cloud.google.com/gke-tpu-accelerator."""
GPU_NODES = {
    "a100": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
"""GPU to GKE's label cloud.google.com/gke-accelerator (machines a2-ultragpu, a3-high, a3-ultra, a4-high)."""
PORT = 8476
"""Of JAX's coordinator in pod 0."""
HOSTS = "host"
"""The replicated job's name, and so a part of each pod's."""
JOINED = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
OURS = (*JOINED, "JAX_PLATFORMS", "SCALING_COMPILATION_CACHE")

_QUANTITY = r"\d+(\.\d+)?(m|[kMGTPE]i?)?"
_NAME = r"a name of small letters, digits and dashes"
SETTINGS = {
    "image": Setting(REQUIRED, "a container image with this package and jax[tpu] or jax[cuda12]", r"\S+"),
    "volume": Setting(
        REQUIRED, f"{_NAME}: a PersistentVolumeClaim that many nodes may mount", rf"{LABEL}|\S+://\S*"
    ),
    "mount": Setting("/mnt/scaling", "an absolute path: where the pods mount the volume", r"/\S+"),
    "namespace": Setting("default", _NAME, LABEL),
    "queue": Setting("", f"{_NAME}: Kueue's LocalQueue; empty without Kueue", LABEL),
    "priority": Setting("", f"{_NAME}: Kueue's WorkloadPriorityClass", LABEL),
    "service_account": Setting("", _NAME, LABEL),
    "reservation": Setting("", f"{_NAME}: a reservation of Compute Engine", LABEL),
    "spot": Setting(False, "true or false: nodes that may be taken away"),
    "privileged": Setting(False, "true or false: TPU nodes of GKE before 1.28 ask for it"),
    "cpu": Setting("", "a quantity such as 24 or 500m, asked for by each pod", _QUANTITY),
    "memory": Setting("", "a quantity such as 96Gi, asked for by each pod", _QUANTITY),
    "grace_seconds": Setting(120, "a positive integer: from SIGTERM to SIGKILL, to save in", least=1),
    "cells_per_job": Setting(1, "a positive integer: cells of one shape in one JobSet", least=1),
    "env": Setting({}, "a table of environment variables and texts"),
}


def files(
    study: Path, target: Target, settings: Mapping, options: Mapping, only: Sequence[str] = ()
) -> dict[str, str]:
    """The files of a launch: ``jobs/NAME.yaml`` a JobSet each, ``desk.yaml`` and ``README.md``.

    Args:
      study: a planned study. target: what each job runs on. settings: of ``SETTINGS``, checked. options: of
      ``scaling launch``, passed on to the workers. only: ids of cells; none: what has no result.

    Raises:
      ConfigError, StudyError: a target that GKE does not have, or cells that it cannot hold.
    """
    check_hosts(target)
    refuse_bucket("volume", settings["volume"])
    taken = sorted(set(settings["env"]) & set(OURS))
    if taken:
        raise ConfigError(f"jobset.env has {taken[0]!r}, which the manifest sets itself; leave it out")
    jobs = groups(study, only, target, options, settings["cells_per_job"])
    written = {"README.md": readme(study, target, settings, jobs), "desk.yaml": desk(settings)}
    return written | job_files(jobset, jobs, study, target, settings, options)


def jobset(
    name: str, job: Sequence[dict], study: Path, target: Target, settings: Mapping, options: Mapping
) -> dict:
    """The JobSet of one group of cells, as a dict."""
    metadata = {"name": name, "namespace": settings["namespace"], "labels": labels(study, settings)}
    if target.platform == "tpu" and target.hosts > 1:
        # one slice is one node pool: without this, pods of two jobs could meet in it
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    tries = options.get("max_failures", MAX_FAILURES) + options.get("max_preemptions", MAX_PREEMPTIONS)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
            "failurePolicy": {
                "maxRestarts": tries * len(job),
                "rules": [
                    {
                        "name": "bad_input",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "targetReplicatedJobs": [HOSTS],
                    }
                ],
            },
            "replicatedJobs": [
                {
                    "name": HOSTS,
                    "replicas": 1,
                    "template": {"spec": one_job(name, job, study, target, settings, options)},
                }
            ],
        },
    }


def labels(study: Path, settings: Mapping) -> dict:
    """Of the JobSet: its study, and Kueue's."""
    found = {"scaling/study": short_name(study)}
    if settings["queue"]:
        found["kueue.x-k8s.io/queue-name"] = settings["queue"]
    if settings["priority"]:
        found["kueue.x-k8s.io/priority-class"] = settings["priority"]
    return found


def one_job(
    name: str, job: Sequence[dict], study: Path, target: Target, settings: Mapping, options: Mapping
) -> dict:
    """The Job: a pod a host; any pod's failure is the Job's, and bad input is not worth another try."""
    return {
        "parallelism": target.hosts,
        "completions": target.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "worker", "operator": "In", "values": [BAD_INPUT]},
                }
            ]
        },
        "template": {
            "metadata": {"labels": {"scaling/study": labels(study, settings)["scaling/study"]}},
            "spec": pod(name, job, study, target, settings, options),
        },
    }


def pod(
    name: str, job: Sequence[dict], study: Path, target: Target, settings: Mapping, options: Mapping
) -> dict:
    """What runs on each host."""
    joined = ",".join(f"$({variable})" for variable in JOINED)  # Kubernetes puts in the values
    command = worker(job, f"studies/{study.resolve().name}", target, options, joined)
    resource = "google.com/tpu" if target.platform == "tpu" else "nvidia.com/gpu"
    count = {resource: chips_per_host(target)}
    asked = {k: settings[k] for k in ("cpu", "memory") if settings[k]}
    container = {
        "name": "worker",
        "image": settings["image"],
        "command": command[:3],
        "args": command[3:],
        "workingDir": settings["mount"],
        "env": environment(name, target, settings),
        "resources": {"requests": {**asked, **count}, "limits": count},
        "volumeMounts": [{"name": "studies", "mountPath": settings["mount"]}],
    }
    if target.hosts > 1:
        container["ports"] = [{"name": "coordinator", "containerPort": PORT}]
    if settings["privileged"]:
        container["securityContext"] = {"privileged": True}
    volumes = [{"name": "studies", "persistentVolumeClaim": {"claimName": settings["volume"]}}]
    if target.platform == "cuda":  # NCCL joins the GPUs of a host through it; 64 MB are there by default
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
        container["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})
    account = {"serviceAccountName": settings["service_account"]} if settings["service_account"] else {}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings["grace_seconds"],
        **account,
        "nodeSelector": node_selector(target, settings),
        "tolerations": tolerations(resource, settings),
        "containers": [container],
        "volumes": volumes,
    }


def environment(name: str, target: Target, settings: Mapping) -> list[dict]:
    """JAX's coordinator, how many hosts there are and which this is; what all of them share.

    Without ``JAX_PLATFORMS`` a host whose accelerator does not start would train on its CPU.
    """
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    joined = [
        {"name": JOINED[0], "value": f"{name}-{HOSTS}-0-0.{name}:{PORT}"},
        {"name": JOINED[1], "value": str(target.hosts)},
        {"name": JOINED[2], "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]
    return [
        *(joined if target.hosts > 1 else []),
        {"name": "JAX_PLATFORMS", "value": f"{target.platform},cpu"},
        {"name": "SCALING_COMPILATION_CACHE", "value": f"{settings['mount']}/cache/xla"},
        *({"name": k, "value": v} for k, v in settings["env"].items()),
    ]


def node_selector(target: Target, settings: Mapping) -> dict:
    """The nodes that are the target: by accelerator and, of a TPU, by the slice's shape."""
    if target.platform == "tpu":
        found = {
            "cloud.google.com/gke-tpu-accelerator": TPUS[target.generation],
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, target.shape)),
        }
    else:
        found = {"cloud.google.com/gke-accelerator": GPU_NODES[target.generation]}
    if settings["spot"]:
        found["cloud.google.com/gke-spot"] = "true"
    if settings["reservation"]:
        found["cloud.google.com/reservation-name"] = settings["reservation"]
    return found


def tolerations(resource: str, settings: Mapping) -> list[dict]:
    """GKE taints nodes with accelerators, and may taint those that can be taken away."""
    found = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if settings["spot"]:
        spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
        found.append({**spot, "effect": "NoSchedule"})
    return found


def desk(settings: Mapping) -> str:
    """A pod without an accelerator that sees the volume: to copy the study there, look at it and collect."""
    made = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "scaling-desk", "namespace": settings["namespace"]},
        "spec": {
            "containers": [
                {
                    "name": "desk",
                    "image": settings["image"],
                    "command": ["sleep", "infinity"],
                    "workingDir": settings["mount"],
                    "env": [{"name": "JAX_PLATFORMS", "value": "cpu"}],
                    "volumeMounts": [{"name": "studies", "mountPath": settings["mount"]}],
                }
            ],
            "volumes": [{"name": "studies", "persistentVolumeClaim": {"claimName": settings["volume"]}}],
        },
    }
    return as_yaml(
        ["# Sees the volume and has no accelerator: to copy the study there and look at it."], made
    )


def readme(study: Path, target: Target, settings: Mapping, jobs: Sequence) -> str:
    """How to apply the files, for the person who has them."""
    name, space, mount = study.resolve().name, settings["namespace"], settings["mount"]
    chips = len(jobs) * target.chips
    label = labels(study, settings)["scaling/study"]
    kueue = (
        f"Kueue admits them from the queue `{settings['queue']}` as its quota allows."
        if settings["queue"]
        else "No queue is set: all of them ask for their nodes at once."
    )
    return f"""# {name} on {target}

{len(jobs)} JobSets of {sum(map(len, jobs))} cells, {target.chips} chips each ({chips} if all run at once).
{kueue}
They need the cluster's JobSet controller (0.6 or newer) and the volume claim `{settings["volume"]}`.

```
kubectl apply -f desk.yaml
kubectl -n {space} wait --for=condition=Ready pod/scaling-desk --timeout=10m
kubectl -n {space} exec scaling-desk -- mkdir -p {mount}/studies
kubectl -n {space} cp {study} scaling-desk:{mount}/studies/{name}     # the plan; and the data, see below
kubectl apply -f jobs/
kubectl -n {space} exec scaling-desk -- scaling status studies/{name}
kubectl -n {space} exec scaling-desk -- scaling collect studies/{name}
kubectl -n {space} cp scaling-desk:{mount}/studies/{name} {study}     # everything back
kubectl delete -f jobs/ -f desk.yaml
```

Data that the config names by a relative path is looked for below `{mount}`. All JobSets of the study:
`kubectl -n {space} get jobset -l scaling/study={label}`. To save and stop: `scaling cancel studies/{name}` at
the desk. To go on, or to run a job again: `rm -f studies/{name}/cancelled` at the desk, then
`kubectl replace --force -f jobs/`; a cell that has a result is not trained again. Cells that were given up
are tried again by files written with a larger `--max-failures`.
"""
