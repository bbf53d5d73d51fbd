"""The diagonal recurrence on NVIDIA GPUs from Hopper on: features over threads, time in sequence.

A block of 128 threads has 128 features of one row and goes over all its tokens; TMA brings the tokens ahead
and takes the results away meanwhile. Every array is moved once. There are B F / 128 blocks: fewer than the
GPU has processors (132 on an H100) leave some of its bandwidth unused. Complex arrays are two planes.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, sharding

LANES = 128
BLOCK_TOKENS = {1: 32, 2: 16}  # by planes
SHARED_MEMORY = 220 * 1024  # bytes, of the 227 KiB that a block may have
MOST_STAGES = 4


def refuses(a_BTF, b_BTF, h0_BF, resets_BT, *, reverse, block_sizes):
    """Why these arguments are not for this kernel, or None."""
    if a_BTF.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64):
        return f"a has dtype {a_BTF.dtype}; the kernel takes float32, bfloat16, float16 and complex64"
    if block_sizes is not None and (block_sizes[1] != LANES or _stages(block_sizes[0], a_BTF, 3, 2) < 1):
        return f"block_sizes is {block_sizes}; the kernel takes {LANES} features, and tokens for 220 KiB"
    return None


def forward(a_BTF, b_BTF, h0_BF, resets_BT, *, reverse, block_sizes):
    """h and h_last."""
    call = functools.partial(_forward, reverse=reverse, block_sizes=block_sizes)
    resets, rule = ((), "") if resets_BT is None else ((resets_BT,), ", b t")
    return _per_shard(call, f"b t f, b t f, b f{rule} -> b t f, b f")(a_BTF, b_BTF, h0_BF, *resets)


def backward(a_BTF, h_BTF, h0_BF, resets_BT, dh_BTF, dh_last_BF, *, reverse, block_sizes):
    """da, db, dh0."""
    call = functools.partial(_backward, reverse=reverse, block_sizes=block_sizes)
    resets, rule = ((), "") if resets_BT is None else ((resets_BT,), ", b t")
    rule = f"b t f, b t f, b t f, b f, b f{rule} -> b t f, b t f, b f"
    return _per_shard(call, rule)(a_BTF, h_BTF, dh_BTF, h0_BF, dh_last_BF, *resets)


def _per_shard(call, rule):
    if dispatch.interpret_mode():  # its ordered effects cannot be partitioned
        return call
    return sharding.per_shard(call, rule, whole=("t",))


def _forward(a_BTF, b_BTF, h0_BF, resets_BT=None, *, reverse, block_sizes):
    _, T, F = a_BTF.shape
    a, b, h0 = (_planes(x) for x in (a_BTF, b_BTF, h0_BF))
    P = len(a)
    tokens = min(T, block_sizes[0] if block_sizes else BLOCK_TOKENS[P])
    resets = _by_block(resets_BT, tokens)
    sweep = _Sweep(a_BTF, tokens, n_inputs=2, n_outputs=1, resets=len(resets), descending=reverse)

    def body(*refs):
        a, b, h0, resets, h, h_last, scratch = _split(refs, (P, P, P, sweep.resets, P, P))
        row, tile = lax.axis_index("row"), lax.axis_index("tile")

        def token(t, is_last, refs, x):
            a, b, resets, h = _split(refs, (P, P, sweep.resets, P))[:4]
            x = _add(_multiply(_row(a, t), _keep(x, resets, t)), _row(b, t))
            _put_row(h, t, x)
            return x

        x = sweep.run(row, tile, (*a, *b), resets, h, scratch, lambda start: token, _load(_at(h0, row, tile)))
        _store(_at(h_last, row, tile), x)

    outs = sweep.call(body, "linear_scan", a, [*a, *b, *h0, *resets])
    return _join(outs[:P], F), _join(outs[P:], F)


def _backward(a_BTF, h_BTF, dh_BTF, h0_BF, dh_last_BF, resets_BT=None, *, reverse, block_sizes):
    _, T, F = a_BTF.shape
    a, h, g, h0, dh_last = (_planes(x) for x in (a_BTF, h_BTF, dh_BTF, h0_BF, dh_last_BF))
    P = len(a)
    tokens = min(T, block_sizes[0] if block_sizes else BLOCK_TOKENS[P])
    resets = _by_block(resets_BT, tokens)
    sweep = _Sweep(a_BTF, tokens, n_inputs=3, n_outputs=2, resets=len(resets), descending=not reverse)

    def body(*refs):
        a, h, g, h0, dh_last, resets, da, db, dh0, scratch = _split(refs, (P,) * 5 + (sweep.resets, P, P, P))
        row, tile = lax.axis_index("row"), lax.axis_index("tile")

        def block(start):
            # the state before the block, asked for at once and needed at the block's last token
            outside = start + tokens if reverse else start - 1
            is_first = (outside < 0) | (outside >= T)
            there = tuple(ref.at[row, jnp.clip(outside, 0, T - 1), _features(tile)] for ref in h)
            edge = _choose(is_first, _load(_at(h0, row, tile)), _load(there))

            def token(t, is_last, refs, x):
                a, h, g, resets, da, db = _split(refs, (P, P, P, sweep.resets, P, P))[:6]
                inside = _row(h, jnp.where(is_last, t, t + 1 if reverse else t - 1))
                before = _choose(is_last, edge, inside)
                dh = _add(_row(g, t), x)
                _put_row(db, t, dh)
                _put_row(da, t, _multiply(dh, _keep(before, resets, t)))
                return _keep(_multiply(_row(a, t), dh), resets, t)

            return token

        x = sweep.run(
            row, tile, (*a, *h, *g), resets, (*da, *db), scratch, block, _load(_at(dh_last, row, tile))
        )
        _store(_at(dh0, row, tile), x)

    outs = sweep.call(body, "linear_scan_backward", (*a, *a), [*a, *h, *g, *h0, *dh_last, *resets])
    return _join(outs[:P], F), _join(outs[P : 2 * P], F), _join(outs[2 * P :], F)


class _Sweep:
    """Goes over blocks of tokens, from the last where ``descending``, inputs arriving ``stages`` ahead."""

    def __init__(self, x_BTF, tokens, *, n_inputs, n_outputs, resets, descending):
        self.shape, self.tokens, self.resets, self.descending = x_BTF.shape, tokens, resets, descending
        self.planes = 2 if jnp.iscomplexobj(x_BTF) else 1
        self.dtype = jnp.dtype(jnp.float32) if self.planes == 2 else x_BTF.dtype
        self.n_inputs, self.n_outputs = n_inputs * self.planes, n_outputs * self.planes
        self.blocks = -(-self.shape[1] // tokens)
        self.stages = min(_stages(tokens, x_BTF, n_inputs, n_outputs), self.blocks)

    def call(self, body, name, like, operands):
        """The kernel: outputs shaped as ``like`` and as a state in float32, a plane each."""
        B, _, F = like[0].shape
        outputs = [sharding.out_shape(x.shape, x.dtype, *operands) for x in like]
        states = [sharding.out_shape((B, F), jnp.float32, *operands)] * self.planes
        inputs = plgpu.SMEM((self.stages, self.tokens, LANES), self.dtype)
        return plgpu.kernel(
            body,
            out_type=outputs + states,
            scratch_types=[
                *[inputs] * self.n_inputs,
                *[plgpu.SMEM((self.stages, self.tokens + -self.tokens % 32), jnp.int32)] * self.resets,
                *[plgpu.SMEM((2, self.tokens, LANES), self.dtype)] * self.n_outputs,
                plgpu.Barrier(num_arrivals=self.n_inputs + self.resets, num_barriers=self.stages),
            ],
            grid=(B, F // LANES),
            grid_names=("row", "tile"),
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=dispatch.interpret_mode() or None,
        )(*operands)

    def run(self, row, tile, inputs, resets, outputs, scratch, block, x):
        """The carry after all tokens.

        ``block(start)`` gives the function ``(token, is_last, refs, carry) -> carry`` for one block's tokens.
        """
        T, tokens = self.shape[1], self.tokens
        ins, resets_smem, outs, (full,) = _split(scratch, (self.n_inputs, self.resets, self.n_outputs, 1))[:4]

        def block_of(k):
            return self.blocks - 1 - k if self.descending else k

        def start_of(k):
            return block_of(k) * tokens

        def at(ref, k):
            return ref.at[row, pl.ds(start_of(k), tokens), _features(tile)]

        def fill(k):
            slot = lax.rem(k, jnp.int32(self.stages))
            for source, target in zip(inputs, ins, strict=True):
                plgpu.copy_gmem_to_smem(at(source, k), target.at[slot], full.at[slot])
            for source, target in zip(resets, resets_smem, strict=True):
                plgpu.copy_gmem_to_smem(source.at[row, block_of(k)], target.at[slot], full.at[slot])

        for k in range(self.stages):
            fill(jnp.int32(k))

        def visit(k, x):
            slot, out_slot = lax.rem(k, jnp.int32(self.stages)), lax.rem(k, jnp.int32(2))
            token, count = block(start_of(k)), jnp.minimum(tokens, T - start_of(k))
            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # what was written from here two blocks ago
            refs = tuple(ref.at[slot] for ref in (*ins, *resets_smem)) + tuple(
                ref.at[out_slot] for ref in outs
            )

            def step(n, x):
                return token(count - 1 - n if self.descending else n, n == count - 1, refs, x)

            x = lax.fori_loop(0, count, step, x)
            plgpu.commit_smem()  # all threads have read and written theirs
            for source, target in zip(outs, outputs, strict=True):
                plgpu.copy_smem_to_gmem(source.at[out_slot], at(target, k), commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            pl.when(k + self.stages < self.blocks)(lambda: fill(k + self.stages))
            return x

        x = lax.fori_loop(0, self.blocks, visit, x)
        plgpu.wait_smem_to_gmem(0)
        return x


def _stages(tokens, x_BTF, n_inputs, n_outputs):
    """How many blocks of inputs fit in shared memory beside two of outputs."""
    array = tokens * LANES * x_BTF.dtype.itemsize
    return min(MOST_STAGES, (SHARED_MEMORY - 2 * n_outputs * array) // (n_inputs * array))


def _planes(x):
    """Real and imaginary part, features padded to whole tiles; states too, which are [B, F]."""
    parts = (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x,)
    more = -x.shape[-1] % LANES
    return tuple(jnp.pad(p, ((0, 0),) * (x.ndim - 1) + ((0, more),)) if more else p for p in parts)


def _join(planes, F):
    planes = [x[..., :F] for x in planes]
    return jax.lax.complex(*planes) if len(planes) == 2 else planes[0]


def _by_block(resets_BT, tokens):
    """int32 [B, blocks, tokens], padded to the multiple of 128 bytes that a copy takes; or none."""
    if resets_BT is None:
        return ()
    B, T = resets_BT.shape
    blocks = -(-T // tokens)
    x = jnp.pad(resets_BT.astype(jnp.int32), ((0, 0), (0, blocks * tokens - T))).reshape(B, blocks, tokens)
    return (jnp.pad(x, ((0, 0), (0, 0), (0, -tokens % 32))),)


def _split(refs, counts):
    """Tuples of so many refs each, and the rest."""
    cuts, start = [], 0
    for n in counts:
        cuts.append(tuple(refs[start : start + n]))
        start += n
    return *cuts, tuple(refs[start:])


def _features(tile):
    return pl.ds(tile * LANES, LANES)


def _at(states, row, tile):
    return tuple(ref.at[row, _features(tile)] for ref in states)


def _choose(condition, x, y):
    return tuple(jnp.where(condition, a, b) for a, b in zip(x, y, strict=True))


def _load(refs):
    """128 values, one a thread, in float32."""
    layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
    if "idx" in inspect.signature(plgpu.load).parameters:  # until jax 0.11
        return tuple(plgpu.load(ref, (), layout=layout).astype(jnp.float32) for ref in refs)
    return tuple(plgpu.load(ref, layout=layout).astype(jnp.float32) for ref in refs)


def _store(refs, values):
    for ref, x in zip(refs, values, strict=True):
        ref[...] = x.astype(ref.dtype)


def _row(refs, t):
    return _load(tuple(ref.at[t] for ref in refs))


def _put_row(refs, t, values):
    _store(tuple(ref.at[t] for ref in refs), values)


def _keep(x, resets, t):
    """The state, or zero where token t begins a segment."""
    if not resets:
        return x
    begins = resets[0][t] != 0
    return tuple(jnp.where(begins, jnp.zeros_like(part), part) for part in x)


def _add(x, y):
    return tuple(a + b for a, b in zip(x, y, strict=True))


def _multiply(x, y):
    if len(x) == 1:
        return (x[0] * y[0],)
    (xr, xi), (yr, yi) = x, y
    return xr * yr - xi * yi, xr * yi + xi * yr
