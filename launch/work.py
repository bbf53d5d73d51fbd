"""The life of one worker: it walks the whole list of cells and trains each that it can claim.

Whatever ends a worker, the cell at hand is the only one that has lost anything, and that only since its last
checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import traceback
from pathlib import Path

from launch import packs
from scaling.attempts import LAST_LINES, Budgets, is_cancelled, tally
from scaling.branches import spent_flops
from scaling.chips import peak_flops
from scaling.claims import ClaimLost, FolderStore, Keeper, Observer
from scaling.config import ConfigError, validate_cell
from scaling.files import CellFolder, StorageError, StudyError, explain_os_error, read_json
from scaling.records import read_manifest

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
NEVER = threading.Event()


def job_of(study: Path, entry: dict):
    """A manifest's entry as a ``scaling.lane.Job``."""
    from scaling.lane import Job

    return Job(
        entry["config"],
        CellFolder(study, entry["id"]),
        CellFolder(study, entry["trunk"]) if entry.get("trunk") else None,
        entry.get("fork", 0),
        tuple(entry.get("forks", ())),
    )


def try_cells(study: Path, entries: list[dict], execution, keeper: Keeper, stop=NEVER) -> list[str]:
    """Claims the cells that are free and trains them as one pack; how that ended is kept with each.

    Returns:
      The ids that need no further look in this round: trained, or failed; those of others are left out.

    Raises:
      StorageError: the study cannot be written.
      Preempted: ``stop`` was set, or another process of the job is gone.
    """
    from scaling import hosts
    from scaling.run_trainer import run_trainer
    from scaling.train import Preempted, train_pack

    with contextlib.ExitStack() as claims:
        held, over = {}, []
        for entry in entries:
            folder = CellFolder(study, entry["id"])
            claim = claims.enter_context(keeper.hold(FolderStore(folder.attempts), entry["id"]))
            if claim is not None and folder.result.exists():  # written since we looked
                claim.close("released")
                over.append(entry["id"])
            elif claim is not None:
                held[entry["id"]] = claim
        hosts.agree(list(held))
        if not held:
            if hosts.asked_to_stop():
                raise Preempted
            return over

        def on_step(steps: dict[str, int]) -> bool:
            for name, step in steps.items():
                held[name].at_step(step)
            return stop.is_set()

        for claim in held.values():
            claim.record |= {**device_words(execution), "pack": len(held)}

        jobs = [job_of(study, e) for e in entries if e["id"] in held]
        alone = "trainer" in jobs[0].cell  # in this process: the others wait, see follow
        try:
            if alone:  # never packed
                run_trainer(jobs[0], on_step, execution.checkpoint_seconds)
            else:
                train_pack(jobs, execution, None, on_step)
            reason, final, log = None, False, ""
        except Preempted:
            for claim in held.values() if is_cancelled(study) else ():
                claim.close("released")  # a person's wish is no preemption
            if alone:
                hosts.agree(None)
            raise
        except ClaimLost:
            if hosts.several():
                raise  # the peers are in the middle of a step: they end with this process
            return over
        except StorageError:
            raise
        except (ConfigError, StudyError) as error:  # the same again would end the same
            reason, final, log = str(error), len(held) == 1, traceback.format_exc()
        except Exception as error:
            if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
                raise StorageError(explain_os_error(error, error.filename or study)) from error
            if hosts.is_lost_peer(error):  # the cells are not to blame, and nothing can be agreed on any more
                for claim in held.values():
                    claim.close("preempted", reason=f"another process of the job is gone: {error}")
                raise Preempted from error
            reason, final, log = (
                f"{type(error).__name__}: {error}".splitlines()[0],
                False,
                traceback.format_exc(),
            )
        for name, claim in held.items():
            folder = CellFolder(study, name)
            if folder.result.exists():
                claim.close(read_json(folder.result)["status"])
                continue
            folder.log.write_text(log)
            claim.close("failed", reason=reason, final=final, log=log.splitlines()[-LAST_LINES:])
    if alone and hosts.asked_to_stop():
        raise Preempted
    return [*over, *held]


