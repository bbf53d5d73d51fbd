"""From a target N to a shape, and from (N, D) to hyper-parameters: pure, cited rules.

Every rule is written relative to a reference cell, a small run whose hyper-parameters were
tuned, so that a constant never hides in an exponent. No rule sees a device: the same (N, D)
gives the same cell on a laptop and on a pod.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from scaling.config import ConfigError, check_keys
from scaling.flops import ledger
from scaling.layers import branches, heads_multiple, pattern

MOST_PARAMS = 1e14  # a typing error above this
MOST_REFUSED = 64  # widths in a row: more steps than blocks or fractions of use ask for


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The rules' constants. Units: tokens, parameters (all of them, embeddings included), FLOPs.

    The reference cell is (params, tokens, batch_tokens, lr, beta2); every field ending in
    ``_exponent`` says how far to move from it.
    """

    params: float
    tokens: float
    lr: float
    batch_tokens: float
    beta2: float = 0.95
    """beta2 at the reference batch; its half-life is kept constant in tokens (Marek et al. 2025)."""
    lr_params_exponent: float = -0.36
    """lr ~ N^-0.36 (Porian et al. 2024, fitted for AdamW at standard parametrisation); 0 where
    ``model.parametrization`` scales the rates itself (``for_parametrization``)."""
    lr_tokens_exponent: float = -0.32
    """lr ~ D^-0.32 at fixed batch (Bjorck et al. 2024)."""
    lr_batch_exponent: float = 0.5
    """lr ~ sqrt(B) for Adam (Malladi et al. 2022)."""
    batch_tokens_exponent: float = 0.383
    """B ~ D^0.383, independent of N (Bergsma et al. 2025, "Power Lines")."""
    min_batch: int = 1
    """Smallest batch, in sequences."""
    tau: float = 0.224
    """AdamW's timescale 1/(lr weight_decay steps) at 20 tokens per parameter (Bergsma et al. 2025)."""
    tau_exponent: float = -0.527
    """tau ~ (D/N)^-0.527 (Bergsma et al. 2025)."""
    max_weight_decay: float = 1.0
    warmup_params: float = 1.0
    """Warm up over this many tokens per parameter (Porian et al. 2024: N tokens) ..."""
    max_warmup_fraction: float = 0.1
    """... but never over more than this share of the run."""
    min_warmup_steps: int = 10
    width_per_layer: float = 64.0
    """Aspect ratio d_model / layers aimed at; the loss is flat around it (Kaplan et al. 2020, figure 5)."""
    width_multiple: int = 64
    """d_model is a multiple of this (and of the head size)."""
    ffn_ratio: float = 8 / 3
    """SwiGLU width over d_model: 8/3 keeps the parameters of a plain 4x MLP (Shazeer 2020)."""
    ffn_multiple: int = 64
    kv_group: int = 1
    """Query heads per key/value head, where it divides the heads (Ainslie et al. 2023)."""


