"""A decoder-only language model: embedding, stacked layers, final norm, head.

Flax NNX describes the modules; they are split into arrays once, and what leaves this file is a
pure function of a plain nested dict of arrays.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from scaling import layers, parametrization
from scaling.config import ConfigError, as_static
from scaling.models import init
from scaling.models.attention import Attention, rope_table
from scaling.models.checkpoint_attention import CheckpointAttention
from scaling.models.depth_router import DepthRouter
from scaling.models.differential_attention import DifferentialAttention
from scaling.models.gated_deltanet import GatedDeltaNet
from scaling.models.gather import put_back, take
from scaling.models.longhorn import Longhorn
from scaling.models.mamba import Mamba
from scaling.models.mamba2 import Mamba2
from scaling.models.memory import Memory
from scaling.models.min_gru import MinGRU
from scaling.models.mlstm import MLSTM
from scaling.models.moe import Density, MoE, sum_of
from scaling.models.monarch import Monarch
from scaling.models.monarch_mixer import MonarchMixer
from scaling.models.mosa import MoSA
from scaling.models.norm import RMSNorm
from scaling.models.places import HERE
from scaling.models.qlstm import QLSTM
from scaling.models.rglru import RGLRU
from scaling.models.selective_attention import SelectiveAttention
from scaling.models.slstm import SLSTM
from scaling.models.swiglu import GeGLU, SwiGLU

MIXERS = {
    "attention": lambda cfg, rngs: Attention(cfg, rngs, cfg["local_window"]),
    "full_attention": lambda cfg, rngs: Attention(cfg, rngs, None),
    "differential_attention": lambda cfg, rngs: DifferentialAttention(cfg, rngs, cfg["local_window"]),
    "selective_attention": lambda cfg, rngs: SelectiveAttention(cfg, rngs, cfg["local_window"]),
    "mosa": MoSA,
    "checkpoint_attention": CheckpointAttention,
    "rglru": RGLRU,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "gated_deltanet": GatedDeltaNet,
    "longhorn": Longhorn,
    "mlstm": MLSTM,
    "slstm": SLSTM,
    "min_gru": MinGRU,
    "qlstm": QLSTM,
    "monarch_mixer": MonarchMixer,
}
FEED_FORWARDS = {"swiglu": SwiGLU, "geglu": GeGLU, "moe": MoE, "memory": Memory, "monarch": Monarch}

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def times(multiplier: float, x):
    """A multiplier that leaves no trace in the program where it is 1."""
    return x if multiplier == 1 else x * multiplier


class Block(nnx.Module):
    """One pre-norm layer: x + c mixer(norm(x)), then x + c feed-forward(norm(x)); usually c = 1.

    With ``post_norm`` each branch is normalised once more before it is added, as in Gemma 2. A layer without
    feed-forward is its mixer alone. A routed layer does so for some tokens of a row, as if there were no
    others, and adds what it makes of each times the router's weight (``DepthRouter``).
    """

    def __init__(self, cfg, rngs: nnx.Rngs, kind: layers.Layer):
        def norm():
            return RMSNorm(cfg["d_model"], cfg["norm_eps"])

        self.mixer_norm, self.mixer = norm(), MIXERS[kind.mixer](cfg, rngs)
        self.feeds, self.post_norm = kind.ffn != "none", cfg["post_norm"]
        self.by_depth, self.chooses = kind.mixer in layers.BY_DEPTH, kind.mixer in layers.CHOOSING
        self.routes = kind.ffn == "moe"
        if self.feeds:
            self.ffn_norm, self.ffn = norm(), FEED_FORWARDS[kind.ffn](cfg, rngs)
        if self.post_norm:
            self.mixer_post_norm = norm()
            if self.feeds:
                self.ffn_post_norm = norm()
        self.multiplier = parametrization.branch_multiplier(cfg)
        self.routed = kind.routed
        if self.routed:
            self.depth_router = DepthRouter(cfg, rngs)

    def __call__(self, x_BTD, rope, segment_ids_BT, depth, training):
        """The stream after the layer, and what the layer adds to the training loss, float32 [B], or None."""
        after_BTD, _, _, extra_B = self.with_branches(x_BTD, rope, segment_ids_BT, depth, training)
        return after_BTD, extra_B

    def with_branches(self, x_BTD, rope, segment_ids_BT, depth, training=False):
        """The stream after the layer, what mixer and feed-forward (or None) added to it, [B, T, D], and what
        is added to the loss; ``depth`` is the layer's number, from 0."""
        if not self.routed:
            return self.of_tokens(x_BTD, rope, segment_ids_BT, depth, training)
        places_BC, weights_BC, extra_B = self.depth_router(x_BTD, training)
        some = jax.tree.map(lambda a: take(a, places_BC), (x_BTD, rope, segment_ids_BT))
        _, *branches, added_B = self.of_tokens(*some, depth, training)
        mixed_BTD, fed_BTD = (
            None if b is None else put_back(b, places_BC, weights_BC, x_BTD.shape[1]) for b in branches
        )
        after_BTD = x_BTD + mixed_BTD if fed_BTD is None else x_BTD + (mixed_BTD + fed_BTD)
        return after_BTD, mixed_BTD, fed_BTD, sum_of(extra_B, added_B)

    def of_tokens(self, x_BTD, rope, segment_ids_BT, depth, training):
        """``with_branches`` of a layer that takes all the tokens it is given."""
        known = (depth,) * self.by_depth + (training,) * self.chooses
        mixed = self.mixer(self.mixer_norm(x_BTD), rope, segment_ids_BT, *known)
        mixed_BTD, extra_B = mixed if self.chooses else (mixed, None)
        if self.post_norm:
            mixed_BTD = self.mixer_post_norm(mixed_BTD)
        mixed_BTD = times(self.multiplier, mixed_BTD)
        x_BTD = x_BTD + mixed_BTD
        if not self.feeds:
            return x_BTD, mixed_BTD, None, extra_B
        fed = self.ffn(self.ffn_norm(x_BTD))
        fed_BTD, fed_B = fed if self.routes else (fed, None)
        if self.post_norm:
            fed_BTD = self.ffn_post_norm(fed_BTD)
        fed_BTD = times(self.multiplier, fed_BTD)
        return x_BTD + fed_BTD, mixed_BTD, fed_BTD, sum_of(extra_B, fed_B)


