"""Trained dense models in Hugging Face's format: ``config.json`` and safetensors.

The architectures that hold our transformer to the last operation:

  Llama    no query-key norm (Touvron et al. 2023)
  Mistral  Llama with a local window in every layer (Jiang et al. 2023)
  Qwen3    query-key norm, with or without the window (Yang et al. 2025)

Matrices change from our [in, out], stacked over layers, to their [out, in], one a layer; the multipliers of
a parametrization go into weights (``scaling.parametrization.fold``). A row of
``transformers``' input is one document or, for a model with ``cross_document``, one stream of documents.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from scaling import __version__
from scaling.config import SCHEMA, ConfigError
from scaling.files import StorageError, StudyError, explain_os_error, write_json
from scaling.parametrization import fold

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

SHARD_BYTES = 5 * 10**9
"""Weights beyond this size are spread over files, none larger but for a single larger matrix."""

BYTE_SOURCES = ("stdlib", "text")
"""Sources whose token ids are the bytes of the text."""

# What the three architectures express; any other field of the model must be at its default.
EXPRESSED = {
    *("family", "vocab", "d_model", "layers", "heads", "kv_heads", "head_dim", "ffn_dim", "tied", "qk_norm"),
    *("rope_theta", "norm_eps", "local_window", "cross_document", "dtype"),
}


def check_expressible(cell: Mapping) -> None:
    """Raises ``ConfigError`` naming the first field of a cell that no architecture here expresses."""
    family = cell["model"]["family"]
    if family != "transformer":
        raise ConfigError(f"model.family is {family!r}; only 'transformer' has an architecture to export to")
    model, _ = fold(cell["model"], {})
    for name, field in SCHEMA["model"].items():
        if name not in EXPRESSED and model[name] != field.default:
            raise ConfigError(
                f"model.{name} is {model[name]!r}; Llama, Mistral and Qwen3 express {field.default!r} alone, "
                "so that this model cannot be exported"
            )
    for name in ("weights", "activations"):  # gradients act on training alone
        if cell["precision"][name] is not None:
            raise ConfigError(
                f"precision.{name} is {cell['precision'][name]!r}; transformers would compute without that "
                "rounding, so that only None can be exported"
            )


def hf_config(cell: Mapping, dtype: str = "float32") -> dict:
    """The content of ``config.json``.

    Args:
      cell: a validated cell config.
      dtype: of the weights as stored, "float32" or "bfloat16".

    Raises:
      ConfigError: a model that cannot be expressed, or an unknown dtype.
    """
    model = cell["model"]
    check_expressible(cell)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(map(repr, DTYPES))}")
    window = model["local_window"]
    kind, extra = "Llama", {}
    if model["qk_norm"]:
        kind, extra = "Qwen3", {"use_sliding_window": window is not None, "sliding_window": window}
        extra["max_window_layers"] = model["layers"] if window is None else 0  # those before it have none
        extra["layer_types"] = ["full_attention" if window is None else "sliding_attention"] * model["layers"]
    elif window is not None:
        kind, extra = "Mistral", {"sliding_window": window}
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "vocab_size": model["vocab"],
        "hidden_size": model["d_model"],
        "intermediate_size": model["ffn_dim"],
        "num_hidden_layers": model["layers"],
        "num_attention_heads": model["heads"],
        "num_key_value_heads": model["kv_heads"],
        "head_dim": model["head_dim"],
        "hidden_act": "silu",
        "rms_norm_eps": model["norm_eps"],
        "rope_theta": model["rope_theta"],
        "tie_word_embeddings": model["tied"],
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": cell["data"]["seq"],
        # Llama's defaults, 1 and 2, are ordinary tokens here; our documents have no marks
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtype,
        **extra,
    }


def hf_weights(params: Mapping, model: Mapping, dtype: str = "float32") -> Iterator[tuple[str, np.ndarray]]:
    """The weights by their Hugging Face names, one after the other, contiguous copies in ``dtype``.

    Args:
      params: as ``scaling.models.lm.build`` gives them; those under "blocks" stacked over layers.
      model: the "model" section of a cell config.
      dtype: "float32" or "bfloat16" (rounded to nearest even).
    """

    def stored(array) -> np.ndarray:
        return array.astype(DTYPES[dtype], order="C")

    # widened first: a multiplier must not be rounded into bfloat16 parameters
    model, arrays = fold(model, jax.tree.map(lambda x: np.asarray(x, np.float32), params))
    blocks = arrays["blocks"]
    mixer, ffn = blocks["mixer"], blocks["ffn"]
    yield "model.embed_tokens.weight", stored(arrays["embed"]["table"])
    for i in range(model["layers"]):
        prefix = f"model.layers.{i}."
        yield prefix + "input_layernorm.weight", stored(blocks["mixer_norm"]["scale"][i])
        for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
            yield f"{prefix}self_attn.{theirs}.weight", stored(mixer[ours][i].T)
        for norm in ("q_norm", "k_norm") if model["qk_norm"] else ():
            yield f"{prefix}self_attn.{norm}.weight", stored(mixer[norm]["scale"][i])
        yield prefix + "post_attention_layernorm.weight", stored(blocks["ffn_norm"]["scale"][i])
        for name in ("gate", "up", "down"):
            yield f"{prefix}mlp.{name}_proj.weight", stored(ffn[name][i].T)
    yield "model.norm.weight", stored(arrays["final_norm"]["scale"])
    if not model["tied"]:
        yield "lm_head.weight", stored(arrays["head"].T)


def export_model(
    params: Mapping,
    cell: Mapping,
    out: Path | str,
    *,
    dtype: str = "float32",
    tokenizer: Path | str | None = None,
    about: Mapping | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a folder for ``transformers``' ``from_pretrained``, whole or not at all.

    Args:
      params: the parameters; cell: their validated cell config.
      out: the folder; it must not exist, or be empty.
      dtype: of the weights as stored: "float32", as trained, or "bfloat16".
      tokenizer: a ``tokenizer.json`` to put beside them. Where the data are bytes and none is given, one is
        written whose ids are bytes.
      about: goes to ``scaling.json`` with the cell config.
      shard_bytes: size of a file of weights from which on another is begun.

    Raises:
      ConfigError: a model that cannot be expressed, or a tokenizer that does not fit it.
      StudyError: ``out`` is in use or cannot be written, or safetensors is not installed.
    """
    out, model = Path(out).absolute(), cell["model"]
    config = hf_config(cell, dtype)
    save_file, SafetensorError = safetensors_writer()
    texts = {"config.json": config, "scaling.json": {"version": __version__, **(about or {}), "config": cell}}
    if tokenizer is not None:
        texts["tokenizer.json"] = read_tokenizer(Path(tokenizer), model["vocab"])
    elif is_bytes(cell["data"]):
        texts["tokenizer.json"] = byte_tokenizer()
    if "tokenizer.json" in texts:
        texts["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StudyError(f"{out} exists and is not empty; remove it or give --out another folder")

    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for name, value in texts.items():
            write_json(aside / name, value)
        _write_weights(aside, hf_weights(params, model, dtype), shard_bytes, save_file)
        os.replace(aside, out)
    except OSError as error:
        raise StorageError(explain_os_error(error, out)) from error
    except SafetensorError as error:  # how safetensors reports a failed write
        raise StorageError(
            f"{out} was not written ({error}); free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def safetensors_writer():
    """safetensors' writer and its error."""
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError as error:
        raise StudyError("export needs the package safetensors: pip install 'scaling[hf]'") from error
    return save_file, SafetensorError


def _write_weights(folder: Path, weights, shard_bytes: int, save_file) -> None:
    """``model.safetensors``, or numbered files and their index."""
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush():
        path = folder / f"{len(shards)}.tmp"
        save_file(pending, path, metadata={"format": "pt"})  # transformers asks for the format
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        shards.append(list(pending))
        pending.clear()

    for name, array in weights:
        if pending and sum(a.nbytes for a in pending.values()) + array.nbytes > shard_bytes:
            flush()
        pending[name] = array
        total += array.nbytes
    flush()
    if len(shards) == 1:
        os.rename(folder / "0.tmp", folder / "model.safetensors")
        return
    index = {"metadata": {"total_size": total}, "weight_map": {}}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"{i}.tmp", folder / file)
        index["weight_map"] |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", index)


def read_tokenizer(path: Path, vocab: int) -> dict:
    """A Hugging Face ``tokenizer.json`` whose ids are all below ``vocab``.

    Raises:
      ConfigError: no such file, another format, or an id that the model does not have.
    """
    try:
        value = json.loads(path.read_text())
        tokens = value["model"]["vocab"]
        ids = list(tokens.values()) if isinstance(tokens, dict) else list(range(len(tokens)))
        ids += [token["id"] for token in value.get("added_tokens") or []]
        highest = max(ids)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"tokenizer is {str(path)!r}; it must be a tokenizer.json of Hugging Face ({error!r})"
        ) from error
    if highest >= vocab:
        raise ConfigError(
            f"tokenizer is {str(path)!r} with ids up to {highest}; they must be below model.vocab = {vocab}"
        )
    return value


def is_bytes(data: Mapping) -> bool:
    """Whether the token ids of a ``data`` section are the bytes of text."""
    return all(part["source"] in BYTE_SOURCES for part in data["components"] or [data])


def byte_tokenizer() -> dict:
    """A ``tokenizer.json`` whose token ids are the UTF-8 bytes of the text.

    It is GPT-2's byte-level BPE (Radford et al. 2019, section 2.2) without merges: each byte is written
    as one printable character, its own where it has one, else the next from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    vocab = {chr(b if b in printable else 0x100 + others.index(b)): b for b in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
