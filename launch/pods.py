"""What the engines that write files have in common: which cells make a job, its mesh and command, settings.

``jobset`` and ``skypilot`` give each group of cells to a slice of TPUs or to GPU machines that are not here.
They write one file a group, for a person to read and apply; nothing is submitted from here. Each file
starts ``python -m launch.worker`` with a group's arguments: started again after a preemption, or twice, it
goes on where the study's folder says.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from launch import packs
from launch.engine import Group
from launch.options import as_argument
from launch.preflight.hardware import GENERATIONS, Target, parse_target
from launch.settings import engine_table
from scaling.branches import spent_flops
from scaling.config import ConfigError, check_keys, validate_cell
from scaling.files import CellFolder, StudyError, write_whole
from scaling.records import check_cells, read_manifest

HEADER = "# Written by `scaling launch`; written anew each time."
REQUIRED = object()
LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
"""A name in Kubernetes (RFC 1123), of at most 63 characters."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a section of the settings file.

    Attributes:
      default: its type is the field's; ``REQUIRED``: a text that has none. says: what is valid, for errors.
      pattern: what a text must match where it is not empty. least: of an integer.
    """

    default: object
    says: str
    pattern: str = r"[^\n]*"
    least: int = 0


def read_settings(path: Path | None, section: str, fields: Mapping[str, Setting]) -> dict:
    """A section of a settings file, checked, with its defaults.

    Args:
      path: a TOML file; None: defaults alone. section: its table. fields: what the table may hold.

    Raises:
      ConfigError: no such file, not TOML, a field that is missing, unknown or not valid.
    """
    where = f"settings {str(path)!r}: {section}" if path else f"{section} (no --settings given)"
    table = engine_table(path, section)
    check_keys(where, table, list(fields))
    for name, field in fields.items():
        if field.default is REQUIRED and not table.get(name):
            raise ConfigError(f"{where}: {name} is missing; it must be {field.says}")
        if name in table and not valid(table[name], field):
            raise ConfigError(f"{where}: {name} is {table[name]!r}; it must be {field.says}")
    return {name: table.get(name, field.default) for name, field in fields.items()}


def valid(value, field: Setting) -> bool:
    kind = str if field.default is REQUIRED else type(field.default)
    if type(value) is not kind:
        return False
    if kind is str:
        return value == "" or re.fullmatch(field.pattern, value) is not None
    if kind is dict:
        names = all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", k) for k in value)
        return names and all(isinstance(v, str) for v in value.values())
    return kind is not int or value >= field.least


def refuse_bucket(name: str, value: str) -> None:
    """A study on a URL is refused: its folder is not read from one yet, and a mounted bucket has no links."""
    if "://" in value:
        raise ConfigError(
            f"{name} is {value!r}; a study is not read from a bucket yet, and a mounted bucket has no "
            "hard links for its claims: give a volume that every host mounts (Filestore, NFS, Lustre)"
        )


def short_name(study: Path) -> str:
    """The study's name as Kubernetes takes it: at most 24 letters, digits and dashes, a letter first."""
    words = re.sub(r"[^a-z0-9]+", "-", study.resolve().name.lower()).strip("-")
    words = words if words[:1].isalpha() else f"s-{words}"
    return words[:24].strip("-")


def job_name(study: Path, job: Sequence[Mapping]) -> str:
    """A name for a job, after its first cell: 41 characters at most."""
    return f"{short_name(study)}-{job[0]['id']}"


