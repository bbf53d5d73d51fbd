"""Which trained cell to export, and its parameters from the study folder."""

from __future__ import annotations

from pathlib import Path

import jax

from scaling.checkpoint import Checkpoints
from scaling.claims import FolderStore, Keeper, Observer
from scaling.config import validate_cell
from scaling.export import check_expressible, export_model, hf_config, safetensors_writer
from scaling.files import CellFolder, StudyError, read_json
from scaling.optim import hyper_parameters
from scaling.program import Static, first_state
from scaling.records import progress
from scaling.step import eval_params
from scaling.trainers import refuse


def choose_cell(study: Path | str, which: str) -> dict:
    """The row of ``scaling.records.progress`` of a cell.

    Args:
      study: the study folder.
      which: a cell's id, "best" (of the finished cells the one of lowest held-out loss) or "last" (the
        one that finished last).

    Raises:
      StudyError: no such cell, or none has finished.
    """
    rows = progress(study)
    if which not in ("best", "last"):
        for row in rows:
            if row["cell"] == which:
                return row
        raise StudyError(f"--cell {which!r} is not a cell of {study}; `scaling status {study}` lists them")
    finished = [row for row in rows if row["status"] == "finished"]
    if not finished:
        raise StudyError(
            f"no cell of {study} has finished; run `scaling run {study}`, or name one with --cell"
        )
    if which == "best":
        return min(finished, key=lambda row: row["loss"])
    return max(finished, key=lambda row: read_json(CellFolder(study, row["cell"]).timing)["finished_at"])


def trained_params(study: Path | str, cell: str) -> tuple[dict, dict, int]:
    """The evaluated parameters of a cell's newest whole checkpoint: (cell config, params, updates done).

    Raises:
      StudyError: the cell is being trained, or has no checkpoint.
    """
    folder = CellFolder(study, cell)
    if folder.config.exists():
        refuse(read_json(folder.config), "scaling export")
    if not folder.checkpoints.is_dir() or not folder.config.exists():
        raise StudyError(
            f"cell {cell} of {study} has no checkpoint; train it with `scaling run {study} --cell {cell}`"
        )
    config = validate_cell(read_json(folder.config))
    check_expressible(config)
    static, seed = Static.of(config), config["train"]["seed"]
    like = jax.eval_shape(lambda: first_state(static, seed, hyper_parameters(config)))
    # opening the checkpoints would remove one that is being written
    with Keeper(Observer()) as keeper, keeper.hold(FolderStore(folder.attempts), cell, "export") as claim:
        if claim is None:
            raise StudyError(f"cell {cell} is being trained; export it when it has ended")
        checkpoints = Checkpoints(folder.checkpoints, cell)
        try:
            restored = checkpoints.restore(like)
        finally:
            checkpoints.close()
            claim.close("released")
    if restored is None:
        raise StudyError(
            f"cell {cell} of {study} has no whole checkpoint; train it with `scaling run {study}`"
        )
    state = restored[0]
    return config, eval_params(static, state), int(state.step)


def export_cell(
    study: Path | str,
    which: str = "best",
    out: Path | str | None = None,
    *,
    dtype: str = "float32",
    tokenizer: Path | str | None = None,
) -> dict:
    """Exports a cell of a study from its newest checkpoint.

    Args:
      study: the study folder.
      which: see ``choose_cell``.
      out: the folder to write; by default ``STUDY/export/CELL``.
      dtype, tokenizer: see ``export_model``.

    Returns:
      ``folder``, ``cell``, ``architecture``, ``dtype``, ``step`` of ``steps``, ``status``, ``loss``.

    Raises:
      ConfigError, StudyError: see ``export_model``, ``choose_cell`` and ``trained_params``.
    """
    row = choose_cell(study, which)
    safetensors_writer()  # before anything is read
    cell, params, step = trained_params(study, row["cell"])
    out = Path(out) if out is not None else Path(study) / "export" / row["cell"]
    loss = row["loss"] if row["status"] == "finished" else None
    about = {"cell": row["cell"], "status": row["status"], "step": step, "loss": loss}
    export_model(params, cell, out, dtype=dtype, tokenizer=tokenizer, about=about)
    architecture = hf_config(cell, dtype)["architectures"][0]
    about |= {"steps": cell["train"]["steps"], "architecture": architecture, "dtype": dtype}
    return {"folder": str(out), **about}
