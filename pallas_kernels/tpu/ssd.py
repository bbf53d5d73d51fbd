"""``ssd`` as TPU kernels: chunks in sequence, the state in VMEM, query-key products shared by heads.

Forward, a grid step is one chunk: q and k are read once a chunk for all value heads that share them, v and
o once in all. Where it will be differentiated it writes the state too, once each some hundred tokens
(``options.span``). Backward, a grid step is the tokens between two of those states, from the last such run
to the first: it computes the states before its chunks again from what it holds in VMEM, then walks the
chunks back, so every array is moved once. Of one decay a head the sums within chunks are taken before.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.cost import ssd as cost
from pallas_kernels.tpu import ssd_chunk as one
from pallas_kernels.tpu.ssd_plan import Plan, vmem_limit


def refuses(q, k, v, g, state0, *, options):
    """Why these arguments are not for the TPU kernels, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q has dtype {q.dtype}; it must be float32 or bfloat16"
    p = Plan(q, v, g, options, last_first=True)
    size, limit = p.vmem(p.heads, p.E) >> 20, vmem_limit() >> 20
    if size > limit:
        D, E = state0.shape[2:]
        return (
            f"the states of {p.G} heads of {D} x {E} and {p.run * p.C} tokens between two that are kept take "
            f"{size} MiB of VMEM, more than {limit}"
        )
    return None


def forward(q_BTKD, k_BTKD, v_BTNE, g, state0_BNDE, *, options, keep):
    """(o [B, T, N, E], state [B, N, D, E]), and with ``keep`` states [B, spans, N, D, E], one before each
    span of tokens; g is log_decay, at least ``decay_sums.LOWEST``."""
    p = Plan(q_BTKD, v_BTNE, g, options)
    size = state0_BNDE.shape[2:]
    o, state, *kept = p.call(
        _forward_kernel,
        [p.key_spec(), p.key_spec(), p.value_spec(p.E), p.decay_spec(), p.state_spec(at=0)],
        [p.value_spec(p.E), p.state_spec(at=p.steps - 1)] + [p.kept_spec()] * keep,
        [p.value_shape(), p.state_shape()] + [p.kept_shape()] * keep,
        [(p.G, p.E, p.D), (p.C, p.C)],
        cost.forward(**p.sizes(), keep=keep),
    )(p.tokens(q_BTKD, p.D), p.tokens(k_BTKD, p.D), p.tokens(v_BTNE, p.E), p.decay(g), p.states(state0_BNDE))
    return p.tokens_back(o, v_BTNE), p.states_back(state, *size), *(p.states_back(x, *size) for x in kept)


def backward(q_BTKD, k_BTKD, v_BTNE, g, kept, do_BTNE, dstate_BNDE, *, options):
    """Gradients of q, k, v, g and state0."""
    p = Plan(q_BTKD, v_BTNE, g, options, last_first=True)
    runs = p.per, p.C, p.C
    dq, dk, dv, dg, dstate0 = p.call(
        _backward_kernel,
        [p.key_spec(), p.key_spec(), p.value_spec(p.E), p.value_spec(p.E), p.decay_spec(), p.kept_spec(),
         p.state_spec(at=0)],
        [p.key_spec(), p.key_spec(), p.value_spec(p.E), p.decay_spec(of_gradient=True),
         p.state_spec(at=p.steps - 1)],
        [p.key_shape(), p.key_shape(), p.value_shape(), p.decay_gradient_shape(), p.state_shape()],
        [(p.G, p.E, p.D), (p.per, p.heads, p.E, p.D), (p.per * p.C, p.D), (p.per * p.C, p.D)]
        + ([] if p.channel else [runs, runs, (p.C, p.heads), (p.heads, p.C)]),
        cost.backward(**p.sizes()),
    )(
        p.tokens(q_BTKD, p.D), p.tokens(k_BTKD, p.D), p.tokens(v_BTNE, p.E), p.tokens(do_BTNE, p.E),
        p.decay(g), p.states(kept), p.states(dstate_BNDE),
    )  # fmt: skip
    return (
        p.tokens_back(dq, q_BTKD), p.tokens_back(dk, k_BTKD), p.tokens_back(dv, v_BTNE),
        p.decay_back(dg, g), p.states_back(dstate0, *dstate_BNDE.shape[2:]),
    )  # fmt: skip


def _decays(g_ref, c, plan):
    """h -> what the functions of ``ssd_chunk`` call decay, of value head h in chunk c of a block."""
    if plan.channel:
        return lambda h: g_ref[plan.of_chunk(c), plan.of_head(h, plan.D)]
    columns, rows = one.scalar_sums(g_ref[c])
    return lambda h: one.scalar_decay(columns, rows, h)