def groups(
    study: Path, only: Sequence[str], target: Target, options: Mapping, per_job: int
) -> list[list[dict]]:
    """The cells that are to be trained, a list for each job; the most expensive first.

    A trunk and its branches are one job: a branch alone would hold its machines while it waits. Otherwise a
    job has up to ``per_job`` cells of one shape, or as many as the planner packs on a single device.

    Args:
      only: ids of cells; none: all that have no result in this folder. options: of ``scaling launch``.

    Raises:
      StudyError: a cell that the study does not have, or nothing to do.
    """
    from scaling.program import program_key

    check_cells(study)
    entries = [{**e, "config": validate_cell(e["config"])} for e in read_manifest(study)["cells"]]
    known = {e["id"]: e for e in entries}
    for cell in only:
        if cell not in known:
            raise StudyError(f"--cell {cell!r} is not a cell of {study}; `scaling status {study}` lists them")
    wanted = [e for e in entries if not only or e["id"] in only]
    wanted = [e for e in wanted if not CellFolder(study, e["id"]).result.exists()]
    if not wanted:
        raise StudyError(f"nothing to do: all {len(only or known)} cells of {study} have a result")
    wanted.sort(key=spent_flops, reverse=True)
    found: dict[object, list[list[dict]]] = {}
    for entry in wanted:
        trunk = entry.get("trunk") or (entry["id"] if entry.get("role") == "trunk" else None)
        if trunk is not None:
            found.setdefault(trunk, [[]])[0].append(entry)
            continue
        jobs = found.setdefault(program_key(entry["config"]), [[]])
        if len(jobs[-1]) >= max(per_job, packed(entry["config"], target, options)):
            jobs.append([])
        jobs[-1].append(entry)
    jobs = [job for those in found.values() for job in those]
    return sorted(jobs, key=lambda job: -sum(map(spent_flops, job)))


def packed(config: Mapping, target: Target, options: Mapping) -> int:
    """How many cells of a shape a worker trains side by side on the target; as ``launch.worker`` decides."""
    if target.devices > 1 or not packs.may_pack(options):
        return 1
    return packs.cells_that_fit(config, options["pack"], False, target.peak_flops, target.memory)


def worker(job: Sequence[dict], folder: str, target: Target, options: Mapping, joined: str) -> list[str]:
    """The command of each host of a job.

    Args:
      job: its cells. folder: the study's, as the host sees it. options: of ``scaling launch``.
      joined: what ``--distributed`` is, where the target has several hosts.

    Raises:
      StudyError: ``--distributed``, a ``--mesh`` that is not the target's, or a cell that no mesh divides.
    """
    given = dict(options)
    if given.pop("distributed", None):
        raise StudyError("--distributed is what the file says of its hosts; leave it out")
    if target.devices > 1:
        given["mesh"] = mesh_of(job, target, given.get("mesh"))
    elif given.get("mesh"):
        raise StudyError(f"--mesh is {given['mesh']!r}; {target} is one device, which needs none")
    words = ["=".join(as_argument(name, value)) for name, value in given.items()]
    words = [word for word in words if word]
    if target.hosts > 1:
        words.append(f"--distributed={joined}")
    group = Group(Path(folder), tuple(e["id"] for e in job), tuple(words))
    return ["python", "-m", "launch.worker", *group.arguments()]


def mesh_of(job: Sequence[dict], target: Target, given: str | None) -> str:
    """The mesh that a job's cells are split by: as given, or along fsdp as far as there are rows."""
    from launch.preflight.cells import programs
    from launch.preflight.plans import does_not_divide, mesh_for
    from scaling.mesh import MeshShape

    if given:
        if MeshShape.parse(given).devices != target.devices:
            raise StudyError(f"--mesh is {given!r}; {target} has {target.devices} JAX devices")
        return given
    program = programs([job[0]])[0]
    mesh = mesh_for(program, target)
    if mesh is None:
        raise StudyError(
            f"cell {job[0]['id']} does not fit on {target.name}: {does_not_divide(program, target)}; "
            "name a smaller --target, give a --mesh (rows are filled up), or choose others with --cell"
        )
    return str(mesh)


def chips_per_host(target: Target) -> int:
    """Chips (or GPUs) of each host of the target."""
    return target.chips // target.hosts