def work(
    study: Path,
    execution,
    only: list[str] | None = None,
    pack: str = "auto",
    budgets: Budgets | None = None,
    heartbeat: float | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Trains until every cell is done or has used up its budgets.

    Args:
      study: the study folder. execution: how to run. only: the cells to train (and their trunks).
      pack: ``auto``, ``off``, ``turns`` or ``vmap``, see ``launch.packs``.
      budgets: how often a cell is tried again. heartbeat: seconds between heartbeats.
      stop: when set, the cells at hand are saved and ``Preempted`` is raised; so too when the study is
        cancelled, at the next heartbeat.

    Raises:
      StorageError: the study cannot be written; no cell could go on.
    """
    from scaling import hosts
    from scaling.train import Preempted

    budgets, stop = budgets or Budgets(), stop or threading.Event()

    def look() -> None:
        if is_cancelled(study):
            stop.set()

    look()
    # a study planned by an earlier version lacks the fields added since
    entries = [{**e, "config": validate_cell(e["config"])} for e in read_manifest(study)["cells"]]
    wanted = with_their_trunks(entries, only)
    # a trunk first, its branches wait for it; then the most expensive
    order = sorted(wanted, key=lambda e: (e.get("role") != "trunk", -spent_flops(e)))
    if not hosts.is_main():
        try:
            return follow(study, {e["id"]: e for e in wanted}, execution)
        except Exception as error:
            if hosts.is_lost_peer(error):
                raise Preempted from error
            raise
    size_of = pack_size(pack if not hosts.several() else "off")
    with Keeper(Observer() if heartbeat is None else Observer(heartbeat), look) as keeper:
        while waiting := [e for e in order if not is_over(study, e, budgets)]:
            seen: set[str] = set()
            took = False
            for entry in waiting:
                if stop.is_set():
                    hosts.agree(None)
                    raise Preempted
                if entry["id"] in seen or not may_start(study, entry, budgets):
                    continue
                group = [entry]
                if size_of(entry["config"]) > 1 and not has_failed(study, entry):
                    group += [e for e in waiting if e is not entry and e["id"] not in seen]
                    group = [e for e in group if may_start(study, e, budgets) and not has_failed(study, e)]
                    group = packs.form_pack(group, size_of)
                done = try_cells(study, group, execution, keeper, stop)
                took = took or bool(done)
                seen |= {e["id"] for e in group}
            if not took:
                stop.wait(0.5)  # others have them; stay until they are done, to take over what they drop
                hosts.agree([])
                if hosts.asked_to_stop():
                    raise Preempted
            order = waiting
    hosts.agree(None)


def device_words(execution) -> dict:
    """What the attempt's file tells of the devices that the cells share."""
    import jax

    count = jax.device_count() if jax.process_count() > 1 else 1
    if execution.mesh is not None:
        count = execution.mesh.devices
    return {"device_kind": jax.devices()[0].device_kind, "devices": count}


def may_start(study: Path, entry: dict, budgets: Budgets) -> bool:
    """Whether a cell is still to be trained and waits for nothing."""
    return not is_over(study, entry, budgets) and is_ready(study, entry, budgets)


def has_failed(study: Path, entry: dict) -> bool:
    """Whether a cell has failed before: it tries again alone, as its company may have been the reason."""
    return tally(CellFolder(study, entry["id"])).failures > 0


def follow(study: Path, entries: dict[str, dict], execution) -> None:
    """The life of a worker that is not the first process of its job: it trains what the first one takes."""
    from scaling import hosts
    from scaling.train import Preempted, train_pack

    while (names := hosts.agree(None)) is not None:
        with contextlib.suppress(ConfigError, StudyError):  # the first process meets the same and notes it
            if names and "trainer" not in entries[names[0]]["config"]:  # the first process runs these alone
                train_pack([job_of(study, entries[name]) for name in names], execution)
            elif hosts.asked_to_stop():
                raise Preempted


def with_their_trunks(entries: list[dict], only: list[str] | None) -> list[dict]:
    """The entries named in ``only`` (all where None), the trunks that they leave, and the trunks of these."""
    if only is None:
        return entries
    needed, trunk_of = set(), {e["id"]: e.get("trunk") for e in entries}
    for name in only:
        while name is not None and name not in needed:
            needed.add(name)
            name = trunk_of.get(name)
    return [e for e in entries if e["id"] in needed]


def is_over(study: Path, entry: dict, budgets: Budgets | None = None) -> bool:
    """Whether a cell has a result, or has failed or been cut off as often as it may."""
    folder = CellFolder(study, entry["id"])
    return folder.result.exists() or tally(folder).spent(budgets or Budgets())


def is_ready(study: Path, entry: dict, budgets: Budgets | None = None) -> bool:
    """Whether a cell need not wait for a trunk: it has none, or its fork is saved, or no more will come."""
    if not entry.get("trunk"):
        return True
    trunk = CellFolder(study, entry["trunk"])
    own = CellFolder(study, entry["id"]).checkpoints
    there = (trunk.checkpoints / str(entry["fork"])).exists() or (own.exists() and any(own.iterdir()))
    return there or is_over(study, {"id": entry["trunk"]}, budgets)


def pack_size(how: str):
    """config to the most cells that this device should train together."""
    import jax

    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    peak = peak_flops(device.device_kind)
    return lambda config: packs.cells_that_fit(config, how, device.platform == "cpu", peak, memory)