def _forward_kernel(q_ref, k_ref, v_ref, g_ref, state0_ref, o_ref, state_ref, *refs, plan):
    *kept_refs, state, qk = refs
    c, j = pl.program_id(2), pl.program_id(3)
    here = pl.ds(j * plan.heads, plan.heads)
    q, k, decays = q_ref[...], k_ref[...], _decays(g_ref, 0, plan)
    outputs = one.channel_outputs if plan.channel else one.scalar_outputs
    next_state = one.channel_next_state if plan.channel else one.scalar_next_state

    @pl.when(c == 0)
    def _():
        state[here] = state0_ref[...]

    if kept_refs:

        @pl.when(lax.rem(c, plan.per) == 0)
        def _():
            kept_refs[0][...] = state[here]

    if not plan.channel:

        @pl.when(j == 0)
        def _():
            qk[...] = one.dot(q, k, 1, 1, q.dtype)

    for h in range(plan.heads):
        lanes = plan.of_head(h, plan.E)
        S, v, decay = state[j * plan.heads + h], v_ref[:, lanes], decays(h)
        o = outputs(q, k, v, decay, S, None if plan.channel else qk[...], plan.scale)
        o_ref[:, lanes] = o.astype(o_ref.dtype)
        state[j * plan.heads + h] = next_state(k, v, decay, S)

    @pl.when(c == plan.steps - 1)
    def _():
        state_ref[...] = state[here]


def _backward_kernel(
    q_ref, k_ref, v_ref, do_ref, g_ref, kept_ref, dstate_ref,
    dq_ref, dk_ref, dv_ref, dg_ref, dstate0_ref, dstate, starts, dq, dk, *shared, plan,
):  # fmt: skip
    step, j = pl.program_id(2), pl.program_id(3)
    here = pl.ds(j * plan.heads, plan.heads)
    chunks = plan.chunks_of_step(step)
    gradients = one.channel_gradients if plan.channel else one.scalar_gradients
    next_state = one.channel_next_state if plan.channel else one.scalar_next_state

    @pl.when(step == 0)
    def _():
        dstate[here] = dstate_ref[...]

    starts[0] = kept_ref[...]

    def forth(c, _):
        rows, decays = plan.of_chunk(c), _decays(g_ref, c, plan)
        for h in range(plan.heads):
            v = v_ref[rows, plan.of_head(h, plan.E)]
            starts[c + 1, h] = next_state(k_ref[rows], v, decays(h), starts[c, h])

    lax.fori_loop(0, chunks - 1, forth, None)

    def back(i, _):
        c = chunks - 1 - i
        rows, decays = plan.of_chunk(c), _decays(g_ref, c, plan)
        q, k = q_ref[rows], k_ref[rows]
        if not plan.channel:
            qk, dqk, columns, rows_of_heads = shared

        @pl.when(j == 0)
        def _():
            dq[rows] = jnp.zeros((plan.C, plan.D), jnp.float32)
            dk[rows] = jnp.zeros((plan.C, plan.D), jnp.float32)
            if not plan.channel:
                qk[c] = one.dot(q, k, 1, 1, q.dtype)
                dqk[c] = jnp.zeros((plan.C, plan.C), jnp.float32)

        for h in range(plan.heads):
            lanes = plan.of_head(h, plan.E)
            d = gradients(
                q, k, v_ref[rows, lanes], do_ref[rows, lanes], decays(h), starts[c, h],
                dstate[j * plan.heads + h], None if plan.channel else qk[c], plan.scale,
            )  # fmt: skip
            dq[rows] += d.dq
            dk[rows] += d.dk
            dv_ref[rows, lanes] = d.dv.astype(dv_ref.dtype)
            dstate[j * plan.heads + h] = d.dS
            if plan.channel:
                dg_ref[rows, plan.of_head(h, plan.D)] = d.ddecay[0]
            else:
                dqk[c] += d.dqk
                columns[:, h : h + 1], rows_of_heads[h : h + 1, :] = d.ddecay
        if not plan.channel:
            dg_ref[c] = one.scalar_decay_gradient(columns[...], rows_of_heads[...])

        @pl.when(j == plan.J - 1)
        def _():
            if not plan.channel:
                dq[rows] += one.dot(dqk[c], k, 1, 0, q.dtype)
                dk[rows] += one.dot(dqk[c], q, 0, 0, q.dtype)
            dq_ref[rows] = dq[rows].astype(dq_ref.dtype)
            dk_ref[rows] = dk[rows].astype(dk_ref.dtype)

    lax.fori_loop(0, chunks, back, None)

    @pl.when(step == plan.steps - 1)
    def _():
        dstate0_ref[...] = dstate[here]