def check_hosts(target: Target) -> None:
    """Refuses the single chips that no machine has: hosts of v4 and v5p have four, always.

    Raises:
      ConfigError: such a target.
    """
    if target.generation in ("v4", "v5p") and target.chips == 1:
        least = f"{target.generation}-{4 * GENERATIONS[target.generation].cores}"
        raise ConfigError(f"target is {target.name!r}; its smallest machine is {least}, of four chips")


def job_files(
    make: Callable[..., dict],
    jobs: Sequence[Sequence[dict]],
    study: Path,
    target: Target,
    settings: Mapping,
    options: Mapping,
) -> dict[str, str]:
    """``jobs/NAME.yaml`` of every job, made of (name, job, study, target, settings, options)."""
    written = {}
    for job in jobs:
        name = job_name(study, job)
        made = make(name, job, study, target, settings, options)
        written[f"jobs/{name}.yaml"] = as_yaml(describe(job, target), made)
    return written


def describe(job: Sequence[dict], target: Target) -> list[str]:
    """Lines of comment on top of a file: what is trained, on what."""
    cells = [f"#   {e['id']}  {words(e)}" for e in job]
    return [HEADER, f"# {len(job)} cell{'s' * (len(job) > 1)} on {target}:", *cells]


def words(entry: Mapping) -> str:
    done = entry["achieved"]
    role = "" if entry.get("role", "cell") == "cell" else f", a {entry['role']}"
    return f"N {done['params_total']:.3g}, D {done['tokens']:.3g}, {spent_flops(entry):.2g} FLOPs{role}"


def as_yaml(comment: Sequence[str], document: Mapping) -> str:
    """A YAML file: comment, then the fields in the order they were made."""
    return "\n".join(comment) + "\n" + yaml.dump(document, Dumper=Dumper, sort_keys=False, width=110)


class Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and no anchors."""

    def ignore_aliases(self, data) -> bool:
        return True


def _text(dumper, value: str):
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


Dumper.add_representer(str, _text)


def check(on: str, dry_run: bool, target: str | None, workers: int | None) -> None:
    """Refuses, before anything is planned, what these engines cannot do.

    Raises:
      StudyError: it says what to give in its place.
    """
    how = {"jobset": "kubectl apply -f DIR/jobs", "skypilot": "sky jobs launch"}[on]
    if not dry_run:
        raise StudyError(
            f"--on {on} writes files and submits nothing: add --dry-run, look at them, then `{how}`"
        )
    if not target:
        raise StudyError(
            f"--on {on} needs --target: what each job runs on, such as v5e-64, v6e-256 or h100-8"
        )
    if workers:
        raise StudyError(f"--workers is for --on local; with --on {on} each host has one worker")


def write(
    on: str,
    study: Path,
    target: str,
    settings: Path | None,
    out: Path | None,
    only: Sequence[str],
    options: Mapping,
) -> dict:
    """Writes the files of ``jobset`` or ``skypilot`` for a planned study; what was written, in numbers."""
    from launch import jobset, skypilot

    engine = {"jobset": jobset, "skypilot": skypilot}[on]
    where, out = parse_target(target), out or study / on
    files = engine.files(study, where, read_settings(settings, on, engine.SETTINGS), options, only)
    write_files(out, files)
    jobs = [text for name, text in files.items() if name.startswith("jobs/")]
    cells = sum(text.count("\n#   ") for text in jobs)
    return {"outcome": "dry run", "folder": str(out), "target": str(where), "jobs": len(jobs), "cells": cells,
            "files": list(files)}  # fmt: skip


def write_files(out: Path, files: Mapping[str, str]) -> None:
    """Writes the files of a launch and removes those of an earlier one, so that none is applied by mistake.

    Raises:
      StudyError: a file stands there that was not written by us.
    """
    jobs = list((out / "jobs").glob("*.yaml")) if out.exists() else []
    for path in jobs:
        if not path.read_text().startswith(HEADER):
            raise StudyError(f"{path} was not written by `scaling launch`; name another folder with --out")
    for path in jobs:
        path.unlink()
    for name, text in files.items():
        write_whole(out / name, text)