def recipe_from_config(config: Mapping) -> Recipe:
    """The ``recipe`` section of a study config as a ``Recipe``.

    Raises:
      ConfigError: an unknown key, a missing reference value, or one that is not a positive number
        (exponents may have any sign).
    """
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    check_keys("recipe", config, list(fields))
    values = {}
    for name, field in fields.items():
        if name not in config:
            if field.default is dataclasses.MISSING:
                raise ConfigError(
                    f"recipe.{name} is missing; it must be a positive number (the reference cell)"
                )
            continue
        value = config[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (value <= 0 and not name.endswith("_exponent")):
            raise ConfigError(f"recipe.{name} is {value!r}; it must be a positive number")
        if field.type == "int" and not isinstance(value, int):
            raise ConfigError(f"recipe.{name} is {value!r}; it must be a positive integer")
        values[name] = value
    return Recipe(**values)


def for_parametrization(recipe: Mapping, parametrization: str) -> dict:
    """The ``recipe`` section for a parametrization: under 'mup' and 'completep' the rate has no N in it.

    Those divide the rates of single matrices by the width already; a power of N on top would do it twice.

    Args:
      recipe: the section as written.
      parametrization: ``model.parametrization``.

    Returns:
      The section, with ``lr_params_exponent`` 0 where it was left out and the parametrization asks for it.

    Raises:
      ConfigError: an exponent other than 0 beside a parametrization that scales the rates.
    """
    if parametrization == "standard":
        return dict(recipe)
    exponent = recipe.get("lr_params_exponent", 0.0)
    if exponent != 0:
        raise ConfigError(
            f"recipe.lr_params_exponent is {exponent!r}; it must be 0 (or left out) with "
            f"model.parametrization = {parametrization!r}, which divides the rates by the width itself"
        )
    return {**recipe, "lr_params_exponent": 0.0}


def with_base(recipe: Recipe, model: Mapping, seq: int) -> dict:
    """The size-independent ``model`` fields, with the base shape of 'mup' and 'completep' filled in.

    Where no ``model.base_d_model`` is given the base is the shape of the reference cell, whose
    hyper-parameters are the ones that were tuned.
    """
    name = model.get("parametrization", "standard")
    if name == "standard" or model.get("base_d_model") is not None:
        return dict(model)
    base = shape(recipe, {**model, "parametrization": "standard"}, recipe.params, seq)
    filled = {"base_d_model": base["d_model"], "base_ffn_dim": base["ffn_dim"]}
    return {**model, **filled, **({"base_layers": base["layers"]} if name == "completep" else {})}


def make_shape(recipe: Recipe, model: Mapping, d_model: int, layers: int) -> dict:
    """The whole ``model`` section for a width and a depth.

    Args:
      recipe: the rules.
      model: the fields that do not depend on size; must hold ``head_dim`` and ``vocab``.
      d_model: residual width, a multiple of ``head_dim``.
      layers: number of blocks.
    """
    heads = d_model // model["head_dim"]
    grouped = heads % (recipe.kv_group * heads_multiple(model)) == 0
    kv_heads = heads // recipe.kv_group if grouped else heads
    ffn = recipe.ffn_multiple * max(1, round(recipe.ffn_ratio * d_model / recipe.ffn_multiple))
    return {
        **model,
        "d_model": d_model,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "ffn_dim": ffn,
    }


def shape(recipe: Recipe, model: Mapping, params: float, seq: int) -> dict:
    """The buildable shape nearest to a target N.

    Among all widths (multiples of ``width_multiple`` and of the head size, of two heads where they pair)
    and depths whose N lies within 10 % of the target, the one whose aspect ratio is nearest to
    ``width_per_layer``; where none lies so near, the nearest N. Never fewer layers than the family's
    pattern has.

    Args:
      recipe: the rules.
      model: the fields of the ``model`` section that do not depend on size.
      params: target N, all parameters counted.
      seq: sequence length (the ledger needs it; N does not depend on it).

    Returns:
      A whole ``model`` section; its base shape as in ``with_base``.

    Raises:
      ConfigError: ``params`` is not positive, or is smaller than half the smallest shape.
    """
    model, best, best_key, least = with_base(recipe, model, seq), None, None, math.inf
    for width, layers in _sizes(recipe, model, params, seq):
        least = min(least, width)
        n = _params(recipe, model, width, layers, seq)
        miss = abs(math.log(n / params))
        aspect = abs(math.log(width / depth(model, layers) / recipe.width_per_layer))
        key = (0, aspect, miss) if miss <= math.log(1.1) else (1, miss, aspect)
        if best_key is None or key < best_key:
            best, best_key = (width, layers), key
    if best_key[0] == 1 and best_key[1] > math.log(2):
        period = len(pattern(model))
        smallest = _params(recipe, model, least, period, seq)
        count = f"{period} layers" if period > 1 else "1 layer"
        raise ConfigError(
            f"params is {params:g}; this recipe's smallest shape (d_model {least}, {count}) has {smallest:,}"
        )
    return make_shape(recipe, model, *best)


def fitted_shape(recipe: Recipe, model: Mapping, params: float, seq: int, within: float) -> dict:
    """As ``shape``, with N nearer to its target: the feed-forward's width gives way.

    Among widths, depths and feed-forward widths (multiples of ``ffn_multiple``, from half to twice
    ``ffn_ratio``) with N within ``within`` of the target, the one whose aspect ratio and feed-forward are
    together nearest to the recipe's.

    Raises:
      ConfigError: as ``shape``; or no shape lies so near.
    """
    model, found, nearest = with_base(recipe, model, seq), [], (math.inf, 0)
    for width, layers in _sizes(recipe, model, params, seq, spread=1):
        built = make_shape(recipe, model, width, layers)
        aspect = abs(math.log(width / depth(model, layers) / recipe.width_per_layer))
        for ffn in _feed_forwards(recipe, built, params, seq):
            try:
                n = ledger({**built, "ffn_dim": ffn}, seq).params_total
            except ValueError:  # an expert of no whole number of channels
                continue
            off = abs(math.log(ffn / (recipe.ffn_ratio * width)))
            miss = abs(n / params - 1)
            if off > math.log(2):
                continue
            nearest = min(nearest, (miss, n))
            if miss <= within:
                found.append((aspect + off, miss, width, layers, ffn))
    if not found:
        raise ConfigError(
            f"params is {params:g}; no shape of this recipe lies within {within:g} of it (the nearest has "
            f"{nearest[1]:,}): a smaller recipe.ffn_multiple or width_multiple gives more shapes"
        )
    *_, width, layers, ffn = min(found)
    return {**make_shape(recipe, model, width, layers), "ffn_dim": ffn}


def _feed_forwards(recipe: Recipe, built: Mapping, params: float, seq: int) -> set[int]:
    """The feed-forward's own width, and the two that bring N nearest: N is linear in it."""
    step, own = recipe.ffn_multiple, built["ffn_dim"]
    far = own + 64 * step  # a multiple that the usual fractions of an expert divide
    try:
        here, there = (ledger({**built, "ffn_dim": f}, seq).params_total for f in (own, far))
    except ValueError:
        return {own}
    if there == here:
        return {own}
    wanted = (own + (params - here) / (there - here) * (far - own)) / step
    return {own, *(step * k for k in (math.floor(wanted), math.ceil(wanted)) if k >= 1)}


def _width_step(recipe: Recipe, model: Mapping) -> int:
    return math.lcm(recipe.width_multiple, heads_multiple(model) * model["head_dim"])


def _sizes(recipe: Recipe, model: Mapping, params: float, seq: int, spread: int = 0):
    """(d_model, layers) around a target N: of every width the depths next to it, and ``spread`` beyond.

    Widths that a layer refuses, as blocks or fractions do not divide them, are left out.

    Raises:
      ConfigError: a target that is not positive, or a typing error; ``MOST_REFUSED`` widths in a row that a
        layer refuses.
    """
    if not 0 < params < MOST_PARAMS:
        raise ConfigError(f"params is {params!r}; a target N must be positive and below {MOST_PARAMS:g}")
    step, first = _width_step(recipe, model), True
    # N ~ 12 width^3 / aspect: for large N, widths far from that have no aspect ratio worth trying
    ideal = (params * recipe.width_per_layer / 12) ** (1 / 3)
    width, widest = step, math.inf
    if ideal > 64 * step:
        width, widest = step * int(ideal / 8 / step), 8 * ideal
    period, refused = len(pattern(model)), 0
    while width <= widest:
        try:
            one, two = (_params(recipe, model, width, k, seq) for k in (period, 2 * period))
        except ValueError as error:
            refused += 1
            if refused == MOST_REFUSED:
                raise ConfigError(str(error)) from error
            width += step
            continue
        refused = 0
        if not first and one > 2 * params:
            return
        guess = period * (1 + (params - one) / (two - one))
        around = range(math.floor(guess) - spread, math.ceil(guess) + spread + 1)
        for layers in sorted({max(period, k) for k in around}):
            yield width, layers
        first = False
        width += step


def depth(model: Mapping, layers: int) -> float:
    """Layers as they count in the aspect ratio: one without a feed-forward is half of one."""
    return branches(model, layers) / 2


def _params(recipe: Recipe, model: Mapping, d_model: int, layers: int, seq: int) -> int:
    return ledger(make_shape(recipe, model, d_model, layers), seq).params_total


def batch_sequences(recipe: Recipe, tokens: float, seq: int) -> int:
    """Batch in sequences for a run of D tokens: B ~ D^0.383, rounded to 2^k or 3 x 2^k.

    Those divide well over devices and miss the rule by at most 23 %; the learning rate follows the
    rounded batch.
    """
    wanted = recipe.batch_tokens * (tokens / recipe.tokens) ** recipe.batch_tokens_exponent / seq
    k = math.floor(math.log2(max(1.0, wanted)))
    choices = [2**k, 3 * 2**k // 2, 2 ** (k + 1)]
    return max(recipe.min_batch, min(choices, key=lambda b: abs(math.log(b / max(1.0, wanted)))))


def hparams(recipe: Recipe, params: float, tokens: float, batch_tokens: float) -> dict:
    """Optimizer and warm-up settings for the cell's real N, D and B.

    Args:
      recipe: the rules and the reference cell.
      params: N, all parameters.
      tokens: D, training tokens.
      batch_tokens: B, tokens in one step.

    Returns:
      ``lr``, ``beta2``, ``weight_decay`` (decoupled, multiplied by lr in the update) and
      ``warmup_steps``. Rounded to 4 significant digits, so that a config reads well and hashes alike.
    """
    steps = max(1.0, tokens / batch_tokens)
    lr = (
        recipe.lr
        * (params / recipe.params) ** recipe.lr_params_exponent
        * (tokens / recipe.tokens) ** recipe.lr_tokens_exponent
        * (batch_tokens / recipe.batch_tokens) ** recipe.lr_batch_exponent
    )
    tau = recipe.tau * (tokens / params / 20) ** recipe.tau_exponent
    warmup = min(recipe.warmup_params * params, recipe.max_warmup_fraction * tokens) / batch_tokens
    warmup = max(recipe.min_warmup_steps, math.ceil(warmup))
    return {
        "lr": round4(lr),
        "beta2": round4(recipe.beta2 ** (batch_tokens / recipe.batch_tokens)),
        "weight_decay": round4(min(recipe.max_weight_decay, 1 / (lr * steps * tau))),
        "warmup_steps": min(warmup, max(0, math.floor(steps) - 1)),
    }


def round4(x: float) -> float:
    """``x`` to 4 significant digits."""
    return float(f"{x:.4g}")


class FlopsOfSize:
    """Training FLOPs of (N, D) along a recipe's shapes, for budgets between and beyond the planned cells.

    The ledger is exact only for a shape; between shapes its FLOPs per token are interpolated
    linearly in log N, so that the function is smooth enough to optimise over.
    """

    def __init__(self, recipe: Recipe, model: Mapping, seq: int, convention: str = "exact"):
        self.label = f"{convention} FLOPs of the study's own shapes (seq {seq})"
        step = math.lcm(recipe.width_multiple, heads_multiple(model) * model["head_dim"])
        widths = {step * max(1, round(w / step)) for w in np.geomspace(step, 2**17, 96)}
        period = len(pattern(model))
        per_layer = recipe.width_per_layer * depth(model, period) / period
        depths = {w: max(period, round(w / per_layer)) for w in widths}
        shapes = []
        for width, layers in depths.items():
            with contextlib.suppress(ValueError):  # a width that a layer refuses, as in _sizes
                shapes.append(ledger(make_shape(recipe, model, width, layers), seq))
        points = sorted({s.params_total: s.train_flops_per_token(convention) for s in shapes}.items())
        self.log_n, self.log_f = np.log(np.array(points, float)).T

    def __call__(self, N, D):
        """FLOPs, in the broadcast shape of N and D; beyond the shapes, the end slopes go on."""
        log_n = np.log(np.asarray(N, float))
        inside = np.interp(log_n, self.log_n, self.log_f)
        ends = np.where(log_n < self.log_n[0], log_n - self.log_n[0], np.maximum(0, log_n - self.log_n[-1]))
        return np.exp(inside + ends) * D
