"""The run table: what was trained, at what cost, with which result and status.

One row a (cell, eval point). The study folder is the database; this file reads it, writes the
table as CSV or Parquet, and reads such tables back, ours or another framework's. Light: numpy
and pandas.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.attempts import attempts_begun, attempts_of, tally
from scaling.branches import spent_flops
from scaling.chips import peak_flops
from scaling.claims import outcome
from scaling.config import cell_id, validate_cell
from scaling.files import CellFolder, StudyError, read_json, read_jsonl, write_whole
from scaling.sentinels import brackets, words
from scaling.trainers import account_of, columns_of, tokens_per_step

if TYPE_CHECKING:  # a second of start that workers and status need not wait for
    import pandas as pd

RESULTS = ("finished", "diverged")
STATUSES = ("finished", "diverged", "failed", "preempted", "running", "planned")

PROBES = {
    "copy_loss": "nats a token of the second pass over a passage of random tokens (Jelassi et al. 2024)",
    "copy_gain": "nats a token that the second pass is better than the first",
    "recall_loss": "nats of the value of a random pair whose key is met again (Arora et al. 2023)",
    "recall_gain": "nats that it is better than at the first time",
    "ngram_loss": "nats a held-out token that ends a 4-gram met before in its document (Akyurek et al. 2024)",
    "novel_loss": "nats a held-out token that does not",
    "loss_2x": "nats a held-out token at positions from the trained length to twice it",
    "loss_4x": "nats a held-out token at positions from twice the trained length to four times it",
}
"""Results of ``eval.probes``, at a cell's last evaluation (``scaling.probes``)."""

COLUMNS = {
    "study": "name of the study",
    "cell": "id of the cell: a hash of its config",
    "run": "number of the last attempt at the cell; 0 before the first",
    "family": "model family; of a trainer's cells, what they share but for size, steps and seed",
    "trainer": "what was trained, where it is no language model (scaling.trainers)",
    "seed": "training seed (initialisation and data order)",
    "role": "cell, trunk (constant rate: not for a fit), branch (a cooldown that left a trunk) or sentinel "
    "(off the recipe on purpose: not for a fit)",
    "status": "one of " + ", ".join(STATUSES),
    "reason": "why a run did not finish",
    "final": "True on the row of the cell's last evaluation, at its own D",
    "budget": "planned training FLOPs, where the plan has budgets",
    "params": "N: all parameters",
    "params_total": "N: all parameters",
    "params_active": "parameters used by one token",
    "params_embedding": "parameters of the token embedding and the head",
    "params_nonembedding": "the others",
    "tokens": "D: training tokens, repeated ones counted again",
    "unique_tokens": "different training tokens seen",
    "epochs": "passes over the training data",
    "flops": "training FLOPs up to here, exact ledger (causal half)",
    "flops_spent": "of the exact ledger's FLOPs, those that this cell itself cost: of a branch, its cooldown",
    "flops_full": "training FLOPs, attention counted as a full square",
    "flops_6N_total": "6 N_total D",
    "flops_6N_nonembedding": "6 N_nonembedding D",
    "flops_kaplan": "Kaplan et al. 2020, table 1",
    "loss": "held-out cross-entropy, nats per token",
    "loss_stderr": "its standard error over held-out sequences",
    "bits_per_byte": "held-out cross-entropy, bits per byte of text",
    **PROBES,
    "block_loss": "the loss of attention in the blocks of eval.block_threshold alone, at the last evaluation",
    "batch_tokens": "tokens in one step",
    "steps": "updates in the whole cell",
    "lr": "peak learning rate",
    "weight_bits": "bits an element of the weights in the layers' matmuls (16 or 32 where none is simulated)",
    "activation_bits": "the same of the activations",
    "gradient_bits": "the same of the gradients that flow back",
    "wall_seconds": "wall time of the cell, all attempts that led to the result",
    "device_seconds": "wall time times devices",
    "device_kind": "as JAX names it",
    "devices": "number of devices",
    "tokens_per_second": "training tokens a device-second of steps, without compiling, evaluations and saves",
    "mfu": "exact FLOPs per device-second of steps over the device's peak, where the peak is known",
    "peak_bytes": "peak device memory, where the device tells",
    "spikes": "times the training loss jumped from its own course",
    "skipped_steps": "updates that the guard against spikes left out",
    "open_experts": "of ReLU routers: experts whose gate is open for a token, mean over layers and logged "
    "steps; the ledger counts active_experts, its target",
    "dense_cell": "of an up-cycled cell: the dense cell whose checkpoint its experts were copied from",
    "dense_tokens": "tokens that the dense cell had been trained on there; tokens has the up-cycled "
    "ones alone",
    "dense_flops": "training FLOPs that the dense cell had cost there, exact ledger; flops has none of them",
    "trunk": "cell whose checkpoint this one started from, if any",
    "sentinel_of": "cell whose learning rate or batch this one brackets, if any",
}
CONVENTIONS = {
    "flops": "exact",
    "flops_full": "full",
    "flops_6N_total": "6N_total",
    "flops_6N_nonembedding": "6N_nonembedding",
    "flops_kaplan": "kaplan",
}


