"""JobSets against the API's models, their Jobs and pods against Kubernetes' schemas (`make manifests`)."""

import copy

import pytest
import yaml
from manifest_checks import problems
from planned_files import files

kubeflow = pytest.importorskip("kubeflow_trainer_api", reason="needs the extra `manifests`: make manifests")
validate = pytest.importorskip("kubernetes_validate", reason="needs the extra `manifests`: make manifests")

TARGETS = ("v5e-64", "v6e-256", "v5p-16", "tpu7x-128", "h100-8", "h200-16", "v5e")
KUBERNETES = "1.31"


def problems_of_api(manifest: dict) -> list[str]:
    """What the API's models and Kubernetes' schema say of a JobSet; empty where nothing.

    The models alone leave out what they do not know: a round trip must give everything back.
    """
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    try:
        back = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(manifest)).to_dict()
    except Exception as error:
        return [str(error)]
    found = [f"not in the model: {path}" for path in lost(manifest, back)]
    for job in manifest["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
        try:
            validate.validate(whole, KUBERNETES, strict=True)
        except Exception as error:
            found.append(str(error))
    return found


def lost(given, back, path="") -> list[str]:
    """Paths of fields that did not come back, or came back changed."""
    if isinstance(given, dict) and isinstance(back, dict):
        return [x for k in given for x in lost(given[k], back.get(k), f"{path}.{k}")]
    if isinstance(given, list) and isinstance(back, list) and len(given) == len(back):
        return [
            x for i, (a, b) in enumerate(zip(given, back, strict=True)) for x in lost(a, b, f"{path}[{i}]")
        ]
    return [] if given == back else [path]


@pytest.mark.parametrize("target", TARGETS)
def test_manifests_are_valid(tmp_path, target):
    written = files(tmp_path, "jobset", target)
    jobs = [yaml.safe_load(text) for name, text in written.items() if name.startswith("jobs/")]
    assert jobs
    for manifest in jobs:
        assert problems_of_api(manifest) == [] and problems(manifest) == []
    validate.validate(yaml.safe_load(written["desk.yaml"]), KUBERNETES, strict=True)


def test_the_validators_see_typing_errors_at_every_level(tmp_path):
    written = files(tmp_path, "jobset", "v5e-64")
    manifest = yaml.safe_load(next(text for name, text in written.items() if name.startswith("jobs/")))
    job = ("replicatedJobs", 0, "template", "spec")
    pod = (*job, "template", "spec")
    for path, value in (
        (("failurePolicies",), {}),
        (("failurePolicy", "maxRestarts"), "52"),
        (("network", "enableDnsHostnames"), True),
        ((*job, "completion"), 3),
        ((*job, "backoffLimit"), "0"),
        ((*pod, "nodeSelectors"), {}),
        ((*pod, "containers", 0, "workingdir"), "/x"),
        ((*pod, "containers", 0, "env", 0, "value"), 3),
        ((*pod, "volumes", 0, "persistentVolumeClaim"), {"claim": "x"}),
    ):
        wrong = copy.deepcopy(manifest)
        part = wrong["spec"]
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        assert problems_of_api(wrong), path
