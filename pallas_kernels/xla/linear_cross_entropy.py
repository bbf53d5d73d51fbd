"""Cross-entropy of a linear head for XLA to compile: all logits at once, or a chunk of tokens at a time.

Three functions, which every implementation has (x [..., D], labels [...], of which -1 picks no logit):

- ``forward(x, w, labels) -> (lse, picked)``, the log-sum-exp and the label's logit of every token;
- ``backward(x, w, labels, lse, dlse, dpicked) -> (dx, dw)``, which computes the logits again;
- ``forward_and_gradients(x, w, labels, weights, squares) -> (lse, picked, dx, dw)``, the gradients of
  sum(weights (lse - picked) + squares lse^2): known as soon as the logits are, so computed once.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cost import linear_cross_entropy as cost


def forward(x, w_DV, labels, *, soft_cap):
    """Everything at once, in O(tokens V) memory."""
    logits, _ = _logits(x, w_DV.astype(x.dtype), soft_cap)
    return jax.nn.logsumexp(logits, axis=-1), _picked(logits, labels)


def backward(x, w_DV, labels, lse, dlse, dpicked, *, soft_cap):
    w = w_DV.astype(x.dtype)
    logits, slope = _logits(x, w, soft_cap)
    probs = jnp.exp(logits - lse[..., None])
    dx, dw = _gradients(x, w, _dlogits(probs, slope, labels, dlse, dpicked))
    return dx, dw.astype(w_DV.dtype)


def forward_and_gradients(x, w_DV, labels, weights, squares, *, soft_cap):
    lse, picked, dx, dw = _chunk(x, w_DV.astype(x.dtype), labels, weights, squares, soft_cap)
    return lse, picked, dx, dw.astype(w_DV.dtype)


def chunked_forward(x, w_DV, labels, *, soft_cap, tokens=None):
    """``forward`` with ``tokens`` rows of logits at a time."""
    w = w_DV.astype(x.dtype)
    C = tokens or cost.chunk_tokens(labels.size, w.shape[1])

    def chunk(_, row):
        return None, forward(row[0], w, row[1], soft_cap=soft_cap)

    _, (lse, picked) = lax.scan(chunk, None, _split(C, x, labels))
    return _join(lse, labels.shape), _join(picked, labels.shape)


def chunked_backward(x, w_DV, labels, lse, dlse, dpicked, *, soft_cap, tokens=None):
    w = w_DV.astype(x.dtype)
    C = tokens or cost.chunk_tokens(labels.size, w.shape[1])

    def chunk(dw, row):
        x, labels, lse, dlse, dpicked = row
        logits, slope = _logits(x, w, soft_cap)
        probs = jnp.exp(logits - lse[:, None])
        dx, more = _gradients(x, w, _dlogits(probs, slope, labels, dlse, dpicked))
        return dw + more, dx

    zero = jnp.zeros(w.shape, jnp.promote_types(x.dtype, jnp.float32))
    dw, dx = lax.scan(chunk, zero, _split(C, x, labels, lse, dlse, dpicked))
    return _join(dx, x.shape), dw.astype(w_DV.dtype)


def chunked_forward_and_gradients(x, w_DV, labels, weights, squares, *, soft_cap, tokens=None):
    w = w_DV.astype(x.dtype)
    C = tokens or cost.chunk_tokens(labels.size, w.shape[1])

    def chunk(dw, row):
        x, labels, weights, squares = row
        lse, picked, dx, more = _chunk(x, w, labels, weights, squares, soft_cap)
        return dw + more, (lse, picked, dx)

    zero = jnp.zeros(w.shape, jnp.promote_types(x.dtype, jnp.float32))
    dw, (lse, picked, dx) = lax.scan(chunk, zero, _split(C, x, labels, weights, squares))
    shape = labels.shape
    return _join(lse, shape), _join(picked, shape), _join(dx, x.shape), dw.astype(w_DV.dtype)


def _chunk(x, w, labels, weights, squares, soft_cap):
    logits, slope = _logits(x, w, soft_cap)
    high = jnp.max(logits, axis=-1, keepdims=True)
    probs = jnp.exp(logits - high)
    total = jnp.sum(probs, axis=-1, keepdims=True)
    lse = (high + jnp.log(total))[..., 0]
    dlse = weights + 2 * squares * lse
    # the division by the total goes into the factor of a whole row
    dlogits = _dlogits(probs, slope, labels, dlse / total[..., 0], -weights)
    return lse, _picked(logits, labels), *_gradients(x, w, dlogits)


def _logits(x, w, soft_cap):
    """Logits and, where they are capped, the derivative of the cap."""
    logits = jnp.matmul(x, w, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    if soft_cap is None:
        return logits, None
    bent = jnp.tanh(logits / soft_cap)
    return soft_cap * bent, 1 - jnp.square(bent)


def _picked(logits, labels):
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(labels < 0, 0, picked)


def _dlogits(probs, slope, labels, factor, dpicked):
    columns = lax.broadcasted_iota(labels.dtype, probs.shape, probs.ndim - 1)
    dlogits = probs * factor[..., None] + jnp.where(columns == labels[..., None], dpicked[..., None], 0)
    return dlogits if slope is None else dlogits * slope


def _gradients(x, w, dlogits):
    """dx in the dtype of x, dw in that of the logits."""
    dtype, dlogits = dlogits.dtype, dlogits.astype(x.dtype)
    tokens = tuple(range(x.ndim - 1))
    dx = jnp.matmul(dlogits, w.T, preferred_element_type=dtype).astype(x.dtype)
    return dx, lax.dot_general(x, dlogits, ((tokens, tokens), ((), ())), preferred_element_type=dtype)


def _split(C, x, *rows):
    """Tokens in chunks of C: [chunks, C, ...]; rows of zeros fill the last, and count for nothing."""
    flat = [x.reshape(-1, x.shape[-1]), *(r.reshape(-1) for r in rows)]
    extra = -len(flat[0]) % C
    padded = [jnp.pad(a, [(0, extra)] + [(0, 0)] * (a.ndim - 1)) for a in flat]
    return tuple(a.reshape(-1, C, *a.shape[1:]) for a in padded)


def _join(chunks, shape):
    """Undoes ``_split``."""
    flat = chunks.reshape(-1, *chunks.shape[2:])
    rows = flat.size // flat.shape[0] if flat.ndim > 1 else 1
    size = 1
    for n in shape:
        size *= n
    return flat[: size // rows].reshape(shape)
