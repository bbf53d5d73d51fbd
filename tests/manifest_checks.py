"""What Kubernetes' own validators do not look at in a JobSet: its enumerations, names and cross references.

Typed from the JobSet API v1alpha2 and batch/v1; nothing here is taken from the code under test.
"""

import re

JOB = ("spec", "replicatedJobs", "template", "spec")
POD = (*JOB, "template", "spec")
ENUMS = {
    ("spec", "failurePolicy", "restartStrategy"): {"Recreate", "BlockingRecreate", "InPlaceRestart"},
    ("spec", "failurePolicy", "rules", "action"): {
        "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
        "RestartJobAndIgnoreMaxRestarts",
    },
    ("spec", "failurePolicy", "rules", "onJobFailureReasons"): {
        "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
        "PodFailurePolicy",
    },
    ("spec", "successPolicy", "operator"): {"All", "Any"},
    ("spec", "startupPolicy", "startupPolicyOrder"): {"AnyOrder", "InOrder"},
    (*JOB, "completionMode"): {"Indexed", "NonIndexed"},
    (*JOB, "podFailurePolicy", "rules", "action"): {
        "FailJob", "FailIndex", "Ignore", "Count",
    },
    (*JOB, "podFailurePolicy", "rules", "onExitCodes", "operator"): {
        "In", "NotIn",
    },
    (*POD, "restartPolicy"): {"Never", "OnFailure"},
    (*POD, "tolerations", "operator"): {"Exists", "Equal"},
    (*POD, "tolerations", "effect"): {
        "NoSchedule", "PreferNoSchedule", "NoExecute",
    },
}  # fmt: skip
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


def values_at(value, path):
    """Every value at a path; lists are walked through."""
    if isinstance(value, list):
        return [found for item in value for found in values_at(item, path)]
    if not path:
        return [value]
    return values_at(value[path[0]], path[1:]) if isinstance(value, dict) and path[0] in value else []


def problems(manifest) -> list[str]:
    """What a cluster would refuse of a JobSet, or never get to work; empty where nothing is found."""
    found = []
    for path, allowed in ENUMS.items():
        found += [f"{'.'.join(path)} is {v!r}" for v in values_at(manifest, path) if v not in allowed]
    name, spec = manifest["metadata"]["name"], manifest["spec"]
    if spec["network"]["subdomain"] != name or spec["network"]["enableDNSHostnames"] is not True:
        found.append("network")
    jobs = {job["name"]: job for job in spec["replicatedJobs"]}
    for rule in spec["failurePolicy"].get("rules", []):
        if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]):
            found.append(f"rule {rule['name']!r}")
        found += [f"rule's job {n!r}" for n in rule.get("targetReplicatedJobs", []) if n not in jobs]
    for job in jobs.values():
        inner = job["template"]["spec"]
        pod = inner["template"]["spec"]
        last = f"{name}-{job['name']}-{job['replicas'] - 1}-{inner['completions'] - 1}-xxxxx"
        if len(last) > 63 or not all(map(LABEL.fullmatch, (name, last))) or not name[0].isalpha():
            found.append(f"name {last!r}")
        if inner["parallelism"] != inner["completions"]:
            found.append("parallelism: the hosts must run at once")
        if "podFailurePolicy" in inner and pod["restartPolicy"] != "Never":
            found.append("podFailurePolicy needs restartPolicy Never")
        containers = {c["name"]: c for c in pod["containers"]}
        for rule in inner.get("podFailurePolicy", {}).get("rules", []):
            if rule["onExitCodes"]["containerName"] not in containers or 0 in rule["onExitCodes"]["values"]:
                found.append("podFailurePolicy's container or exit code 0")
        volumes = {v["name"] for v in pod["volumes"]}
        for container in containers.values():
            found += [f"mount {m}" for m in container["volumeMounts"] if m["name"] not in volumes]
            known = {v["name"] for v in container["env"]}
            used = re.findall(r"\$\((\w+)\)", " ".join(container["command"] + container["args"]))
            found += [f"$({v}) is not set" for v in used if v not in known]
            found += ["an empty word of the command"] * (not all(container["command"] + container["args"]))
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            found += [f"{k}: request and limit differ" for k in limits if requests.get(k) != limits[k]]
    return found
