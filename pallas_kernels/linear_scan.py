"""Diagonal linear recurrence: the public function, its argument checks and its derivative rule."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, sharding
from pallas_kernels.gpu import linear_scan as gpu
from pallas_kernels.tpu import linear_scan as tpu
from pallas_kernels.xla import linear_scan as xla

IMPLEMENTATIONS = {
    "xla": dispatch.Implementation(xla.associative, xla.associative_backward),
    "xla_chunked": dispatch.Implementation(xla.in_place, xla.in_place_backward),
    "pallas_tpu": dispatch.Implementation(tpu.forward, tpu.backward, tpu.refuses),
    "pallas_gpu": dispatch.Implementation(gpu.forward, gpu.backward, gpu.refuses),
}

# token by token is quickest on a CPU and slowest where steps are cheap beside their start
PREFERRED = {"tpu": ("pallas_tpu", "xla"), "cuda": ("xla",), "cpu": ("xla_chunked", "xla")}


def linear_scan(
    a,
    b,
    h0=None,
    *,
    reverse: bool = False,
    segment_ids=None,
    implementation: str | Sequence[str] | None = None,
    block_sizes: tuple[int, int] | None = None,
):
    """h_t = a_t h_{t-1} + b_t along axis 1, each feature by itself.

    The recurrence of S5 (Smith et al. 2022, eq. 2), LRU (Orvieto et al. 2023, eq. 3), RG-LRU (De et
    al. 2024, eq. 4) and Mamba (Gu and Dao 2023, eq. 2a), diagonal all. The state is carried in float32
    (complex64; float64 and complex128 for inputs of that precision). Letters: B batch, T tokens, F features.

    Args:
      a: [B, T, F] decay, real or complex; F may be several axes, which must be those of ``b``. The TPU
        kernel reads and writes each array once where F is a multiple of 128 and T of 8; others are padded.
      b: the input, of the shape and dtype of ``a``.
      h0: [B, F] state before the first token; zero where None. Any floating dtype, complex only with ``a``.
      reverse: from the last token to the first, h_t = a_t h_{t+1} + b_t.
      segment_ids: int [B, T]; the state is zero again where the id differs from the token before (in the
        direction of the scan). ``h0`` belongs to the segment that is met first.
      implementation: None, ``"xla"`` (``lax.associative_scan``), ``"xla_chunked"`` (token by token in
        place: fastest on a CPU), ``"pallas_tpu"``, ``"pallas_gpu"`` (Hopper), or names in order of
        preference; a single name is taken or refused, never replaced.
      block_sizes: (tokens, features) of one step of a Pallas kernel, multiples of 8 and of 128 (on a GPU 128
        exactly); a default per platform where None. The other implementations have no blocks.

    Returns:
      (h, h_last): h [B, T, F] in the dtype of ``b``; h_last [B, F] the state after the last token met, in
      the dtype of the state. Differentiable in ``a``, ``b`` and ``h0``. The backward pass keeps ``a`` and
      ``h``, and takes the state from ``h`` as it was rounded to the dtype of ``b``.

    Raises:
      ValueError: an argument of the wrong shape, dtype or range, by name; an implementation that is
        unknown, not available or does not take these arguments.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    h0, segment_ids = (None if x is None else jnp.asarray(x) for x in (h0, segment_ids))
    _check(a, b, h0, segment_ids)
    state = jnp.promote_types(a.dtype, jnp.float32)
    B, T, *features = a.shape
    F = math.prod(features)
    h0 = jnp.zeros((B, *features), state) if h0 is None else h0.astype(state)
    resets = None if segment_ids is None else _resets(segment_ids, reverse)
    options = {"reverse": bool(reverse), "block_sizes": _block_sizes(block_sizes)}
    flat = a.reshape(B, T, F), b.reshape(B, T, F), h0.reshape(B, F), resets
    choice = dispatch.choose(
        "linear_scan", implementation, IMPLEMENTATIONS, *flat, preferred=PREFERRED, **options
    )
    h, h_last = _linear_scan(*flat, choice, tuple(options.items()))
    return h.reshape(a.shape), h_last.reshape(B, *features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _linear_scan(a_BTF, b_BTF, h0_BF, resets_BT, choice, options):
    return _run("forward", FORWARD, choice, options, a_BTF, b_BTF, h0_BF, resets_BT)


def _forward_rule(a_BTF, b_BTF, h0_BF, resets_BT, choice, options):
    h_BTF, h_last_BF = _linear_scan(a_BTF, b_BTF, h0_BF, resets_BT, choice, options)
    return (h_BTF, h_last_BF), (a_BTF, h_BTF, h0_BF, resets_BT)


def _backward_rule(choice, options, residuals, cotangents):
    gradients = _run("backward", BACKWARD, choice, options, *residuals, *cotangents)
    primals = residuals[0], residuals[1], residuals[2]  # b has the type of h
    return *(sharding.placed_like(g, x) for g, x in zip(gradients, primals, strict=True)), None


# features are split as heads are; resets may be left out
FORWARD = "b t k, b t k, b k, b t -> b t k, b k"
BACKWARD = "b t k, b t k, b k, b t, b t k, b k -> b t k, b t k, b k"


def _run(which, rule, choice, options, *arrays):
    """The implementation on each device's rows and features."""
    functions = {}
    for name, implementation in IMPLEMENTATIONS.items():
        function = functools.partial(getattr(implementation, which), **dict(options))
        functions[name] = sharding.per_shard_but_none(function, rule, arrays, whole=("t",))
    if dispatch.interpret_mode() and choice == (("any", "pallas_gpu"),):
        # the interpreter of GPU kernels has effects in order, which no partitioner takes
        return getattr(IMPLEMENTATIONS["pallas_gpu"], which)(*arrays, **dict(options))
    return dispatch.run(choice, functions, *(x for x in arrays if x is not None))


_linear_scan.defvjp(_forward_rule, _backward_rule)


def _resets(segment_ids, reverse):
    """bool [B, T]: whether the state is zero before this token. None before the first token met."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, ((0, 0), (0, 1) if reverse else (1, 0)))


def _check(a, b, h0, segment_ids):
    if a.ndim < 3:
        raise ValueError(f"a has shape {a.shape}; it must have at least three axes, batch-token-feature")
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        raise ValueError(f"a has dtype {a.dtype}; it must be a floating or complex dtype")
    if 0 in a.shape:
        raise ValueError(f"a has shape {a.shape}; no axis may be empty")
    if b.shape != a.shape:
        raise ValueError(f"b has shape {b.shape}; it must be that of a, {a.shape} (broadcast it beforehand)")
    if b.dtype != a.dtype:
        raise ValueError(f"b has dtype {b.dtype}; it must be that of a, {a.dtype}")
    if h0 is not None:
        wanted = (a.shape[0], *a.shape[2:])
        if h0.shape != wanted:
            raise ValueError(f"h0 has shape {h0.shape}; it must be {wanted}, that of a without its tokens")
        is_complex = jnp.issubdtype(h0.dtype, jnp.complexfloating)
        if not jnp.issubdtype(h0.dtype, jnp.inexact) or (is_complex and not jnp.iscomplexobj(a)):
            raise ValueError(f"h0 has dtype {h0.dtype}; it must be a floating dtype, or complex as a is")
    if segment_ids is not None:
        if segment_ids.shape != a.shape[:2]:
            raise ValueError(f"segment_ids has shape {segment_ids.shape}; it must be {a.shape[:2]}")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(f"segment_ids has dtype {segment_ids.dtype}; it must be an integer dtype")


def _block_sizes(block_sizes):
    if block_sizes is None:
        return None
    pair = tuple(block_sizes) if isinstance(block_sizes, (tuple, list)) else (block_sizes,)
    whole = len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair)
    if not whole or pair[0] % 8 or pair[1] % 128:
        raise ValueError(
            f"block_sizes is {block_sizes!r}; it must be (tokens, features), multiples of 8 and of 128"
        )
    return pair
