"""How initialisation, forward multipliers and update sizes follow width and depth.

Rules relative to a base shape, whose hyper-parameters were tuned; at the base shape every rule below is
that of the standard parametrization, and the numbers are its numbers, bit for bit. With
m = d_model / base_d_model, f = ffn_dim / base_ffn_dim, h = head_dim / base_head_dim and
l = layers / base_layers:

======================================  =====================  =====================  =======================
                                        standard               mup                    completep
======================================  =====================  =====================  =======================
vocabulary matrices, init std           1/sqrt(d_model)        1/sqrt(base_d_model)   1/sqrt(base_d_model)
hidden matrices, init std               1/sqrt(fan_in)         1/sqrt(fan_in)         1/sqrt(fan_in)
those that write to the stream, times   1/sqrt(branches)       1/sqrt(branches)       1/sqrt(base's branches)
residual branches, multiplier           1                      1                      1/l
logits, multiplier                      1                      1/m                    1/m
q k^T, multiplier                       1/sqrt(head_dim)       1/sqrt(head_dim h)     1/sqrt(head_dim h)
learning rate: hidden, fan-in d_model   1                      1/m                    1/m
learning rate: feed-forward's output    1                      1/f                    1/f
learning rate: heads' own, fan-in heads 1                      1/h                    1/h
learning rate: vocabulary, vectors      1                      1                      1
weight decay: hidden (times the rate)   1                      m, f                   m, f
Adam's eps: outside the blocks          1                      1/m                    1/m
Adam's eps: inside the blocks           1                      1/m                    1/(m l)
======================================  =====================  =====================  =======================

Sources. Width: Yang et al. 2022, "Tensor Programs V", table 8, the form whose token table and head follow one
rule, so that they may be tied; 1/head_dim attention, definition 4.1. Depth: Dey et al. 2025, "CompleteP",
table 1 with alpha = 1 (general alpha: branches l^-alpha, learning rate inside the blocks l^(alpha - 1), eps
l^-alpha). Weight decay: with the update lr (u + wd w), a rate divided by m and a decay multiplied by m leave
the timescale 1 / (lr wd) alone; Dey et al., table 1. Eps follows the gradients' size: Dey et al., table 1;
Everett et al. 2024, section 4.3.

Why, in one line each: an Adam update has entries of size lr whatever the gradient's size, and is aligned with
its input, so a matrix's output moves by lr x fan_in: the rate goes with 1/fan_in. What a matrix's fan-out is
(fewer key-value heads) does not enter. A token table has one active row, fan-in 1: rate 1; the same table as
a head sums over d_model entries, and the multiplier 1/m on the logits takes that up, tied or not. Queries and
keys align in training, so that their product grows like head_dim, with query-key normalisation or without:
normalised vectors still have size sqrt(head_dim). The branches, 2 x layers of them where every layer has a
feed-forward, move the stream coherently, each by an
amount that does not shrink with depth: 1/l on each keeps the sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax

from scaling.layers import ATTENTION, branches, has, pattern

STANDARD = "standard"
NAMES = (STANDARD, "mup", "completep")

HIDDEN = {
    **dict.fromkeys(("q", "k", "v", "z", "out", "gate", "up"), "width"),
    **dict.fromkeys(("x", "b", "c", "dt", "beta", "i_gate", "f_gate", "o_gate"), "width"),
    **dict.fromkeys(("dt_down", "dt_up", "router", "predictor"), "width"),
    "down": "ffn",
    **dict.fromkeys(("gate_first", "gate_second", "up_first", "up_second", "down_second"), "width"),
    "down_first": "ffn",
    "input_gate": "head",
    "recurrence_gate": "head",
    **dict.fromkeys(("z_recurrent", "i_recurrent", "f_recurrent", "o_recurrent"), "head"),
}
"""Names of the matrices inside the blocks, and of the ratio that their fan-in has to the base's."""

VECTORS = {
    "a_log",
    "dt_bias",
    "decay",
    "skip",
    "conv_bias",
    "filter_bias",
    *("z_bias", "i_bias", "f_bias", "o_bias"),
    "input_bias",
    "recurrence_bias",
    "predictor_bias",
    "router_bias",
    *("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"),
}
"""Names of what multiplies or adds channel by channel, beside the norms' gains."""

TAPS = {"conv", "values", "keys", "filter_in", "filter_out"}
"""Names of what has the same fan-in at all widths: depthwise convolutions, a memory's keys and its values,
which are looked up as the token table is, what makes a long convolution's filter of the distance."""


@dataclasses.dataclass(frozen=True)
class Ratios:
    """The shape over the base shape: ``width`` m, ``ffn`` f, ``head`` h, ``depth`` l; 1 under 'standard'."""

    width: float = 1.0
    ffn: float = 1.0
    head: float = 1.0
    depth: float = 1.0

    @classmethod
    def of(cls, model: Mapping) -> Ratios:
        """Of a ``model`` section (defaults may be left out).

        A base feed-forward width that is not given has the same ratio to the base width as the model's
        own; a base head size that is not given is the model's own (heads grow in number, not in size).
        Depth counts under 'completep' alone.
        """
        name = name_of(model)
        if name == STANDARD:
            return cls()
        width = model["d_model"] / model["base_d_model"]
        ffn, head = model.get("base_ffn_dim"), model.get("base_head_dim")
        return cls(
            width=width,
            ffn=width if ffn is None else model["ffn_dim"] / ffn,
            head=1.0 if head is None else model["head_dim"] / head,
            depth=model["layers"] / model["base_layers"] if name == "completep" else 1.0,
        )


