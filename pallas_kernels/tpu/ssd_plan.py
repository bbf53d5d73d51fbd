"""How one call of the TPU kernels of ``ssd`` lies in memory and in the grid.

The grid is (batch, query-key head, run of chunks, block of value heads). Tokens are rows and heads lie side
by side in lanes, as projections write them: [B, T, N E], of which a block is some tokens of some heads.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decay_sums, dispatch, sharding
from pallas_kernels.tpu.ssd_blocks import CHUNKS

LANES = 128
HEADS = 8  # value heads a grid step at most
FEWEST = 32  # tokens a chunk that is halved to fit
SEMANTICS = ("parallel", "parallel", "arbitrary", "arbitrary")
# Bytes of VMEM that a kernel may take: v4 has 16 MiB, which any may be where none is named, the others 64
# at least.
VMEM = {None: 31 << 19, "v4": 31 << 19}
MORE_VMEM = 40 << 20
# Values that live at once in a kernel, by what it took of VMEM: [C, C], or [C, D] of a decay a channel.
STACK = 24, 36
# Tokens between kept states; the part of the other arrays' bytes that they may then cost; and how many
# bytes of one head's array may lie between two of them, on v4 and elsewhere.
SPANS = (256, 512, 1024, 2048)
KEPT_PART = 1 / 8
MOST_OF_SPAN = 1 << 18, 1 << 19


def vmem_limit() -> int:
    return VMEM.get(dispatch.tpu_generation(), MORE_VMEM)


def default_span(*, K, N, D, E, channel, itemsize) -> int:
    """Tokens between kept states: the fewest with which these cost a small part of the other bytes."""
    token = 2 * (D * K + E * N) * itemsize + 4 * N * (D if channel else 1)
    most = MOST_OF_SPAN[vmem_limit() == MORE_VMEM] // (max(D, E) * itemsize)
    fit = [s for s in SPANS if s <= max(most, SPANS[0])]
    return next((s for s in fit if KEPT_PART * s * token >= 4 * N * D * E), fit[-1])


class Plan:
    """Sizes, layouts and block specs of one call.

    Attributes:
      C: tokens a chunk.
      n: chunks.
      count: states that a differentiated call keeps, one each ``per`` chunks, the first before token 0.
      run: chunks a grid step: one forward, ``per`` backward.
      steps: grid steps along the tokens.
      heads: value heads a grid step.
      J: such blocks a query-key head.
      D, E: key and value sizes, in whole lanes where blocks must be.
    """

    def __init__(self, q_BTKD, v_BTNE, g, options, *, last_first=False):
        (self.B, self.T, self.K, D), (self.N, E) = q_BTKD.shape, v_BTNE.shape[2:]
        self.channel = g.ndim == 4
        self.dtype = q_BTKD.dtype
        self.scale = options.scale
        self.inputs = q_BTKD, v_BTNE, g
        self.last_first = last_first
        self.G = self.N // self.K
        self.D = D if self.K == 1 and not self.channel else _whole_lanes(D)
        self._cut(options.chunk or dispatch.for_generation(CHUNKS)[self.channel], options.span)
        while options.chunk is None and self.C > FEWEST and self.vmem(1, E) > vmem_limit():
            self._cut(self.C // 2, options.span)
        self.run = self.per if last_first else 1
        self.steps = math.ceil(self.n / self.run)
        self.heads = self._heads(options.heads, E)
        whole = self.heads == self.N or self.heads * E % LANES == 0
        self.E = E if whole else _whole_lanes(E)
        self.J = self.G // self.heads

    def _cut(self, chunk, span):
        """Chunks of both passes; a grid step is taken to be backward's, the larger."""
        self.C, self.n, self.count, self.per = decay_sums.chunks_for(self.T, chunk, span)
        self.run = self.per

    def _heads(self, asked, E):
        if asked:
            return math.gcd(asked, self.G)
        most = 1 if self.channel else HEADS
        divide = [h for h in range(1, most + 1) if self.G % h == 0]
        return max((h for h in divide if self.vmem(h, E) <= vmem_limit()), default=1)

    def vmem(self, heads, E):
        """Bytes that ``heads`` value heads a grid step take, nearly: blocks twice, scratch, values."""
        rows, small = self.run * self.C, 0 if self.channel else 1
        E, D = -(-heads * E // LANES) * LANES, _whole_lanes(self.D)  # E: of all heads
        blocks = self.dtype.itemsize * rows * (4 * D + 3 * E) + 3 * 4 * E * D
        blocks += 4 * rows * (24 if small else 2 * heads * D)
        scratch = 4 * (self.G // heads + self.run) * E * D + 8 * rows * (D + small * self.C)
        values = STACK[1] * D if self.channel else STACK[0] * max(self.C, LANES)
        return 2 * blocks + scratch + 4 * self.C * values

    # arrays as the kernels take them, and back

    def tokens(self, x_BTND, size):
        """[B, padded T, N size]; keys, values and log_decay of 0 leave the state as it is."""
        x = _pad_last(x_BTND, size)
        x = jnp.pad(x, [(0, 0), (0, self.n * self.C - self.T), (0, 0), (0, 0)])
        return x.reshape(self.B, self.n * self.C, -1)

    def tokens_back(self, x, like_BTND):
        """The inverse of ``tokens``."""
        _, T, N, size = like_BTND.shape
        return x.reshape(self.B, self.n * self.C, N, -1)[:, :T, :, :size]

    def states(self, x):
        """[..., N, D, E] to [B, ..., K, G, E, D], K before what stands between."""
        x = _pad_last(_pad_last(x, self.E).swapaxes(-1, -2), self.D)
        x = x.reshape(*x.shape[:-3], self.K, self.G, self.E, self.D)
        return jnp.moveaxis(x, -4, 1)

    def states_back(self, x, D, E):
        x = jnp.moveaxis(x, 1, -4)
        x = x.reshape(*x.shape[:-4], self.N, self.E, self.D)
        return x[..., :E, :D].swapaxes(-1, -2)

    def decay(self, g):
        """log_decay a channel as other tokens; a head as its sums within chunks, exact ones and rests,
        [B, K, n, J, 2 heads, C]."""
        if self.channel:
            return self.tokens(g, self.D)
        g = jnp.pad(g, [(0, 0), (0, self.n * self.C - self.T), (0, 0)])
        g = g.reshape(self.B, self.n, self.C, self.K, self.J, self.heads)
        return jnp.concatenate(decay_sums.exact_cumsum(g.transpose(0, 3, 1, 4, 5, 2)), axis=-2)

    def decay_back(self, dg, like):
        if self.channel:
            return self.tokens_back(dg, like)
        # a token takes part in every sum from it on
        dg = lax.cumsum(dg, axis=dg.ndim - 1, reverse=True)
        dg = dg.transpose(0, 2, 5, 1, 3, 4).reshape(self.B, self.n * self.C, self.N)
        return dg[:, : self.T]

    # blocks

    def _at(self, c):
        return self.steps - 1 - c if self.last_first else c

    def key_spec(self):
        return pl.BlockSpec((None, self.run * self.C, self.D), lambda b, k, c, j: (b, self._at(c), k))

    def value_spec(self, size):
        block = (None, self.run * self.C, self.heads * size)
        return pl.BlockSpec(block, lambda b, k, c, j: (b, self._at(c), k * self.J + j))

    def decay_spec(self, of_gradient=False):
        if self.channel:
            return self.value_spec(self.D)
        block = (None, None, self.run, None, self.heads * (2 - of_gradient), self.C)
        return pl.BlockSpec(block, lambda b, k, c, j: (b, k, self._at(c), j, 0, 0))

    def kept_spec(self):
        """The state before the tokens of a run of ``per`` chunks."""
        block = (None, None, None, self.heads, self.E, self.D)
        if self.last_first:
            return pl.BlockSpec(block, lambda b, k, c, j: (b, k, self._at(c), j, 0, 0))

        def index(b, k, c, j):  # stands still but in the first chunk of a run
            first = lax.rem(c, self.per) == 0  # not %, whose rule for signs needs a device to lower
            return b, k, lax.div(c, self.per), jnp.where(first, j, self.J - 1), 0, 0

        return pl.BlockSpec(block, index)

    def state_spec(self, *, at):
        """States that are read or written in grid step ``at`` of the tokens alone: the index stands still
        otherwise, so that no other step moves them."""
        still = self.J - 1 if at == 0 else 0
        block = (None, None, self.heads, self.E, self.D)
        return pl.BlockSpec(block, lambda b, k, c, j: (b, k, jnp.where(c == at, j, still), 0, 0))

    # results

    def key_shape(self):
        return self._shape((self.B, self.n * self.C, self.K * self.D), self.dtype)

    def value_shape(self):
        return self._shape((self.B, self.n * self.C, self.N * self.E), self.dtype)

    def decay_gradient_shape(self):
        if self.channel:
            return self._shape((self.B, self.n * self.C, self.N * self.D), jnp.float32)
        return self._shape((self.B, self.K, self.n, self.J, self.heads, self.C), jnp.float32)

    def kept_shape(self):
        return self._shape((self.B, self.K, self.count, self.G, self.E, self.D), jnp.float32)

    def state_shape(self):
        return self._shape((self.B, self.K, self.G, self.E, self.D), jnp.float32)

    def _shape(self, shape, dtype):
        return sharding.out_shape(shape, dtype, *self.inputs)

    def call(self, kernel, in_specs, out_specs, out_shape, scratch, estimate):
        return pl.pallas_call(
            functools.partial(kernel, plan=self),
            grid=(self.B, self.K, self.steps, self.J),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=[pltpu.VMEM(s, jnp.float32) for s in scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=SEMANTICS, vmem_limit_bytes=vmem_limit()
            ),
            interpret=dispatch.interpret_mode(),
            cost_estimate=pl.CostEstimate(
                flops=estimate.flops,
                transcendentals=estimate.transcendentals,
                bytes_accessed=estimate.bytes,
            ),
            name="ssd_" + kernel.__name__.strip("_"),
        )

    def sizes(self):
        """Keywords of the functions of ``pallas_kernels.cost.ssd``."""
        return {
            "B": self.B, "T": self.T, "K": self.K, "N": self.N, "D": self.D, "E": self.E, "chunk": self.C,
            "kept": self.count, "channel": self.channel, "itemsize": self.dtype.itemsize,
        }  # fmt: skip

    # inside a kernel

    def chunks_of_step(self, c):
        """Chunks of grid step ``c``: the last run may have fewer."""
        return jnp.where(self._at(c) == self.steps - 1, self.n - (self.steps - 1) * self.run, self.run)

    def of_chunk(self, c):
        """The rows of chunk ``c`` in a block of a run."""
        return pl.ds(pl.multiple_of(c * self.C, self.C), self.C)

    def of_head(self, h, size):
        return slice(h * size, (h + 1) * size)


def _whole_lanes(size):
    return -(-size // LANES) * LANES


def _pad_last(x, size):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
