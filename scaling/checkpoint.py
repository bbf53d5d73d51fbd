"""Checkpoints of a cell: written by Orbax, verified on the way back.

A checkpoint is the train state and a small metadata record (the cell's id, a checksum of every array, the
training seconds so far); it is read back onto whatever devices and processes ask for it. A kill in
mid-save leaves only a temporary folder, which Orbax ignores;
a checkpoint that cannot be read back, or whose checksum differs, is set aside and the one before
it is used.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from scaling import hosts
from scaling.digest import digest
from scaling.files import StorageError, StudyError, explain_os_error

log = logging.getLogger(__name__)


class Manager(ocp.CheckpointManager):
    """Orbax's; it asks nobody about preemption.

    JAX's service takes one count of calls a job, the training loop's (``hosts.asked_to_stop``): a save
    that asked by its step's number would put the processes past the call that they had settled on.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one cell.

    Args:
      folder: where they lie; made if missing.
      cell: the cell's id, stored and compared.
      keep: how many to keep.
      keep_steps: steps whose checkpoints stay whatever their number.
    """

    def __init__(self, folder: Path, cell: str, keep: int = 2, keep_steps: Collection[int] = ()):
        self.folder, self.cell = Path(folder).absolute(), cell
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation.AnyPreservationPolicy(
                [preservation.LatestN(keep), preservation.CustomSteps(sorted(keep_steps))]
            ),
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            create=True,
        )
        try:
            self.manager = Manager(self.folder, options=options)
        except OSError as error:
            raise StorageError(explain_os_error(error, self.folder)) from error

    def save(self, state, seconds: float, device_seconds: float | None = None) -> None:
        """Saves the state at its own step, whole or not at all, with the time it took to come there.

        Raises:
          StorageError: the disk is full or the folder cannot be written.
        """
        step = int(state.step)
        metadata = {"cell": self.cell, "checksum": digest(state), "seconds": seconds}
        metadata["device_seconds"] = seconds if device_seconds is None else device_seconds
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata))
        try:
            self.manager.save(step, args=items, force=True)
            self.manager.wait_until_finished()
        except OSError as error:
            raise StorageError(explain_os_error(error, self.folder)) from error
        except ValueError as error:
            # TensorStore reports a full disk as a ValueError that carries the C error's words
            if "No space left" in str(error):
                raise StorageError(
                    f"the disk is full: no checkpoint could be written in {self.folder}; free some space "
                    "and run the same command again"
                ) from error
            raise

    def restore(self, like) -> tuple[object, dict] | None:
        """The newest checkpoint that reads back whole, and its metadata; None where there is none.

        Args:
          like: a state with the structure, shapes and dtypes expected.

        Raises:
          StudyError: a checkpoint of another cell.
        """
        for step in sorted(self.manager.all_steps(), reverse=True):
            state, metadata, problem = read_step(self.manager, step, like)
            if problem is None:
                if metadata["cell"] != self.cell:
                    raise StudyError(
                        f"{self.folder}/{step} belongs to cell {metadata['cell']}, not {self.cell}; "
                        "remove it or use another study folder"
                    )
                return state, metadata
            log.warning(
                "checkpoint %s/%s is corrupt: %s; the one before it is used", self.folder, step, problem
            )
            self._set_aside(step)
        return None

    @staticmethod
    def restore_from(folder: Path, step: int, like):
        """The state that another cell saved at a step; None where it has none that reads back whole.

        Nothing in that folder is changed: its own cell may be training.
        """
        options = ocp.CheckpointManagerOptions(read_only=True)
        if not hosts.agree((Path(folder) / str(step)).exists()):
            return None
        with ocp.CheckpointManager(Path(folder).absolute(), options=options) as manager:
            state, _, problem = read_step(manager, step, like)
        if problem is not None:
            log.warning("checkpoint %s/%s is corrupt: %s", folder, step, problem)
            return None
        return state

    def _set_aside(self, step: int) -> None:
        source, target = self.folder / str(step), self.folder.parent / f"corrupt-checkpoint-{step}"
        if hosts.is_main():
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(source, target)
        hosts.wait_for_all(f"checkpoint {step} of {self.cell} is set aside")
        self.manager.reload()

    def discard(self) -> None:
        """Removes every checkpoint of the cell."""
        for step in self.manager.all_steps():
            self.manager.delete(step)

    def close(self) -> None:
        self.manager.close()


def read_step(manager, step: int, like) -> tuple[object, dict | None, str | None]:
    """(state, metadata, problem) of one checkpoint; the problem is None where it reads back whole.

    Where a job has several processes, all of them see a problem of any.
    """
    state = metadata = problem = None
    try:
        metadata = manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())).metadata
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state
    except Exception as error:  # Orbax raises many kinds for a damaged file; any means: not usable
        problem = f"it cannot be read ({type(error).__name__})"
    if not hosts.everywhere(problem is None):
        return None, None, problem or "another process cannot read it"
    if "checksum" not in metadata:
        return None, None, "it is of an earlier version, without a checksum"
    if metadata["checksum"] != digest(state):
        return None, None, "its checksum does not match"
    return state, metadata, None