def read_manifest(study: Path | str) -> dict:
    """The study's manifest.

    Raises:
      StudyError: there is none, or it cannot be read.
    """
    path = Path(study) / "manifest.json"
    if not path.exists():
        raise StudyError(
            f"{study} is not a study folder: it has no manifest.json; make one with `scaling plan`"
        )
    manifest = read_json(path)
    for key in ("study", "cells", "config", "data"):
        if not isinstance(manifest, dict) or key not in manifest:
            raise StudyError(f"{path} is damaged (no {key!r}); restore it, or plan the study again elsewhere")
    return manifest


def collect(study: Path | str) -> pd.DataFrame:
    """The run table of a study folder.

    A cell without a result has one row with its status (``planned`` or ``running``) and no loss.

    Returns:
      A table with the columns of ``COLUMNS``, planned order.
    """
    manifest = read_manifest(study)
    rows = []
    for entry in manifest["cells"]:
        rows += cell_rows(manifest, entry, CellFolder(study, entry["id"]))
    import pandas as pd

    return pd.DataFrame(rows, columns=list(COLUMNS))


def cell_rows(manifest: Mapping, entry: Mapping, folder: CellFolder) -> list[dict]:
    """The rows of one cell: one an evaluation, the final one last."""
    config = entry["config"]
    account, batch_tokens = account_of(config), tokens_per_step(config)
    base = {
        "study": manifest["study"],
        "cell": entry["id"],
        "run": attempts_begun(folder),
        "seed": config["train"]["seed"],
        "role": entry.get("role", "cell"),
        "trunk": entry.get("trunk"),
        "sentinel_of": entry.get("sentinel", {}).get("of"),
        "budget": entry["target"].get("flops"),
        "params": account.params_total,
        "params_total": account.params_total,
        "params_active": account.params_active,
        "params_embedding": account.params_embedding,
        "params_nonembedding": account.params_nonembedding,
        "batch_tokens": batch_tokens,
        "steps": config["train"]["steps"],
        **columns_of(config),
    }
    if not folder.result.exists():
        status, reason = unfinished(folder)
        return [{**base, "status": status, "reason": reason, "final": True}]
    result = read_result(folder)
    if result["cell"] != entry["id"]:
        raise StudyError(
            f"{folder.result} is of cell {result['cell']}, not {entry['id']}; remove that folder"
        )
    timing = read_json(folder.timing) if folder.timing.exists() else {}
    base |= {
        "status": result["status"],
        "reason": result["reason"],
        "device_kind": result["device_kind"],
        "devices": result["devices"],
        "wall_seconds": timing.get("wall_seconds"),
        "device_seconds": timing.get("device_seconds"),
        "tokens_per_second": timing.get("tokens_per_second"),
        "mfu": mfu(timing.get("flops_per_second"), result["device_kind"]),
        "spikes": result.get("spikes"),
        "skipped_steps": result.get("skipped_steps"),
        "open_experts": result.get("open_experts"),
        "peak_bytes": timing.get("peak_bytes"),
    }
    if result["status"] != "finished":
        return [{**base, "tokens": result["tokens"], "final": True}]
    rows = []
    for score in result["evals"]:
        tokens = score["tokens"]
        share = tokens / result["tokens"]
        rows.append(
            {
                **base,
                "final": tokens == result["tokens"],
                "tokens": tokens,
                "epochs": result["epochs"] * share,
                "unique_tokens": min(result["unique_tokens"], tokens),
                "loss": score["loss"],
                "loss_stderr": score["loss_stderr"],
                "bits_per_byte": score.get("bits_per_byte"),
                **score.get("probes", {}),
                "block_loss": score.get("block_loss"),
                **{c: account.train_flops(tokens, name) for c, name in CONVENTIONS.items()},
            }
        )
        own = tokens - entry.get("fork", 0) * batch_tokens
        rows[-1]["flops_spent"] = account.train_flops(max(0, own), "exact")
    return rows


