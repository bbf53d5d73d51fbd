"""Loads the SkyPilot tasks of a folder, in SkyPilot's environment; prints what it understood as JSON."""

import json
import sys
from pathlib import Path

import sky

out = {}
for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
    try:
        task = sky.Task.from_yaml(str(path))
        (asked,) = task.resources
        out[path.stem] = {
            "accelerators": asked.accelerators,
            "arguments": asked.accelerator_args,
            "spot": asked.use_spot,
            "recovery": asked.job_recovery,
            "nodes": task.num_nodes,
            "cloud": str(asked.cloud).lower(),
            "name": task.name,
            "run": task.run,
        }
    except Exception as error:
        out[path.stem] = {"error": str(error)}
print(json.dumps(out))