class Stack(nnx.Module):
    """All layers; every array has a leading axis over the layers of its kind.

    A pattern of one layer is one stack of blocks. A longer one has a stack for each of its positions, named
    by position and mixer, of the layers there from the first on.
    """

    def __init__(self, cfg, rngs: nnx.Rngs):
        kinds = layers.pattern(cfg)
        self.names = tuple(f"{i}_{kind.mixer}" for i, kind in enumerate(kinds))
        for i, (name, kind) in enumerate(zip(self.names, kinds, strict=True)):
            count = len(range(i, cfg["layers"], len(kinds)))
            if count:
                setattr(self, name, stacked(cfg, rngs, kind, count))


def make_blocks(cfg, rngs: nnx.Rngs):
    """The layers' parameters: ``Block`` stacked, or a ``Stack`` of several kinds."""
    kinds = layers.pattern(cfg)
    if len(kinds) > 1:
        return Stack(cfg, rngs)
    return stacked(cfg, rngs, kinds[0], cfg["layers"])


def stacked(cfg, rngs: nnx.Rngs, kind: layers.Layer, count: int) -> Block:
    """``count`` layers of a kind, their arrays stacked."""
    return nnx.vmap(lambda layer_rngs: Block(cfg, layer_rngs, kind))(rngs.split(count))


class Embedding(nnx.Module):
    """The token table, float32 [V, D]; also the head where the model is tied."""

    def __init__(self, cfg, rngs: nnx.Rngs):
        gain = parametrization.vocabulary_gain(cfg)
        values = init.matrix(rngs, cfg["d_model"], cfg["vocab"], gain)[...].T
        self.table = nnx.Param(values, axes=("vocab", "d_model"))
        self.dtype = jnp.dtype(cfg["dtype"])
        self.places = cfg.get("places", HERE)

    def __call__(self, tokens_BT):
        return jnp.take(self.places.table(self.table[...].astype(self.dtype)), tokens_BT, axis=0)


