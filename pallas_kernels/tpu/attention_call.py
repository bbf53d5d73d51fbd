"""One ``pl.pallas_call`` of attention: blocks of every operand, and refs handed to the kernel by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, sharding
from pallas_kernels.cost import attention as cost
from pallas_kernels.tpu import attention_plan as plans

# The last axis walks the list of visits: what one step leaves in scratch the next one needs.
SEMANTICS = ("parallel", "parallel", "arbitrary")
VMEM_LIMIT = 64 * 2**20
COST = {"forward": cost.forward, "backward_q": cost.backward_q, "backward_kv": cost.backward_kv}


class Sizes(NamedTuple):
    """Of one device's part, tokens not yet padded to whole blocks; H is whole lanes."""

    B: int
    T: int
    S: int
    K: int
    G: int
    H: int
    block_q: int
    block_kv: int

    @property
    def blocks(self):
        return cost.blocks(self.T, self.S, self.block_q, self.block_kv)

    @property
    def padded(self):
        return self.blocks[0] * self.block_q, self.blocks[1] * self.block_kv


class Call:
    """Collects operands and results, then calls the kernel as ``kernel(call, refs)``, refs by name.

    Attributes:
      kind: forward, backward_q or backward_kv; the last keeps key blocks and passes over queries.
      sizes, options, plan: what the kernel may ask.
    """

    def __init__(self, kind, sizes: Sizes, options, plan: plans.Plan):
        self.kind, self.sizes, self.options, self.plan = kind, sizes, options, plan
        self.by_keys = kind == "backward_kv"
        self.scalars = {"codes": plan.codes}
        self.inputs: dict[str, tuple] = {}
        self.outputs: dict[str, tuple] = {}
        self.aliases: dict[str, str] = {}

    def has(self, name):
        return name in self.inputs

    def place(self, b, h, code):
        """(b, query head, key head, i, j) of a grid point, from its entry in the list."""
        major, minor, _ = plans.decode(code)
        G = jnp.int32(self.sizes.G)  # lax.div: // rounds down by way of sign, which asks for the device
        if self.by_keys:
            return b, h * G + jax.lax.rem(minor, G), h, jax.lax.div(minor, G), major
        return b, h, jax.lax.div(h, G), major, minor

    def _spec(self, shape, index):
        def index_map(b, h, step, codes, *_):
            return index(*self.place(b, h, codes[self.plan.start(b, h) + step]))

        return pl.BlockSpec(shape, index_map)

    @property
    def of_queries(self):
        return self._spec((None, self.sizes.block_q, self.sizes.H), lambda b, n, k, i, j: (b, i, n))

    @property
    def of_keys(self):
        return self._spec((None, self.sizes.block_kv, self.sizes.H), lambda b, n, k, i, j: (b, j, k))

    @property
    def of_query_row(self):
        return self._spec((None, None, 1, self.sizes.block_q), lambda b, n, k, i, j: (b, n, 0, i))

    def of_logits(self, rows, heads):
        block = (None, None, self.sizes.block_q, self.sizes.block_kv)
        return self._spec(block, lambda b, n, k, i, j: (b if rows > 1 else 0, n if heads > 1 else 0, i, j))

    def take(self, x: dict):
        """Adds the operands that ``x`` has, padded to whole blocks and whole lanes."""
        T, S = self.sizes.padded
        for name in ("q", "dout"):
            if name in x:
                self.inputs[name] = (_tokens_and_lanes(x[name], T, self.sizes.H), self.of_queries)
        for name in ("k", "v"):
            self.inputs[name] = (_tokens_and_lanes(x[name], S, self.sizes.H), self.of_keys)
        for name, fill in (("lse", jnp.inf), ("delta", 0)):
            if name in x:
                row = _pad(x[name].swapaxes(1, 2)[:, :, None], 3, T, constant_values=fill)
                self.inputs[name] = (row, self.of_query_row)
        for name in ("bias", "mask"):
            if name in x:
                block = _pad(_pad(x[name], 2, T), 3, S)
                block = block.astype(jnp.int8) if name == "mask" else block.astype(jnp.float32)
                self.inputs[name] = (block, self.of_logits(*block.shape[:2]))
        if "q_segments" in x:
            sides = (("q", T, self.sizes.block_q), ("kv", S, self.sizes.block_kv))
            for side, tokens, block in sides:
                ids = _pad(x[f"{side}_segments"].astype(jnp.int32), 1, tokens, mode="edge")
                by_block = ids.reshape(self.sizes.B, -1, block)
                self.scalars[f"{side}_low"] = by_block.min(2).ravel()
                self.scalars[f"{side}_high"] = by_block.max(2).ravel()
                at = (lambda b, n, k, i, j: (b, 0, i)) if side == "q" else (lambda b, n, k, i, j: (b, 0, j))
                self.inputs[f"{side}_segments"] = (ids[:, None], self._spec((None, 1, block), at))

    def give(self, name, shape, dtype, spec, *, zeros_first=False):
        """Adds a result. ``zeros_first``: its blocks that no step visits are 0 rather than undefined."""
        inputs = [x for x, _ in self.inputs.values()]
        self.outputs[name] = (sharding.out_shape(shape, dtype, *inputs), spec)
        if zeros_first:
            self.inputs[f"{name}_zeros"] = (jnp.zeros(shape, dtype), pl.BlockSpec(memory_space=pl.ANY))
            self.aliases[f"{name}_zeros"] = name

    def __call__(self, kernel, scratch: dict):
        names = [*self.scalars, *self.inputs, *self.outputs, *scratch]

        def body(*refs):
            kernel(self, SimpleNamespace(**dict(zip(names, refs, strict=True))))

        sizes = self.sizes
        grid_spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(self.scalars),
            grid=(sizes.B, sizes.K if self.by_keys else sizes.K * sizes.G, self.plan.steps),
            in_specs=[spec for _, spec in self.inputs.values()],
            out_specs=[spec for _, spec in self.outputs.values()],
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()],
        )
        before, after = [*self.scalars, *self.inputs], list(self.outputs)
        return pl.pallas_call(
            body,
            grid_spec=grid_spec,
            out_shape=[shape for shape, _ in self.outputs.values()],
            input_output_aliases={before.index(a): after.index(b) for a, b in self.aliases.items()},
            compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS, vmem_limit_bytes=VMEM_LIMIT),
            cost_estimate=self._cost(),
            interpret=dispatch.interpret_mode(),
            name=f"attention_{self.kind}",
        )(*self.scalars.values(), *(x for x, _ in self.inputs.values()))

    def _cost(self):
        s, options = self.sizes, self.options
        logits_shaped = sum(x.size * x.dtype.itemsize for x, _ in (
            self.inputs[name] for name in ("bias", "mask") if self.has(name)
        ))  # fmt: skip
        found = COST[self.kind](
            s.B, s.T, s.S, s.K * s.G, s.K, s.H, block_q=s.block_q, block_kv=s.block_kv,
            itemsize=self.inputs["q"][0].dtype.itemsize, is_causal=options.is_causal, window=options.window,
            soft_cap=options.logits_soft_cap is not None, bias_bytes=logits_shaped,
        )  # fmt: skip
        return pl.CostEstimate(
            flops=found.flops, transcendentals=found.transcendentals, bytes_accessed=found.bytes
        )


def _tokens_and_lanes(x, tokens, lanes):
    """[B, T, heads, H] to [B, tokens, heads x lanes], padded with zeros."""
    x = _pad(_pad(x, 1, tokens), 3, lanes)
    return x.reshape(*x.shape[:2], -1)


def _pad(x, axis, size, **how):
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, **how)
