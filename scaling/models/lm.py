"""A decoder-only language model: embedding, stacked layers, final norm, head.

Flax NNX describes the modules; they are split into arrays once, and what leaves this file is a
pure function of a plain nested dict of arrays.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from scaling import parametrization
from scaling.config import ConfigError
from scaling.models import init
from scaling.models.attention import Attention, rope_table
from scaling.models.norm import RMSNorm
from scaling.models.swiglu import SwiGLU

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def times(multiplier: float, x):
    """A multiplier that leaves no trace in the program where it is 1."""
    return x if multiplier == 1 else x * multiplier


class Places:
    """Where arrays lie on one device: where they are. ``scaling.mesh.OnMesh`` has the same methods."""

    def rows(self, x):
        """An array whose first axis is the batch's rows, such as the residual stream [B, T, D]."""
        return x

    def table(self, x):
        """The token table [V, D], about to be looked up."""
        return x


HERE = Places()


class Block(nnx.Module):
    """One pre-norm layer: x + c mixer(norm(x)), then x + c feed-forward(norm(x)); usually c = 1."""

    def __init__(self, cfg, rngs: nnx.Rngs):
        self.mixer_norm = RMSNorm(cfg["d_model"], cfg["norm_eps"])
        self.mixer = Attention(cfg, rngs)
        self.ffn_norm = RMSNorm(cfg["d_model"], cfg["norm_eps"])
        self.ffn = SwiGLU(cfg, rngs)
        self.multiplier = parametrization.branch_multiplier(cfg)

    def __call__(self, x_BTD, rope, segment_ids_BT):
        return self.with_branches(x_BTD, rope, segment_ids_BT)[0]

    def with_branches(self, x_BTD, rope, segment_ids_BT):
        """The stream after the layer, and what mixer and feed-forward added to it, all [B, T, D]."""
        mixed_BTD = times(self.multiplier, self.mixer(self.mixer_norm(x_BTD), rope, segment_ids_BT))
        x_BTD = x_BTD + mixed_BTD
        fed_BTD = times(self.multiplier, self.ffn(self.ffn_norm(x_BTD)))
        return x_BTD + fed_BTD, mixed_BTD, fed_BTD


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
    """The language model; every array of ``blocks`` has a leading axis of length ``layers``."""

    def __init__(self, cfg, rngs: nnx.Rngs, *, unroll: bool = False, remat: str = "none"):
        self.embed = Embedding(cfg, rngs)
        self.blocks = nnx.vmap(lambda layer_rngs: Block(cfg, layer_rngs))(rngs.split(cfg["layers"]))
        self.final_norm = RMSNorm(cfg["d_model"], cfg["norm_eps"])
        if not cfg["tied"]:
            gain = parametrization.vocabulary_gain(cfg)
            self.head = init.matrix(rngs, cfg["d_model"], cfg["vocab"], gain, axes=("d_model", "vocab"))
        self.tied = cfg["tied"]
        self.layers = cfg["layers"]
        self.head_dim, self.rope_theta = cfg["head_dim"], cfg["rope_theta"]
        self.soft_cap = cfg["logits_soft_cap"]
        self.multiplier = parametrization.logit_multiplier(cfg)
        self.cross_document = cfg["cross_document"]
        self.dtype = jnp.dtype(cfg["dtype"])
        self.unroll, self.remat = unroll, remat
        self.places = cfg.get("places", HERE)

    def __call__(self, inputs_BT, segment_ids_BT=None, positions_BT=None):
        """int [B, T] to logits, float32 [B, T, V]."""
        x_BTD, head_DV = self.features(inputs_BT, segment_ids_BT, positions_BT)
        logits_BTV = jnp.matmul(x_BTD, head_DV.astype(self.dtype), preferred_element_type=jnp.float32)
        if self.soft_cap is not None:
            logits_BTV = self.soft_cap * jnp.tanh(logits_BTV / self.soft_cap)
        return logits_BTV

    def features(self, inputs_BT, segment_ids_BT=None, positions_BT=None):
        """int [B, T] to what the head takes, [B, T, D], and the head's matrix, float32 [D, V]."""
        B, T = inputs_BT.shape
        if self.cross_document:
            segment_ids_BT = positions_BT = None
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        rope = rope_table(positions_BT, self.head_dim, self.rope_theta)
        x_BTD = self.places.rows(self.embed(inputs_BT))
        x_BTD = self.run_blocks(x_BTD, rope, segment_ids_BT)
        head_DV = self.embed.table[...].T if self.tied else self.head[...]
        return times(self.multiplier, self.final_norm(x_BTD)), head_DV

    def run_blocks(self, x_BTD, rope, segment_ids_BT):
        """All layers, one after the other: one scanned body, or a Python loop when unrolled."""
        graphdef, stacked = nnx.split(self.blocks)

        def layer(x_BTD, arrays):
            return self.places.rows(nnx.merge(graphdef, arrays)(x_BTD, rope, segment_ids_BT)), None

        if self.remat != "none":
            # Inside a scan nothing can merge the recomputed values with the first ones.
            layer = jax.checkpoint(layer, policy=REMAT[self.remat], prevent_cse=self.unroll)
        if not self.unroll:
            return jax.lax.scan(layer, x_BTD, stacked)[0]
        for i in range(self.layers):
            x_BTD, _ = layer(x_BTD, jax.tree.map(lambda a, i=i: a[i], stacked))
        return x_BTD


@dataclasses.dataclass(frozen=True, eq=False)
class Apply:
    """The model as pure, jittable functions of ``params``, its nested dict of arrays.

    Called: ``apply(params, inputs_BT, segment_ids_BT=None, positions_BT=None)``, float32 logits [B, T, V].
    ``features`` of the same arguments: (x [B, T, D] in the model's dtype, head float32 [D, V]), for a loss
    that never holds the logits; they are ``cap(x @ head)`` with ``soft_cap`` (None: no cap).
    """

    graphdef: nnx.GraphDef
    soft_cap: float | None

    def __call__(self, params, inputs_BT, segment_ids_BT=None, positions_BT=None):
        return nnx.merge(self.graphdef, params)(inputs_BT, segment_ids_BT, positions_BT)

    def features(self, params, inputs_BT, segment_ids_BT=None, positions_BT=None):
        return nnx.merge(self.graphdef, params).features(inputs_BT, segment_ids_BT, positions_BT)


def make_apply(
    model_cfg, *, unroll: bool = False, remat: str = "none", matmul=jnp.matmul, places=HERE
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

    Returns:
      Of ``params``, a nested dict of float32 arrays, those under "blocks" stacked over layers. Segments
      None: a row is one document. Positions None: they count from 0 along the row. With
      ``cross_document`` the row is one stream, so that segments and positions given are not used.

    Raises:
      ConfigError: an unknown remat policy.
    """
    if remat not in REMAT:
        raise ConfigError(f"remat is {remat!r}; it must be one of {', '.join(map(repr, REMAT))}")
    cfg = dict(model_cfg)

    def make(key):
        parts = {**cfg, "matmul": matmul, "places": places}
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
    items = tuple(sorted(dict(model_cfg).items()))
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