class LM(nnx.Module):
    """The language model; the arrays of ``blocks`` have a leading axis over layers (``Stack``)."""

    def __init__(self, cfg, rngs: nnx.Rngs, *, unroll: bool = False, remat: str = "none"):
        self.embed = Embedding(cfg, rngs)
        self.blocks = make_blocks(cfg, rngs)
        self.final_norm = RMSNorm(cfg["d_model"], cfg["norm_eps"])
        if not cfg["tied"]:
            gain = parametrization.vocabulary_gain(cfg)
            self.head = init.matrix(rngs, cfg["d_model"], cfg["vocab"], gain, axes=("d_model", "vocab"))
        self.tied = cfg["tied"]
        self.layers = cfg["layers"]
        turning = round(cfg["head_dim"] * cfg["rope_fraction"])
        self.turning = turning if layers.has(cfg, *layers.ATTENTION) else 0  # channels of a head
        self.rope_theta = cfg["rope_theta"]
        self.routes = layers.has(cfg, "moe", layers.ROUTED, *layers.CHOOSING)
        self.mixtures = sum(layer.ffn == "moe" for layer in layers.layers(cfg))
        self.relu_routed = self.mixtures > 0 and cfg["router"] == "relu"
        self.soft_cap = cfg["logits_soft_cap"]
        self.multiplier = parametrization.logit_multiplier(cfg)
        self.cross_document = cfg["cross_document"]
        self.dtype = jnp.dtype(cfg["dtype"])
        self.unroll, self.remat = unroll, remat
        self.places = cfg.get("places", HERE)

    def __call__(self, inputs_BT, segment_ids_BT=None, positions_BT=None):
        """int [B, T] to logits, float32 [B, T, V]."""
        return self.logits(*self.features(inputs_BT, segment_ids_BT, positions_BT)[:2])

    def logits(self, x_BTD, head_DV):
        """What ``before_head`` gives to logits, float32 [B, T, V]."""
        logits_BTV = jnp.matmul(x_BTD, head_DV.astype(self.dtype), preferred_element_type=jnp.float32)
        if self.soft_cap is not None:
            logits_BTV = self.soft_cap * jnp.tanh(logits_BTV / self.soft_cap)
        return logits_BTV

    def features(self, inputs_BT, segment_ids_BT=None, positions_BT=None, *, training: bool = False):
        """int [B, T] to what the head takes, [B, T, D], the head's matrix, float32 [D, V], and what routers
        add to the training loss, float32 [B], or None; of ReLU routers their mean ``Density``."""
        B, T = inputs_BT.shape
        if self.cross_document:
            segment_ids_BT = positions_BT = None
        rope = self.rope(positions_BT, (B, T))
        x_BTD = self.places.rows(self.embed(inputs_BT))
        x_BTD, extra_B = self.run_blocks(x_BTD, rope, segment_ids_BT, training)
        return *self.before_head(x_BTD), extra_B

    def before_head(self, x_BTD):
        """The stream after the last layer to what the head takes, [B, T, D], and its matrix, [D, V]."""
        head_DV = self.embed.table[...].T if self.tied else self.head[...]
        return times(self.multiplier, self.final_norm(x_BTD)), head_DV

    def rope(self, positions_BT, shape):
        """The rotary table, positions counted along the row where None; None where nothing turns."""
        if not self.turning:
            return None
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        return rope_table(positions_BT, self.turning, self.rope_theta)

    def run_blocks(self, x_BTD, rope, segment_ids_BT, training: bool = False):
        """All layers, one after the other; what they add to the loss is summed, of a ``Density`` the mean."""

        def layer(x_BTD, block, depth):
            x_BTD, extra_B = block(x_BTD, rope, segment_ids_BT, depth, training)
            if self.routes and extra_B is None:  # layers with and without a router beside each other
                extra_B = jnp.zeros(len(x_BTD), jnp.float32)
            if self.relu_routed and not isinstance(extra_B, Density):
                extra_B = Density(jnp.zeros_like(extra_B), jnp.zeros_like(extra_B), extra_B)
            return self.places.rows(x_BTD), extra_B

        x_BTD, extra_LB = self.fold_layers(x_BTD, layer)
        extra_B = jax.tree.map(lambda x_LB: jnp.sum(x_LB, axis=0), extra_LB)
        if self.relu_routed:
            l1_B, share_B, other_B = extra_B
            extra_B = Density(l1_B / self.mixtures, share_B / self.mixtures, other_B)
        return x_BTD, extra_B

    def fold_layers(self, x, layer):
        """``x, out = layer(x, block, depth)`` over all layers: a scan over repeats, or a Python loop.

        Returns the last x and the outs of all layers, stacked. ``unroll`` and ``remat`` are as for the model.
        """
        stacks = self.stacks()

        def call_of(graphdef):
            def call(x, arrays, depth):
                return layer(x, nnx.merge(graphdef, arrays), depth)

            if self.remat == "none":
                return call
            # Inside a scan nothing can merge the recomputed values with the first ones.
            return jax.checkpoint(call, policy=REMAT[self.remat], prevent_cse=self.unroll)

        calls = [call_of(graphdef) for graphdef, _ in stacks]
        whole = 0 if self.unroll else self.layers // len(stacks)

        def period(x, repeat):
            arrays, first = repeat
            outs = []
            for i, (call, own) in enumerate(zip(calls, arrays, strict=True)):
                x, out = call(x, own, first + i)
                outs.append(out)
            return x, outs

        parts = []
        if whole:
            # all of an array where no layer is left over
            repeats = [jax.tree.map(lambda a: a if len(a) == whole else a[:whole], own) for _, own in stacks]
            x, outs = jax.lax.scan(period, x, (repeats, len(stacks) * jnp.arange(whole)))
            in_order = lambda *a: jnp.stack(a, 1).reshape(-1, *a[0].shape[1:])  # noqa: E731
            parts.append(jax.tree.map(in_order, *outs))
        for k in range(whole * len(stacks), self.layers):
            turn, i = divmod(k, len(stacks))
            x, out = calls[i](x, jax.tree.map(lambda a, turn=turn: a[turn], stacks[i][1]), jnp.int32(k))
            parts.append(jax.tree.map(lambda a: a[None], out))
        return x, jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

    def stacks(self):
        """(graphdef, arrays stacked over layers) of every position of the pattern."""
        if not isinstance(self.blocks, Stack):
            return [nnx.split(self.blocks)]
        return [
            nnx.split(getattr(self.blocks, name)) for name in self.blocks.names if hasattr(self.blocks, name)
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class Apply:
    """The model as pure, jittable functions of ``params``, its nested dict of arrays.

    Called: ``apply(params, inputs_BT, segment_ids_BT=None, positions_BT=None)``, float32 logits [B, T, V].
    ``features`` of the same arguments: (x [B, T, D] in the model's dtype, head float32 [D, V], extra), for a
    loss that never holds the logits; they are ``cap(x @ head)`` with ``soft_cap`` (None: no cap). ``extra``:
    what routers add to the training loss, float32 [B], None without routers, a ``scaling.models.moe.Density``
    where they are ReLU. With ``training`` routed layers choose among the whole row (``DepthRouter``);
    without, and when called, no token sees a later one.
    """

    graphdef: nnx.GraphDef
    soft_cap: float | None

    def __call__(self, params, inputs_BT, segment_ids_BT=None, positions_BT=None):
        return nnx.merge(self.graphdef, params)(inputs_BT, segment_ids_BT, positions_BT)

    def features(self, params, inputs_BT, segment_ids_BT=None, positions_BT=None, *, training=False):
        model = nnx.merge(self.graphdef, params)
        return model.features(inputs_BT, segment_ids_BT, positions_BT, training=training)


def make_apply(
    model_cfg, *, unroll: bool = False, remat: str = "none", matmul=jnp.matmul, places=HERE, blocks=None
) -> Apply:
    """The model as a pure function.

    Args:
      model_cfg: the "model" section of a cell config, every field present.
      unroll: layers in a Python loop instead of a scan; same parameters, same layout. For
        counting FLOPs and for debugging.
      remat: what the backward pass recomputes: "none", "full" (every layer from its input), "dots"
        (everything but the outputs of the weight matmuls).
      matmul: the layers' products with their weights, x [..., K] and w [K, N] to [..., N]; hashable. For
        simulated low precision (``scaling.precision.matmul_of``).
      places: where arrays lie on a mesh (``scaling.mesh.OnMesh``); hashable.
      blocks: for evaluation, which blocks attention computes (``scaling.models.block_choice.BlockChoice``);
        None: all of them.

    Returns:
      Of ``params``, a nested dict of float32 arrays, those under "blocks" stacked over layers. Segments
      None: a row is one document. Positions None: they count from 0 along the row. With
      ``cross_document`` the row is one stream, so that segments and positions given are not used.

    Raises:
      ConfigError: an unknown remat policy, or blocks for layers that choose tokens.
    """
    if remat not in REMAT:
        raise ConfigError(f"remat is {remat!r}; it must be one of {', '.join(map(repr, REMAT))}")
    cfg = dict(model_cfg)
    if blocks is not None and layers.has(cfg, layers.ROUTED, *layers.NOT_IN_BLOCKS):
        raise ConfigError(
            "blocks are given for a model whose layers choose tokens or see checkpoints alone; they need "
            "rows in order"
        )

    def make(key):
        parts = {**cfg, "matmul": matmul, "places": places, "blocks": blocks}
        return nnx.split(LM(parts, nnx.Rngs(params=key), unroll=unroll, remat=remat))

    graphdef, _ = jax.eval_shape(make, jax.random.key(0))
    return Apply(graphdef, cfg["logits_soft_cap"])


def build(model_cfg, *, seed: int, **options):
    """``make_apply`` of the same options, and ``init_params``: (apply, params)."""
    return make_apply(model_cfg, **options), init_params(model_cfg, seed)


def init_params(model_cfg, seed):
    """The initial parameters, by the config and the seed alone (rule: ``scaling.models.init``).

    Args:
      seed: an integer, which may be traced.
    """
    items = as_static(model_cfg)
    # inside another trace (where even a constant is a tracer) it is a part of that program
    traced = any(isinstance(x, jax.core.Tracer) for x in (seed, jnp.zeros(())))
    return _init_program(alone=not traced)(items, seed)


def _init(cfg_items, seed):
    model = LM(dict(cfg_items), nnx.Rngs(params=jax.random.key(seed)))
    return nnx.to_pure_dict(nnx.state(model))


@functools.cache
def _init_program(alone: bool):
    return jax.jit(_init, static_argnums=0, compiler_options=once_options() if alone else None)


def once_options() -> dict | None:
    """Compiler options for a program that runs once: on CPU the same bits for a third of the compiling."""
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None


def abstract_params(model_cfg):
    """The parameters' shapes and dtypes (``jax.ShapeDtypeStruct``), nothing computed."""
    return jax.eval_shape(lambda: init_params(model_cfg, 0))


def param_axes(model_cfg):
    """What every axis of every parameter is (``scaling.mesh.AXES``), a tree of tuples like the parameters.

    An axis that nothing splits is None; so is the leading one of ``blocks``, over layers.
    """

    def axes_of(variable):
        named = variable.get_metadata().get("axes") or ()
        return (None,) * (variable.get_value().ndim - len(named)) + tuple(named)

    model = nnx.eval_shape(lambda: LM(dict(model_cfg), nnx.Rngs(params=0)))
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(axes_of, nnx.state(model), is_leaf=is_variable))