def name_of(model: Mapping) -> str:
    """The parametrization of a ``model`` section."""
    return model.get("parametrization", STANDARD)


def vocabulary_gain(model: Mapping) -> float:
    """The standard deviation of token table and head, times sqrt(d_model)."""
    return math.sqrt(Ratios.of(model).width)


def residual_branches(model: Mapping) -> int:
    """The number of branches that the initial size of the residual-writing matrices goes by."""
    return branches(model, model["base_layers"] if name_of(model) == "completep" else None)


def branch_multiplier(model: Mapping) -> float:
    """What every residual branch is multiplied by."""
    return 1 / Ratios.of(model).depth


def logit_multiplier(model: Mapping) -> float:
    """What the logits are multiplied by, before the soft-cap."""
    return 1 / Ratios.of(model).width


def attention_scale(model: Mapping) -> float | None:
    """The factor of q k^T; None: the usual 1/sqrt(head_dim)."""
    head = Ratios.of(model).head
    return None if head == 1 else 1 / math.sqrt(model["head_dim"] * head)


def update_scales(model: Mapping, params) -> dict | None:
    """What the optimizer multiplies its hyper-parameters by, parameter by parameter.

    For optimizers whose updates have entries of one size (Adam, Lion, sign descent). The update of a
    parameter w is -lr s_lr (u + wd s_wd w), u Adam's direction with eps s_eps.

    Args:
      model: the ``model`` section of a cell config.
      params: the parameter tree (or its shapes), as ``scaling.models.lm.build`` gives it.

    Returns:
      ``lr``, ``eps`` and ``weight_decay``: trees like ``params``, of Python floats; None where every one of
      them is 1: under 'standard', and at the base shape. Which parameters decay at all is not said here.

    Raises:
      ValueError: a parameter that no rule covers.
    """
    ratios = Ratios.of(model)
    if ratios == Ratios():
        return None
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    scales = [_scales(tuple(str(getattr(k, "key", k)) for k in path), ratios) for path, _ in leaves]
    return {
        name: jax.tree_util.tree_unflatten(tree, column)
        for name, column in zip(("lr", "eps", "weight_decay"), zip(*scales, strict=True), strict=True)
    }


def is_vector(path: tuple[str, ...]) -> bool:
    """Whether a parameter (by the names that lead to it) is a norm's gain, a bias or the like."""
    return path[-1] in VECTORS or "norm" in path[-2 if path[-1] == "scale" else -1]


def _scales(path: tuple[str, ...], ratios: Ratios) -> tuple[float, float, float]:
    """Learning rate, eps and weight decay of one parameter, as factors."""
    inside = path[0] == "blocks"
    eps = 1 / (ratios.width * ratios.depth) if inside else 1 / ratios.width
    if is_vector(path) or path in (("embed", "table"), ("head",)) or (inside and path[-1] in TAPS):
        return 1.0, eps, 1.0
    if inside and path[-1] in HIDDEN:
        fan_in = getattr(ratios, HIDDEN[path[-1]])
        return 1 / fan_in, eps, fan_in
    raise ValueError(f"no rule of the parametrization covers the parameter {'.'.join(path)}")


def fold(model: Mapping, params) -> tuple[dict, dict]:
    """The same function of its inputs as a model of the standard parametrization.

    The multipliers go into weights: of the branches into the matrices that write to the stream (or the gains
    of the norms after them), of the logits into the final norm's gain, of q k^T into the queries' norm or
    matrix. What is folded serves for inference and export; it does not train alike.

    Args:
      model: the ``model`` section of a cell config, of any family or pattern.
      params: its parameters.

    Returns:
      A ``model`` section of the standard parametrization, and its parameters.

    Raises:
      ValueError: queries of length one, which have no weight for the multiplier of q k^T.
    """
    usual = {k: None for k in model if k.startswith("base_")} | {"parametrization": STANDARD}
    kinds = pattern(model)
    query = 1 / math.sqrt(Ratios.of(model).head)
    if query != 1 and has(model, "gated_deltanet"):
        raise ValueError(
            f"model.base_head_dim is {model['base_head_dim']} with head_dim {model['head_dim']} beside "
            "'gated_deltanet', whose queries have length one; both must be equal to fold the scale"
        )

    def factor(names):
        if names == ("final_norm", "scale"):
            return logit_multiplier(model)
        if names[0] != "blocks":
            return 1.0
        # of several kinds of layers each has its place in the pattern before its name
        place, own = (0, names[1:]) if len(kinds) == 1 else (int(names[1].split("_")[0]), names[2:])
        last = own[-2:] if model["post_norm"] else own[-1:]
        if last in (POST_NORMS if model["post_norm"] else LAST):
            return branch_multiplier(model)
        return query if own == _queries(model, kinds[place].mixer) else 1.0

    def folded(path, leaf):
        by = factor(tuple(str(getattr(k, "key", k)) for k in path))
        return leaf if by == 1 else leaf * by

    return {**model, **usual}, jax.tree_util.tree_map_with_path(folded, params)


LAST = {("out",), ("down",), ("down_second",)}
"""Names of the matrices that a mixer or a feed-forward ends in."""

POST_NORMS = {("mixer_post_norm", "scale"), ("ffn_post_norm", "scale")}


def _queries(model: Mapping, mixer: str) -> tuple[str, ...] | None:
    """Names of what sets the size of a mixer's queries, where ``attention_scale`` is read."""
    if mixer in ATTENTION and model["qk_norm"]:
        return "mixer", "q_norm", "scale"
    return ("mixer", "q") if mixer in (*ATTENTION, "mlstm") else None