def mfu(flops_per_second: float | None, device_kind: str) -> float | None:
    """Model FLOPs utilisation: FLOPs per device-second by the exact ledger over the device's peak."""
    peak = peak_flops(device_kind)
    return None if peak is None or flops_per_second is None else flops_per_second / peak


def unfinished(folder: CellFolder) -> tuple[str, str]:
    """Status and reason of a cell without a result."""
    attempts = attempts_of(folder)
    if attempts and outcome(attempts[-1]) is None:
        return "running", "no result yet"
    words = tally(folder, attempts)
    if words.last == "failed":
        return "failed", words.reason
    if attempts or folder.metrics.exists():
        return "preempted", "stopped before its end; run the study again to go on"
    return "planned", "no result yet"


def read_result(folder: CellFolder) -> dict:
    """The result of a cell.

    Raises:
      StudyError: the file is damaged.
    """
    result = read_json(folder.result)
    needs = ("cell", "status", "reason", "loss", "tokens", "evals", "unique_tokens", "epochs")
    missing = [k for k in needs if not isinstance(result, dict) or k not in result]
    if missing:
        raise StudyError(f"{folder.result} is damaged (no {missing[0]!r}); remove it and run the study again")
    return result


def bracket_words(study: Path | str) -> list[tuple[str, bool]]:
    """What the study's sentinels say of its learning rates and batches: sentences, and whether each warns."""

    def loss_of(cell: str) -> tuple[float, float] | None:
        folder = CellFolder(study, cell)
        result = read_result(folder) if folder.result.exists() else {"status": None}
        return (result["loss"], result["loss_stderr"]) if result["status"] == "finished" else None

    return [words(row) for row in brackets(read_manifest(study), loss_of)]


def curves(study: Path | str) -> dict[str, pd.DataFrame]:
    """Training curves: cell id to a table with step, tokens, loss, grad_norm, lr (logged steps)."""
    import pandas as pd

    out = {}
    for entry in read_manifest(study)["cells"]:
        rows = [r for r in read_jsonl(CellFolder(study, entry["id"]).metrics) if "loss" in r]
        if rows:
            out[entry["id"]] = pd.DataFrame(rows)
    return out


