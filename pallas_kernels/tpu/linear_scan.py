"""The diagonal recurrence on TPU: time in sequence, the state in VMEM, every array moved once.

A tile of TPU memory holds 8 tokens of 128 features. Seen as [B, T/8, F/128 x 8, 128], which is how it lies
in memory, one token of many features is a load with stride 8, and a step of the recurrence a multiply-add
on full vector registers. Complex arrays are two planes, real and imaginary.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, sharding
from pallas_kernels.cost import linear_scan as cost
from pallas_kernels.tpu.linear_scan_blocks import BLOCK_SIZES

SUBLANES, LANES = 8, 128
SEMANTICS = ("parallel", "parallel", "arbitrary")  # rows, features, time


def refuses(a_BTF, b_BTF, h0_BF, resets_BT, *, reverse, block_sizes):
    """Why these arguments are not for this kernel, or None."""
    if a_BTF.dtype not in (jnp.float32, jnp.bfloat16, jnp.complex64):
        return f"a has dtype {a_BTF.dtype}; the kernel takes float32, bfloat16 and complex64"
    return None


def forward(a_BTF, b_BTF, h0_BF, resets_BT, *, reverse, block_sizes):
    """h and h_last."""
    call = functools.partial(_forward, reverse=reverse, block_sizes=block_sizes)
    resets, rule = _optional(resets_BT)
    rule = f"b t f, b t f, b f{rule} -> b t f, b f"
    return sharding.per_shard(call, rule, whole=("t",))(a_BTF, b_BTF, h0_BF, *resets)


def backward(a_BTF, h_BTF, h0_BF, resets_BT, dh_BTF, dh_last_BF, *, reverse, block_sizes):
    """da, db, dh0."""
    call = functools.partial(_backward, reverse=reverse, block_sizes=block_sizes)
    resets, rule = _optional(resets_BT)
    rule = f"b t f, b t f, b t f, b f, b f{rule} -> b t f, b t f, b f"
    operands = a_BTF, h_BTF, dh_BTF, h0_BF, dh_last_BF, *resets
    return sharding.per_shard(call, rule, whole=("t",))(*operands)


def _optional(resets_BT):
    return ((), "") if resets_BT is None else ((resets_BT,), ", b t")


def _forward(a_BTF, b_BTF, h0_BF, resets_BT=None, *, reverse, block_sizes):
    plan = _Plan("forward", a_BTF, block_sizes, descending=reverse)
    inputs = plan.tokens(a_BTF, pad=1) + plan.tokens(b_BTF)
    states = plan.states(h0_BF)
    resets, resets_spec = plan.resets(resets_BT)
    count = cost.forward(*a_BTF.shape, a_BTF.dtype.itemsize, **plan.kinds(resets_BT))
    P, cast = plan.planes, a_BTF.dtype == jnp.bfloat16
    outs = pl.pallas_call(
        functools.partial(_forward_kernel, plan=plan, has_resets=resets_BT is not None, cast=cast),
        grid=plan.grid,
        in_specs=[*resets_spec, *[plan.token_spec] * 2 * P, *[plan.state_spec] * P],
        out_specs=[*[plan.token_spec] * P, *[plan.state_spec] * P],
        out_shape=[
            sharding.out_shape(x.shape, x.dtype, *inputs) for x in (*inputs[:P], *states)
        ],
        scratch_shapes=[plan.carry] * P + [plan.group] * (3 * P if cast else 0),
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS),
        cost_estimate=pl.CostEstimate(flops=count.flops, bytes_accessed=count.bytes, transcendentals=0),
        interpret=dispatch.interpret_mode(),
        name="linear_scan",
    )(*resets, *inputs, *states)  # fmt: skip
    return plan.from_tokens(outs[:P]), plan.from_states(outs[P:])


def _forward_kernel(*refs, plan, has_resets, cast):
    P = plan.planes
    resets, refs = (refs[0], refs[1:]) if has_resets else (None, refs)
    a, b, h0, h, h_last, carry, staged = _split(refs, P, 6)
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _start():
        _put(carry, ..., _get(h0, ...))

    def body(n, x):
        i = plan.group_index(k, n)
        a_rows, b_rows, h_rows = (
            _stage(refs, i, staged[j * P : (j + 1) * P], copy=j < 2) for j, refs in enumerate((a, b, h))
        )
        for r in plan.row_order:
            x = _keep(x, resets, i, r)
            x = _add(_multiply(plan.row(a_rows, r), x), plan.row(b_rows, r))
            plan.put_row(h_rows, r, x)
        if cast:
            _put(h, i, tuple(ref[...].astype(h[0].dtype) for ref in h_rows))
        return x

    x = jax.lax.fori_loop(0, plan.group_count(k), body, _get(carry, ...))
    _put(carry, ..., x)

    @pl.when(k == plan.grid[2] - 1)
    def _finish():
        _put(h_last, ..., x)


def _backward(a_BTF, h_BTF, dh_BTF, h0_BF, dh_last_BF, resets_BT=None, *, reverse, block_sizes):
    plan = _Plan("backward", a_BTF, block_sizes, descending=not reverse)
    beyond = plan.n_groups * SUBLANES - plan.T
    if reverse and beyond:
        # a scan from the end meets the padding first, and its state is still h0 there
        padding = jnp.broadcast_to(h0_BF[:, None].astype(h_BTF.dtype), (plan.B, beyond, plan.F))
        h_BTF = jnp.concatenate([h_BTF, padding], axis=1)
    h = plan.tokens(h_BTF)
    inputs = plan.tokens(a_BTF, pad=1) + h + plan.tokens(dh_BTF)
    states = plan.states(h0_BF) + plan.states(dh_last_BF)
    resets, resets_spec = plan.resets(resets_BT)
    count = cost.backward(
        *a_BTF.shape, a_BTF.dtype.itemsize, block_tokens=plan.block_tokens, **plan.kinds(resets_BT)
    )
    P, cast = plan.planes, a_BTF.dtype == jnp.bfloat16
    outs = pl.pallas_call(
        functools.partial(_backward_kernel, plan=plan, has_resets=resets_BT is not None, cast=cast),
        grid=plan.grid,
        in_specs=[
            *resets_spec, *[plan.token_spec] * 3 * P, *[plan.edge_spec] * P, *[plan.state_spec] * 2 * P
        ],
        out_specs=[*[plan.token_spec] * 2 * P, *[plan.state_spec] * P],
        out_shape=[
            sharding.out_shape(x.shape, x.dtype, *inputs)
            for x in (*inputs[: 2 * P], *states[:P])
        ],
        scratch_shapes=[plan.carry] * P + [plan.group] * (5 * P if cast else 0),
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS),
        cost_estimate=pl.CostEstimate(flops=count.flops, bytes_accessed=count.bytes, transcendentals=0),
        interpret=dispatch.interpret_mode(),
        name="linear_scan_backward",
    )(*resets, *inputs, *h, *states)  # fmt: skip
    return plan.from_tokens(outs[:P]), plan.from_tokens(outs[P : 2 * P]), plan.from_states(outs[2 * P :])


def _backward_kernel(*refs, plan, has_resets, cast):
    P = plan.planes
    resets, refs = (refs[0], refs[1:]) if has_resets else (None, refs)
    a, h, g, h_edge, h0, dh_last, da, db, dh0, carry, staged = _split(refs, P, 10)
    k = pl.program_id(2)
    count = plan.group_count(k)

    @pl.when(k == 0)
    def _start():
        _put(carry, ..., _get(dh_last, ...))

    # The state before the block's first token in the order of the scan: the last one that the sweep meets.
    edge_rows = tuple(ref.at[0] for ref in h_edge)
    if cast:
        edge_rows = _stage(h_edge, 0, staged[:P])
    before_block = plan.row(edge_rows, plan.row_order[0])
    is_first = k == plan.grid[2] - 1
    before_block = tuple(
        jnp.where(is_first, x0, x) for x0, x in zip(_get(h0, ...), before_block, strict=True)
    )

    slots = [staged[j * P : (j + 1) * P] for j in range(5)]
    _stage(h, plan.group_index(k, 0), slots[1])

    def body(n, x):
        i = plan.group_index(k, n)
        i_before = plan.group_index(k, jnp.minimum(n + 1, count - 1))
        h_rows = slots[1] if cast else tuple(ref.at[i] for ref in h)
        a_rows, g_rows = _stage(a, i, slots[0]), _stage(g, i, slots[2])
        da_rows, db_rows = _stage(da, i, slots[3], copy=False), _stage(db, i, slots[4], copy=False)
        for r, r_before in zip(plan.row_order, (*plan.row_order[1:], None), strict=True):
            if r_before is None:
                # its group replaces the one before in the staging buffer, which is done with
                before = plan.row(_stage(h, i_before, slots[1]), plan.row_order[0])
                last = n == count - 1
                before = tuple(jnp.where(last, e, x) for e, x in zip(before_block, before, strict=True))
            else:
                before = plan.row(h_rows, r_before)
            dh = _add(plan.row(g_rows, r), x)
            plan.put_row(db_rows, r, dh)
            plan.put_row(da_rows, r, _multiply(dh, _keep(before, resets, i, r)))
            x = _keep(_multiply(plan.row(a_rows, r), dh), resets, i, r)
        if cast:
            _put(da, i, tuple(ref[...].astype(da[0].dtype) for ref in da_rows))
            _put(db, i, tuple(ref[...].astype(db[0].dtype) for ref in db_rows))
        return x

    x = jax.lax.fori_loop(0, count, body, _get(carry, ...))
    _put(carry, ..., x)

    @pl.when(is_first)
    def _finish():
        _put(dh0, ..., x)


class _Plan:
    """How one call lies in memory and in the grid.

    Attributes:
      planes: arrays that make up one: 2 for complex.
      tiles: feature tiles of 128 in a block; groups: of 8 tokens in a block, n_groups of them in all.
      descending: whether the sweep goes from the last token to the first.
    """

    def __init__(self, name, x_BTF, block_sizes, descending):
        self.B, self.T, self.F = x_BTF.shape
        self.complex = jnp.iscomplexobj(x_BTF)
        self.planes = 2 if self.complex else 1
        self.descending = descending
        self.n_tiles, self.n_groups = -(-self.F // LANES), -(-self.T // SUBLANES)
        if block_sizes is None:
            tokens, features = dispatch.for_generation(BLOCK_SIZES)[name]
            tokens //= self.planes
        else:
            tokens, features = block_sizes
        self.tiles = max(n for n in range(1, features // LANES + 1) if self.n_tiles % n == 0)
        self.groups = min(tokens // SUBLANES, self.n_groups)
        self.block_tokens = self.groups * SUBLANES
        self.grid = (self.B, self.n_tiles // self.tiles, -(-self.n_groups // self.groups))
        rows = self.tiles * SUBLANES
        self.carry = pltpu.VMEM((self.tiles, LANES), jnp.float32)
        self.group = pltpu.VMEM((rows, LANES), jnp.float32)
        self.token_spec = pl.BlockSpec(
            (None, self.groups, rows, LANES), lambda b, f, k: (b, self._block(k), f, 0)
        )
        self.edge_spec = pl.BlockSpec((None, 1, rows, LANES), lambda b, f, k: (b, self._edge(k), f, 0))
        self.state_spec = pl.BlockSpec((None, None, self.tiles, LANES), lambda b, f, k: (b, f, 0, 0))
        self.row_order = tuple(range(SUBLANES))[:: -1 if descending else 1]

    def kinds(self, resets_BT):
        return {"is_complex": self.complex, "segments": resets_BT is not None}

    def _block(self, k):
        return self.grid[2] - 1 - k if self.descending else k

    def _edge(self, k):
        """The group that the sweep meets after block k, or any other where there is none."""
        if self.descending:
            return jnp.maximum(self._block(k) * self.groups - 1, 0)
        return jnp.minimum((k + 1) * self.groups, self.n_groups - 1)

    def group_count(self, k):
        """Groups of block k that exist: the block at the end of the arrays may reach beyond them."""
        return jnp.minimum(self.groups, self.n_groups - self._block(k) * self.groups)

    def group_index(self, k, n):
        """Place in block k of the n-th group met."""
        return self.group_count(k) - 1 - n if self.descending else n

    def row(self, refs, r):
        """Token r of a group, as [tiles, 128] for each plane."""
        return tuple(ref[pl.ds(r, self.tiles, SUBLANES), :] for ref in refs)

    def put_row(self, refs, r, values):
        for ref, x in zip(refs, values, strict=True):
            ref[pl.ds(r, self.tiles, SUBLANES), :] = x

    def tokens(self, x_BTF, pad=0):
        """Planes of [B, T, F] as [B, groups, tiles x 8, 128]; ``pad`` fills tokens beyond T."""
        T, F = self.n_groups * SUBLANES, self.n_tiles * LANES
        views = []
        for x, fill in zip(_planes(x_BTF), (pad, 0), strict=False):
            x = jnp.pad(x, ((0, 0), (0, T - x.shape[1]), (0, F - self.F)), constant_values=fill)
            x = x.reshape(self.B, self.n_groups, SUBLANES, self.n_tiles, LANES).swapaxes(2, 3)
            views.append(x.reshape(self.B, self.n_groups, self.n_tiles * SUBLANES, LANES))
        return tuple(views)

    def from_tokens(self, planes):
        views = []
        for x in planes:
            x = x.reshape(self.B, self.n_groups, self.n_tiles, SUBLANES, LANES).swapaxes(2, 3)
            views.append(x.reshape(self.B, self.n_groups * SUBLANES, -1)[:, : self.T, : self.F])
        return _join(views)

    def states(self, x_BF):
        """Planes of [B, F] as [B, blocks, tiles, 128]."""
        pad = self.n_tiles * LANES - self.F
        shape = (self.B, self.grid[1], self.tiles, LANES)
        return tuple(jnp.pad(x, ((0, 0), (0, pad))).reshape(shape) for x in _planes(x_BF))

    def from_states(self, planes):
        return _join([x.reshape(self.B, -1)[:, : self.F] for x in planes])

    def resets(self, resets_BT):
        """Operands and specs: int32 [B, blocks, 1, tokens of a block] in scalar memory, or none."""
        if resets_BT is None:
            return (), ()
        tokens = self.block_tokens
        padded = jnp.pad(resets_BT.astype(jnp.int32), ((0, 0), (0, self.grid[2] * tokens - self.T)))
        spec = pl.BlockSpec(
            (None, None, 1, tokens), lambda b, f, k: (b, self._block(k), 0, 0), memory_space=pltpu.SMEM
        )
        return (padded.reshape(self.B, self.grid[2], 1, tokens),), (spec,)


def _planes(x):
    return (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x,)


def _join(planes):
    return jax.lax.complex(*planes) if len(planes) == 2 else planes[0]


def _split(refs, planes, count):
    """``count`` tuples of ``planes`` refs, and the rest."""
    cuts = [tuple(refs[i * planes : (i + 1) * planes]) for i in range(count)]
    return *cuts, tuple(refs[count * planes :])


def _stage(refs, i, scratch, copy=True):
    """Refs of group i in float32: the arrays themselves, or copies in ``scratch`` where there is any.

    A load with a stride takes 32-bit elements only.
    """
    if not scratch:
        return tuple(ref.at[i] for ref in refs)
    for ref, s in zip(refs, scratch, strict=True):
        if copy:
            s[...] = ref[i].astype(s.dtype)
    return scratch


def _keep(x, resets, i, r):
    """The state, or zero where token r of group i begins a segment."""
    if resets is None:
        return x
    begins = resets[0, i * SUBLANES + r] != 0
    return tuple(jnp.where(begins, 0.0, part) for part in x)


def _get(refs, index):
    return tuple(ref[index] for ref in refs)


def _put(refs, index, values):
    for ref, x in zip(refs, values, strict=True):
        ref[index] = x


def _add(x, y):
    return tuple(a + b for a, b in zip(x, y, strict=True))


def _multiply(x, y):
    if len(x) == 1:
        return (x[0] * y[0],)
    (xr, xi), (yr, yi) = x, y
    return xr * yr - xi * yi, xr * yi + xi * yr
