"""The files of a launch for a small planned study, made by the package's own functions."""

from launch import jobset, skypilot
from launch.planning import manifest_of
from launch.pods import read_settings
from launch.preflight.hardware import parse_target
from scaling.grid import write_manifest
from scaling.study import validate_study

SETTINGS = """
[jobset]
image = "registry.example/scaling:1"
volume = "studies"
queue = "tpus"
priority = "low"
service_account = "trainer"
reservation = "r1"
spot = true
privileged = true
cpu = "24"
memory = "96Gi"
env = {LIBTPU_INIT_ARGS = "--x=1"}
[skypilot]
infra = "gcp/us-east5"
nfs = "10.0.0.2:/studies"
env = {LIBTPU_INIT_ARGS = "--x=1"}
"""
OPTIONS = {
    "checkpoint_seconds": 60.0, "wandb": "off", "pack": "auto", "max_failures": 2, "max_preemptions": 50,
    "remat": "none", "accumulate": 1,
}  # fmt: skip


def files(folder, on: str, target: str) -> dict[str, str]:
    """Name to text of what ``scaling launch --on ON --dry-run --target TARGET`` writes."""
    config = {
        "name": "tiny",
        "grid": {"kind": "product", "params": [3e3], "tokens": [4e4, 8e4], "min_steps": 1, "tolerance": 1.0},
        "data": {"source": "random_walk", "vocab": 16, "tokens": 200_000, "seq": 32},
        "model": {"head_dim": 8},
        "recipe": {"params": 6e3, "tokens": 3e4, "lr": 1e-2, "batch_tokens": 4096, "width_per_layer": 16.0,
                   "width_multiple": 8, "ffn_multiple": 8, "min_warmup_steps": 2},
        "eval": {"sequences": 16},
    }  # fmt: skip
    study = folder / "tiny"
    write_manifest(study, manifest_of(validate_study(config)), False)
    (folder / "settings.toml").write_text(SETTINGS)
    engine, where = {"jobset": jobset, "skypilot": skypilot}[on], parse_target(target)
    settings = read_settings(folder / "settings.toml", on, engine.SETTINGS)
    mesh = f"1,{where.devices},1" if where.devices > 1 else None
    return engine.files(study, where, settings, OPTIONS | {"mesh": mesh})