def progress(study: Path | str) -> list[dict]:
    """Where every cell stands, from the folder alone: id, role, status, step, steps, loss, seconds.

    A branch begins at its step ``first``; ``flops`` are those that the cell itself costs.
    """
    out = []
    for entry in read_manifest(study)["cells"]:
        folder = CellFolder(study, entry["id"])
        row = {"cell": entry["id"], "step": 0, "steps": entry["config"]["train"]["steps"], "loss": None}
        row |= {"role": entry.get("role", "cell"), "first": entry.get("fork", 0)}
        row |= {"status": "planned", "seconds": None, "reason": None, "flops": spent_flops(entry)}
        if folder.result.exists():
            result = read_result(folder)
            timing = read_json(folder.timing) if folder.timing.exists() else {}
            row |= {"status": result["status"], "loss": result["loss"], "reason": result["reason"]}
            row |= {"step": row["steps"], "seconds": timing.get("wall_seconds")}
        else:
            row["status"], row["reason"] = unfinished(folder)
            last = [r for r in read_jsonl(folder.metrics) if "loss" in r][-1:]
            row |= {k: r[k] for r in last for k in ("step", "loss")}
        out.append(row)
    return out


def check_cells(study: Path | str) -> None:
    """Compares the ids in the manifest with the configs beside them.

    Raises:
      StudyError: a manifest edited by hand, or cells of another config.
    """
    for entry in read_manifest(study)["cells"]:
        if cell_id(validate_cell(entry["config"])) != entry["id"]:
            raise StudyError(
                f"{study}/manifest.json lists cell {entry['id']} with a config that hashes differently; "
                "it was edited, or written by another version: plan the study again in a new folder"
            )


def _read_separated(pd, path: Path, separator: str) -> pd.DataFrame:
    """A CSV or TSV file; pandas would rename a second column of one name, and the first be used unsaid."""
    names = [str(n).strip() for n in pd.read_csv(path, sep=separator, header=None, nrows=1).iloc[0]]
    twice = [n for n in names if names.count(n) > 1 and n != "nan"]
    if twice:
        raise ValueError(f"two columns are named {twice[0]!r}; names must be different")
    other = next((s for s in ";\t," if s != separator and s in names[0]), None) if len(names) == 1 else None
    if other:
        raise ValueError(f"its columns seem to be separated by {other!r}, not {separator!r}")
    return pd.read_csv(path, sep=separator)


READERS = {
    ".csv": lambda pd, path: _read_separated(pd, path, ","),
    ".tsv": lambda pd, path: _read_separated(pd, path, "\t"),
    ".parquet": lambda pd, path: pd.read_parquet(path),
    ".jsonl": lambda pd, path: pd.read_json(path, lines=True),
}
"""Of run tables by their ending: (pandas, path) to a table."""


def read_table(path: Path | str) -> pd.DataFrame:
    """Reads a run table: a study folder, or a CSV, Parquet or JSON-lines file of any framework.

    Raises:
      StudyError: the path is missing, unreadable, empty or of another kind.
    """
    import pandas as pd

    path = Path(path)
    kinds = ", ".join(READERS)
    if (path / "manifest.json").exists():
        return collect(path)
    if path.suffix.lower() not in READERS:
        raise StudyError(f"{path} ends in {path.suffix!r}; give a study folder or a file in {kinds}")
    if not path.is_file():
        raise StudyError(f"{path} is not a file; give a study folder or a run table in {kinds}")
    try:
        table = READERS[path.suffix.lower()](pd, path)
    except Exception as error:  # pandas raises a kind per format; the user needs the file and the words
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StudyError(f"{path} cannot be read as a table: {reason}") from error
    if not len(table):
        raise StudyError(f"{path} has no rows; a run table has one row a run")
    return table


def write_table(table: pd.DataFrame, path: Path | str) -> None:
    """Writes a run table as ``.csv``, ``.parquet`` or ``.jsonl``, whole or not at all.

    Raises:
      StudyError: another ending, or the folder cannot be written.
    """
    path = Path(path)
    if path.suffix == ".csv":
        content = table.to_csv(index=False)
    elif path.suffix == ".parquet":
        content = table.to_parquet(index=False)
    elif path.suffix == ".jsonl":
        content = table.to_json(orient="records", lines=True)
    else:
        raise StudyError(f"{path} ends in {path.suffix!r}; write a run table as .csv, .parquet or .jsonl")
    write_whole(path, content)
