"""``ssd`` as TPU kernels: chunks in sequence, the state in VMEM, query-key products shared by heads.

The grid is (batch, query-key head, chunk, block of value heads): chunks and the blocks of heads within one
are sequential. q and k are read once a chunk for all value heads that share them, v and o once in all.
Backward first writes the state before each chunk, then walks the chunks from the last to the first.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decay_sums, dispatch, sharding
from pallas_kernels.cost import ssd as cost
from pallas_kernels.tpu import ssd_chunk as one

# Tokens a chunk by the kind of decay, (a head, a channel): the best of ``ssd_blocks.json`` on v5e, and on
# the others what compiles with room to spare in VMEM.
CHUNKS = {
    None: (128, 64),
    "v4": (128, 64),
    "v5e": (256, 128),
    "v5p": (128, 64),
    "v6e": (256, 64),
    "tpu7x": (256, 64),
}
HEADS = 8  # value heads a grid step at most
SEMANTICS = ("parallel", "parallel", "arbitrary", "arbitrary")
STATE_BYTES = 8 << 20  # of VMEM for the states of all value heads of one query-key head


def refuses(q, k, v, g, state0, *, options):
    """Why these arguments are not for the TPU kernels, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q has dtype {q.dtype}; it must be float32 or bfloat16"
    D, E = state0.shape[2:]
    G = v.shape[2] // q.shape[2]
    size = 4 * G * (-(-E // 8) * 8) * (-(-D // 128) * 128)
    if size > STATE_BYTES:
        return f"the states of {G} heads of {D} x {E} take {size >> 20} MiB of VMEM, more than 8"
    return None


class _Plan:
    """Sizes, layouts and block specs of one call."""

    def __init__(self, q_BTKD, v_BTNE, g, options, last_first=False):
        (self.B, self.T, self.K, self.D), (self.N, self.E) = q_BTKD.shape, v_BTNE.shape[2:]
        self.channel = g.ndim == 4
        self.dtype = q_BTKD.dtype
        self.G = self.N // self.K
        target = dispatch.current_target()
        chunk = CHUNKS[target and target.generation][self.channel]
        self.C = decay_sums.chunk_for(self.T, options.chunk or chunk)
        self.n = math.ceil(self.T / self.C)
        most = 1 if self.channel else HEADS
        fits = [h for h in range(1, most + 1) if self.G % h == 0]
        self.heads = math.gcd(options.heads, self.G) if options.heads else fits[-1]
        self.J = self.G // self.heads
        self.scale = options.scale
        self.last_first = last_first
        self.inputs = q_BTKD, v_BTNE, g

    def keys(self, x_BTKD):
        """[B, K, padded T, D]."""
        return self._pad(x_BTKD).swapaxes(1, 2)

    def values(self, x_BTNE):
        """[B, K, G, padded T, E]."""
        x = self._pad(x_BTNE).swapaxes(1, 2)
        return x.reshape(self.B, self.K, self.G, *x.shape[2:])

    def _pad(self, x):
        # keys, values and log_decay of 0 leave the state as it is
        return jnp.pad(x, [(0, 0), (0, self.n * self.C - self.T)] + [(0, 0)] * (x.ndim - 2))

    def back(self, x, heads):
        """[B, heads..., padded T, size] to [B, T, heads, size]."""
        return x.reshape(self.B, heads, self.n * self.C, x.shape[-1]).swapaxes(1, 2)[:, : self.T]

    def states(self, x_BNDE):
        return x_BNDE.reshape(self.B, self.K, self.G, self.D, self.E).swapaxes(3, 4)

    def states_back(self, x):
        return x.swapaxes(3, 4).reshape(self.B, self.N, self.D, self.E)

    def decay(self, g):
        """Arrays that the kernels read the decay from."""
        if self.channel:
            return (self.values(g),)
        g = self._pad(g).reshape(self.B, self.n, self.C, self.K, self.J, self.heads)
        g = g.transpose(0, 3, 1, 4, 5, 2)
        rows = jnp.concatenate(decay_sums.exact_cumsum(g), axis=-2)
        return rows.swapaxes(-1, -2), rows

    def decay_back(self, ddecay):
        if self.channel:
            return self.back(ddecay[0], self.N)
        columns, rows = ddecay
        db = columns.swapaxes(-1, -2) + rows
        dg = jax.lax.cumsum(db, axis=db.ndim - 1, reverse=True)
        dg = dg.transpose(0, 2, 5, 1, 3, 4).reshape(self.B, self.n * self.C, self.N)
        return dg[:, : self.T]

    def decay_specs(self, of_gradient=False):
        if self.channel:
            return [self.value_spec(self.D)]
        return [self._small_spec(self.C, self.heads * (2 - of_gradient)),
                self._small_spec(self.heads * (2 - of_gradient), self.C)]  # fmt: skip

    def decay_shapes(self):
        if self.channel:
            return [self.value_shape(self.D, jnp.float32)]
        lead = (self.B, self.K, self.n, self.J)
        return [self.shape((*lead, *s), jnp.float32) for s in ((self.C, self.heads), (self.heads, self.C))]

    def _at(self, c):
        return self.n - 1 - c if self.last_first else c

    def _small_spec(self, *block):
        return pl.BlockSpec((None,) * 4 + block, lambda b, k, c, j: (b, k, self._at(c), j, 0, 0))

    def key_spec(self):
        return pl.BlockSpec((None, None, self.C, self.D), lambda b, k, c, j: (b, k, self._at(c), 0))

    def value_spec(self, size):
        block = (None, None, self.heads, self.C, size)
        return pl.BlockSpec(block, lambda b, k, c, j: (b, k, j, self._at(c), 0))

    def start_spec(self):
        """The states before a chunk."""
        block = (None, None, None, self.heads, self.E, self.D)
        return pl.BlockSpec(block, lambda b, k, c, j: (b, k, self._at(c), j, 0, 0))

    def state_spec(self, *, at):
        """States that are read or written in grid step ``at`` of the chunks alone: the index stands still
        otherwise, so that no other step moves them."""
        still = self.J - 1 if at == 0 else 0
        block = (None, None, self.heads, self.E, self.D)
        return pl.BlockSpec(block, lambda b, k, c, j: (b, k, jnp.where(c == at, j, still), 0, 0))

    def shape(self, shape, dtype):
        return sharding.out_shape(shape, dtype, *self.inputs)

    def value_shape(self, size, dtype):
        return self.shape((self.B, self.K, self.G, self.n * self.C, size), dtype)

    def key_shape(self):
        return self.shape((self.B, self.K, self.n * self.C, self.D), self.dtype)

    def state_shape(self):
        return self.shape((self.B, self.K, self.G, self.E, self.D), jnp.float32)

    def scratch(self, *shape):
        return pltpu.VMEM(shape, jnp.float32)

    def call(self, kernel, in_specs, out_specs, out_shape, scratch, estimate):
        return pl.pallas_call(
            functools.partial(kernel, plan=self),
            grid=(self.B, self.K, self.n, self.J),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS),
            interpret=dispatch.interpret_mode(),
            cost_estimate=pl.CostEstimate(
                flops=estimate.flops,
                transcendentals=estimate.transcendentals,
                bytes_accessed=estimate.bytes,
            ),
            name="ssd_" + kernel.__name__.strip("_"),
        )

    def sizes(self):
        return {
            "B": self.B, "T": self.T, "K": self.K, "N": self.N, "D": self.D, "E": self.E, "chunk": self.C,
            "channel": self.channel, "itemsize": self.dtype.itemsize,
        }  # fmt: skip


def forward(q_BTKD, k_BTKD, v_BTNE, g, state0_BNDE, *, options):
    """(o [B, T, N, E], state [B, N, D, E]); g is log_decay, at least ``decay_sums.LOWEST``."""
    p = _Plan(q_BTKD, v_BTNE, g, options)
    decay = p.decay(g)
    o, state = p.call(
        _forward_kernel,
        [p.key_spec(), p.key_spec(), p.value_spec(p.E), *p.decay_specs(), p.state_spec(at=0)],
        [p.value_spec(p.E), p.state_spec(at=p.n - 1)],
        [p.value_shape(p.E, p.dtype), p.state_shape()],
        [p.scratch(p.G, p.E, p.D), p.scratch(p.C, p.C)],
        cost.forward(**p.sizes()),
    )(p.keys(q_BTKD), p.keys(k_BTKD), p.values(v_BTNE), *decay, p.states(state0_BNDE))
    return p.back(o, p.N), p.states_back(state)


def backward(q_BTKD, k_BTKD, v_BTNE, g, state0_BNDE, do_BTNE, dstate_BNDE, *, options):
    """Gradients of q, k, v, g and state0."""
    p = _Plan(q_BTKD, v_BTNE, g, options)
    decay, q, k, v = p.decay(g), p.keys(q_BTKD), p.keys(k_BTKD), p.values(v_BTNE)
    starts = p.call(
        _starts_kernel,
        [p.key_spec(), p.value_spec(p.E), *p.decay_specs(), p.state_spec(at=0)],
        p.start_spec(),
        p.shape((p.B, p.K, p.n, p.G, p.E, p.D), p.dtype),
        [p.scratch(p.G, p.E, p.D)],
        cost.starts(**p.sizes()),
    )(k, v, *decay, p.states(state0_BNDE))
    p = _Plan(q_BTKD, v_BTNE, g, options, last_first=True)
    dq, dk, dv, *ddecay, dstate0 = p.call(
        _backward_kernel,
        [p.key_spec(), p.key_spec(), p.value_spec(p.E), p.value_spec(p.E), *p.decay_specs(),
         p.start_spec(), p.state_spec(at=0)],
        [p.key_spec(), p.key_spec(), p.value_spec(p.E), *p.decay_specs(of_gradient=True),
         p.state_spec(at=p.n - 1)],
        [p.key_shape(), p.key_shape(), p.value_shape(p.E, p.dtype), *p.decay_shapes(), p.state_shape()],
        [p.scratch(p.G, p.E, p.D), p.scratch(p.C, p.C), p.scratch(p.C, p.C), p.scratch(p.C, p.D),
         p.scratch(p.C, p.D)],
        cost.walk_back(**p.sizes()),
    )(q, k, v, p.values(do_BTNE), *decay, starts, p.states(dstate_BNDE))  # fmt: skip
    return (
        p.back(dq, p.K), p.back(dk, p.K), p.back(dv, p.N), p.decay_back(ddecay), p.states_back(dstate0)
    )  # fmt: skip


def _head_decay(decay_refs, h, plan):
    if plan.channel:
        return decay_refs[0][h]
    return one.scalar_decay(decay_refs[0][...], decay_refs[1][...], h, plan.heads)


def _forward_kernel(q_ref, k_ref, v_ref, *refs, plan):
    *decay_refs, state0_ref, o_ref, state_ref, state, qk = refs
    c, j = pl.program_id(2), pl.program_id(3)
    here = pl.ds(j * plan.heads, plan.heads)
    q, k = q_ref[...], k_ref[...]
    outputs = one.channel_outputs if plan.channel else one.scalar_outputs
    next_state = one.channel_next_state if plan.channel else one.scalar_next_state

    @pl.when(c == 0)
    def _():
        state[here] = state0_ref[...]

    if not plan.channel:

        @pl.when(j == 0)
        def _():
            qk[...] = one.dot(q, k, 1, 1, q.dtype)

    for h in range(plan.heads):
        S, v, decay = state[j * plan.heads + h], v_ref[h], _head_decay(decay_refs, h, plan)
        o = outputs(q, k, v, decay, S, None if plan.channel else qk[...], plan.scale)
        o_ref[h] = o.astype(o_ref.dtype)
        state[j * plan.heads + h] = next_state(k, v, decay, S)

    @pl.when(c == pl.num_programs(2) - 1)
    def _():
        state_ref[...] = state[here]


def _starts_kernel(k_ref, v_ref, *refs, plan):
    *decay_refs, state0_ref, starts_ref, state = refs
    c, j = pl.program_id(2), pl.program_id(3)
    k = k_ref[...]
    next_state = one.channel_next_state if plan.channel else one.scalar_next_state

    @pl.when(c == 0)
    def _():
        state[pl.ds(j * plan.heads, plan.heads)] = state0_ref[...]

    for h in range(plan.heads):
        S = state[j * plan.heads + h]
        starts_ref[h] = S.astype(starts_ref.dtype)  # in which products read it
        state[j * plan.heads + h] = next_state(k, v_ref[h], _head_decay(decay_refs, h, plan), S)


def _backward_kernel(q_ref, k_ref, v_ref, do_ref, *refs, plan):
    n = len(plan.decay_specs())
    decay_refs, refs = refs[:n], refs[n:]
    (starts_ref, dstate_ref, dq_ref, dk_ref, dv_ref), refs = refs[:5], refs[5:]
    ddecay_refs, (dstate0_ref, dstate, qk, dqk, dq, dk) = refs[:n], refs[n:]
    c, j = pl.program_id(2), pl.program_id(3)
    here = pl.ds(j * plan.heads, plan.heads)
    q, k = q_ref[...], k_ref[...]
    gradients = one.channel_gradients if plan.channel else one.scalar_gradients

    @pl.when(c == 0)
    def _():
        dstate[here] = dstate_ref[...]

    @pl.when(j == 0)
    def _():
        dq[...] = jnp.zeros_like(dq)
        dk[...] = jnp.zeros_like(dk)
        if not plan.channel:
            qk[...] = one.dot(q, k, 1, 1, q.dtype)
            dqk[...] = jnp.zeros_like(dqk)

    for h in range(plan.heads):
        d = gradients(
            q, k, v_ref[h], do_ref[h], _head_decay(decay_refs, h, plan), starts_ref[h],
            dstate[j * plan.heads + h], None if plan.channel else qk[...], plan.scale,
        )  # fmt: skip
        dq[...] += d.dq
        dk[...] += d.dk
        dv_ref[h] = d.dv.astype(dv_ref.dtype)
        dstate[j * plan.heads + h] = d.dS
        if plan.channel:
            ddecay_refs[0][h] = d.ddecay[0]
        else:
            dqk[...] += d.dqk
            ddecay_refs[0][:, h : h + 1], ddecay_refs[1][h : h + 1, :] = d.ddecay

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        if not plan.channel:
            dq[...] += one.dot(dqk[...], k, 1, 0, q.dtype)
            dk[...] += one.dot(dqk[...], q, 0, 0, q.dtype)
        dq_ref[...] = dq[...].astype(dq_ref.dtype)
        dk_ref[...] = dk[...].astype(dk_ref.dtype)

    @pl.when(c == pl.num_programs(2) - 1)
    def _():
        dstate0_ref[...] = dstate[here]
