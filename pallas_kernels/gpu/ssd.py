"""State-space duality on Hopper GPUs (H100, H200), for one decay a head: chunks of 64 tokens in sequence.

A warpgroup has 64 value channels of one value head and holds their state [D, 64] in registers, float32, from
the first chunk to the last; the tokens ahead come by TMA meanwhile. With b the running sum of log_decay in a
chunk (inclusive) and S the state before it (Dao and Gu 2024, section 6), a chunk is four products:

    o_t = scale (exp(b_t) q_t S + sum_{s <= t} (q_t . k_s) exp(b_t - b_s) v_s)
    S'  = exp(b_C) S + sum_s k_s (exp(b_C - b_s) v_s)^T

q, k, v and the factors in brackets are 16 bits, as is S where it is read; sums are float32. A reset is a
log_decay of -100. There are B N E / 64 warpgroups: where these are few, much of the GPU is idle.

The backward pass is not a kernel yet: it is the one of ``xla_chunked``, from the same residuals.
``plgpu.kernel`` takes no cost estimate; ``cost`` says what the forward kernel computes and moves.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import decay_sums, dispatch, sharding
from pallas_kernels.cost import ssd as cost_ssd
from pallas_kernels.gpu import hopper
from pallas_kernels.xla import ssd as xla

CHUNK = hopper.ROWS  # queries of a wgmma
CHANNELS = 64  # value channels of a warpgroup
SIZES = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
PROCESSORS = 132  # of an H100
# (key size, warpgroups of a block) -> slots of the ring; of one warpgroup, two blocks share a processor
SLOTS = {(64, 1): 3, (64, 2): 4, (128, 1): 2, (128, 2): 3}


def refuses(q_BTKD, k_BTKD, v_BTNE, g, state0_BNDE, *, options):
    """Why these arguments are not for this kernel, or None."""
    if q_BTKD.dtype not in DTYPES:
        return f"q has dtype {q_BTKD.dtype}; it must be bfloat16 or float16"
    if g.ndim == 4:
        return f"log_decay has shape {g.shape}, one a channel; this kernel takes one a head, {g.shape[:3]}"
    for name, x in (("q", q_BTKD), ("v", v_BTNE)):
        if x.shape[-1] not in SIZES:
            return f"{name} has head size {x.shape[-1]}; it must be one of {', '.join(map(str, SIZES))}"
    if options.chunk not in (None, CHUNK):
        return f"chunk is {options.chunk}; this kernel has chunks of {CHUNK}"
    if options.heads is not None:
        return f"block_sizes has heads {options.heads}; this kernel has its own"
    if options.span < CHUNK:
        return f"block_sizes has span {options.span}; this kernel has chunks of {CHUNK}"
    return None


def cost(*, B, T, K, N, D, E) -> cost_ssd.Cost:
    """Of ``forward``: as ``cost.ssd`` counts, but bytes as this kernel moves them: q and k once a block."""
    sizes = dict(B=B, T=T, K=K, N=N, D=D, E=E, chunk=CHUNK, channel=False, itemsize=2)
    counted = cost_ssd.forward(**sizes, kept=0, keep=False)
    warpgroups, units = _layout(B, K, N, E)
    keys, values = T * K * D * 2, T * N * E * 2
    decay = 8 * -(-T // CHUNK) * CHUNK * N * (E // CHANNELS)
    moved = B * (2 * keys * (units // warpgroups) + 2 * values + decay + 8 * N * D * E)
    return counted._replace(bytes=moved)


def forward(q_BTKD, k_BTKD, v_BTNE, g_BTN, state0_BNDE, *, options, keep):
    """(o [B, T, N, E], state [B, N, D, E]), and with ``keep`` states [B, spans, N, D, E], one before each
    span of tokens; g is log_decay, at least ``decay_sums.LOWEST``."""
    every = decay_sums.chunks_for(q_BTKD.shape[1], CHUNK, options.span)[3] if keep else None
    return chunked(q_BTKD, k_BTKD, v_BTNE, g_BTN, state0_BNDE, scale=options.scale, every=every)


def backward(*arrays, options):
    """Gradients of q, k, v, g and state0, by ``xla_chunked``."""
    return xla.backward(*arrays, options=options)


IMPLEMENTATION = dispatch.Implementation(forward, backward, refuses)


def chunked(q_BTKD, k_BTKD, v_BTNE, g_BTN, state0_BNDE, *, scale, every=None):
    """o and the last state; with ``every`` also the states before chunks 0, every, 2 every, ..., float32
    [B, ceil(chunks / every), N, D, E]."""
    T = q_BTKD.shape[1]
    q, k, v = (_tiled(x) for x in (q_BTKD, k_BTKD, v_BTNE))
    o, *states = _call(q, k, v, _decays(g_BTN), state0_BNDE, scale=scale, every=every)
    return o[:, :T], *states


def _layout(B, K, N, E):
    """Warpgroups of a block, and units of work for a warpgroup, a query-key head."""
    units = N // K * (E // CHANNELS)
    # two share the copies of q and k, unless there are processors for each
    return 2 if units % 2 == 0 and B * K * units > PROCESSORS else 1, units


def _decays(g_BTN):
    """Running sums within chunks: float32 [B, N, chunks, 2, CHUNK], exact multiples of 1/256 and the rest."""
    B, T, N = g_BTN.shape
    g = jnp.pad(g_BTN, ((0, 0), (0, -T % CHUNK), (0, 0))).swapaxes(1, 2)
    return jnp.stack(decay_sums.exact_cumsum(g.reshape(B, N, -1, CHUNK)), axis=-2)


def _tiled(x_BTNH):
    """Tokens to a multiple of the 8 rows of a tile, and to one chunk: beyond, TMA reads zeros."""
    T = x_BTNH.shape[1]
    more = max(CHUNK, -(-T // 8) * 8) - T
    return jnp.pad(x_BTNH, ((0, 0), (0, more), (0, 0), (0, 0))) if more else x_BTNH


def _call(q_BTKD, k_BTKD, v_BTNE, b_BNc2C, state0_BNDE, *, scale, every):
    arrays = q_BTKD, k_BTKD, v_BTNE, b_BNc2C, state0_BNDE
    (B, _, K, D), (N, E), chunks = q_BTKD.shape, v_BTNE.shape[2:], b_BNc2C.shape[2]
    dtype, tiles = q_BTKD.dtype, E // CHANNELS
    warpgroups, units = _layout(B, K, N, E)
    slots = SLOTS[D, warpgroups]
    blocks = range(0, D, CHANNELS)  # of the state's rows

    def body(q_ref, k_ref, v_ref, b_ref, state0_ref, o_ref, state_ref, *refs):
        kept_ref, refs = (refs[0], refs[1:]) if every else (None, refs)
        q_smem, k_smem, v_smem, b_smem, o_smem, state_smem, full, free = refs
        batch, key_head, warpgroup = (lax.axis_index(axis) for axis in ("batch", "key_head", "warpgroup"))

        def place(warpgroup):
            """Value head and channels."""
            unit = lax.axis_index("unit") * warpgroups + warpgroup
            channels = pl.ds(lax.rem(unit, jnp.int32(tiles)) * CHANNELS, CHANNELS)
            return key_head * (N // K) + lax.div(unit, jnp.int32(tiles)), channels

        def copies(step, slot):
            at = pl.ds(step * CHUNK, CHUNK)
            yield q_ref.at[batch, at, key_head], q_smem.at[slot]
            yield k_ref.at[batch, at, key_head], k_smem.at[slot]
            for w in range(warpgroups):
                head, channels = place(w)
                yield v_ref.at[batch, at, head, channels], v_smem.at[slot, w]
                yield b_ref.at[batch, head, step], b_smem.at[slot, w]

        ring = hopper.Ring(slots, jnp.int32(chunks), copies, full, free, loads=True)
        pl.when(warpgroup == 0)(ring.start)
        head, channels = place(warpgroup)
        o_smem, state_smem = o_smem.at[warpgroup], state_smem.at[warpgroup]
        chunk = _Chunk(scale, dtype)

        def put(ref, states):
            for d, S in zip(blocks, states, strict=True):
                ref[pl.ds(d, CHANNELS)] = S

        def visit(step, states):
            if every:

                @pl.when(lax.rem(step, jnp.int32(every)) == 0)
                def _():
                    put(kept_ref.at[batch, lax.div(step, jnp.int32(every)), head, :, channels], states)

            for d, S in zip(blocks, states, strict=True):
                state_smem[pl.ds(d, CHANNELS)] = S.astype(dtype)
            slot = ring.wait(step)
            q, k = q_smem.at[slot], k_smem.at[slot]
            v, b = v_smem.at[slot, warpgroup], b_smem.at[slot, warpgroup]
            plgpu.commit_smem()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the output of the chunk before has left
            o_smem[...] = chunk.output(q, k, v, b, state_smem)
            ring.refill(step, warpgroup)
            v[...] = chunk.weighted_values(v, b)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem, o_ref.at[batch, pl.ds(step * CHUNK, CHUNK), head, channels])
            states = chunk.next_states(states, k, v, b)
            ring.release(step)
            return states

        first = state0_ref.at[batch, head, :, channels]
        states = (first.at[pl.ds(d, CHANNELS)] for d in blocks)
        states = tuple(hopper.load(S, hopper.MATRIX, optimized=False) for S in states)
        put(state_ref.at[batch, head, :, channels], lax.fori_loop(0, chunks, visit, states))
        plgpu.wait_smem_to_gmem(0)

    states = [sharding.out_shape(state0_BNDE.shape, jnp.float32, *arrays)]
    if every:
        states += [sharding.out_shape((B, pl.cdiv(chunks, every), N, D, E), jnp.float32, *arrays)]
    return hopper.kernel(
        body,
        name="ssd_forward",
        out_type=[sharding.out_shape(v_BTNE.shape, dtype, *arrays), *states],
        grid={"batch": B, "key_head": K, "unit": units // warpgroups},
        scratch_types=[
            hopper.operand(slots, CHUNK, D, dtype=dtype),
            hopper.operand(slots, CHUNK, D, dtype=dtype),
            hopper.operand(slots, warpgroups, CHUNK, CHANNELS, dtype=dtype),
            plgpu.SMEM((slots, warpgroups, 2, CHUNK), jnp.float32),
            hopper.operand(warpgroups, CHUNK, CHANNELS, dtype=dtype),
            hopper.operand(warpgroups, D, CHANNELS, dtype=dtype),
            hopper.barriers(slots, 2 + 2 * warpgroups),
            hopper.barriers(slots, warpgroups),
        ],
        warpgroups=warpgroups,
    )(*arrays)


class _Chunk:
    """What a warpgroup computes of a chunk; q, k, v, b and the state are references to shared memory."""

    def __init__(self, scale, dtype):
        self.scale, self.dtype = scale, dtype

    def output(self, q, k, v, b, state):
        """o [CHUNK, CHANNELS]."""
        square = (CHUNK, CHUNK)
        o = hopper.matmul(q, state, (CHUNK, CHANNELS))
        o = o * hopper.over_columns(self._exp(*self._sums(b, hopper.PER_ROW)), o.shape)
        products = hopper.matmul(q, k.transpose((1, 0)), square)
        # rows are queries t and columns keys s; the exact sums apart, so that the rests are not lost in them
        sums = zip(self._sums(b, hopper.PER_ROW), self._sums(b, hopper.PER_COLUMN), strict=True)
        exact, rest = (hopper.over_columns(t, square) - hopper.over_rows(s, square) for t, s in sums)
        causal = hopper.iota(square, 1) <= hopper.iota(square, 0)
        A = jnp.where(causal, products * self._exp(exact, rest), 0.0)
        o = hopper.add_matmul(o, A.astype(self.dtype), v)
        return (o * self.scale).astype(self.dtype)

    def weighted_values(self, v, b):
        """exp(b_C - b_s) v_s."""
        values = hopper.load(v, hopper.MATRIX).astype(jnp.float32)
        exact, rest = (b[i, CHUNK - 1] - x for i, x in enumerate(self._sums(b, hopper.PER_ROW)))
        return (values * hopper.over_columns(self._exp(exact, rest), values.shape)).astype(self.dtype)

    def next_states(self, states, k, weighted, b):
        """The state after the chunk, a block of rows each."""
        whole = jnp.exp2((b[0, CHUNK - 1] + b[1, CHUNK - 1]) * hopper.LOG2E)
        return tuple(
            hopper.add_outer(S * whole, k.at[:, pl.ds(i * CHANNELS, CHANNELS)], weighted)
            for i, S in enumerate(states)
        )

    def _sums(self, b, layout):
        return hopper.load(b.at[0], layout), hopper.load(b.at[1], layout)

    def _exp(self, exact, rest):
        return jnp.exp2((exact + rest) * hopper.LOG2E)
