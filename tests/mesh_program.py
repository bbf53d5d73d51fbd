"""A cell trained on 8 simulated devices in several ways; run by test_mesh in a process of its own.

python -m tests.mesh_program CORPUS FOLDER: prints one JSON object.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from kills import Killed
from tiny_study import tiny_cell

from scaling.digest import digest
from scaling.files import CellFolder, read_jsonl
from scaling.lane import Lane
from scaling.mesh import MeshShape, make_mesh
from scaling.optim import hyper_parameters
from scaling.program import Static, placed_first_state
from scaling.train import Execution, train

WAYS = {
    "alone": Execution(),
    "1,2,1": Execution(mesh=MeshShape(1, 2, 1)),
    "1,4,1": Execution(mesh=MeshShape(1, 4, 1)),
    "1,8,1": Execution(mesh=MeshShape(1, 8, 1)),
    "2,2,2 in parts": Execution(mesh=MeshShape(2, 2, 2), accumulate=2),
}


EXPERT_WAYS = {
    "alone": Execution(),
    "1,1,1,2": Execution(mesh=MeshShape(expert=2)),
    "1,2,1,2": Execution(mesh=MeshShape(fsdp=2, expert=2)),
    "1,1,2,4": Execution(mesh=MeshShape(tensor=2, expert=4)),
}


def experts_cell(corpus):
    experts = {"family": "moe", "experts": 4, "capacity_factor": 1.2, "shared_experts": 1}
    model = {"layers": 1, "kv_heads": 2, **experts}
    return tiny_cell(corpus, model=model, train={"batch": 6, "steps": 8})


def the_cell(corpus):
    return tiny_cell(
        corpus,
        model={"d_model": 32, "layers": 1, "heads": 4, "kv_heads": 2, "tied": False},
        train={"batch": 6, "steps": 12},  # not a multiple of the devices: rows are filled up
    )


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_jsonl(folder.metrics) if "loss" in row]


def main(corpus, folder):
    cell, out = the_cell(corpus), {"losses": {}, "final": {}, "devices": {}}
    for name, execution in WAYS.items():
        where = CellFolder(folder, name.replace(",", "-"))
        result = train(cell, where, execution)
        out["losses"][name], out["final"][name] = losses(where), result["loss"]
        out["devices"][name] = result["devices"]

    cell_of_experts, out["experts"] = experts_cell(corpus), {}
    for name, execution in EXPERT_WAYS.items():
        where = CellFolder(folder, f"experts {name}".replace(",", "-"))
        result = train(cell_of_experts, where, execution)
        out["experts"][name] = [*losses(where), result["loss"]]

    # killed on eight devices, gone on with on two, then on one
    where, kill_after = CellFolder(folder, "resumed"), {"step": 0}
    save = Lane.save

    def save_and_die(lane, state):
        save(lane, state)
        if lane.done == kill_after["step"]:
            raise Killed

    Lane.save = save_and_die
    for step, shape in ((4, MeshShape(1, 8, 1)), (8, MeshShape(1, 2, 1)), (None, None)):
        kill_after["step"] = step
        try:
            out["final"]["resumed"] = train(cell, where, Execution(mesh=shape, checkpoint_steps=4))["loss"]
        except Killed:
            continue
    out["losses"]["resumed"] = losses(where)
    out["resumed_from"] = json.loads(where.timing.read_text())["resumed_from_step"]

    static, hp = Static.of(cell), hyper_parameters(cell)
    meshes = [None, make_mesh(MeshShape(2, 2, 2)), make_mesh(MeshShape(1, 8, 1))]
    states = [placed_first_state(static, 0, hp, mesh) for mesh in meshes]
    out["digests"] = [digest(states[0])]
    out["digests"] += [digest(jax.tree.map(moved_like, states[0], s)) for s in states[1:]]
    out["same_start"] = [
        max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs_of(states[0], s))
        for s in states[1:]
    ]
    gate = states[2].params["blocks"]["ffn"]["gate"]
    out["part"] = gate.addressable_shards[0].data.shape
    out["moments"] = str(states[2].opt_state[1].mu["blocks"]["ffn"]["gate"].sharding.spec)
    print(json.dumps(out))


def moved_like(x, like):
    return jax.device_put(x, like.sharding)


def pairs_of(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
