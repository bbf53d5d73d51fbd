"""Optimizers against optax's own with constants, and against their papers in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from scaling.config import ConfigError, validate_cell
from scaling.models.lm import abstract_params
from scaling.optim import hyper_parameters, is_hidden_matrix, make_optimizer
from scaling.program import Static, compiled, first_state
from scaling.step import eval_params

pytestmark = pytest.mark.usefixtures("quick_compiles")
NAMES = ("adamw", "lion", "muon", "schedule_free")
STEPS, WARMUP = 6, 3
SHAPES = {"blocks": {"q": (2, 4, 6), "down": (2, 6, 4), "norm": {"scale": (2, 4)}}, "embed": (8, 4)}


def cell_of(name, **optim):
    schedule = "constant" if name == "schedule_free" else "wsd"
    return validate_cell(
        {
            "model": {"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn_dim": 24}
            | {"vocab": 64},
            "optim": {"name": name, "lr": 2e-2, "beta2": 0.97, **optim},
            "schedule": {"name": schedule, "warmup_steps": WARMUP},
            "train": {"batch": 2, "steps": 40},
        }
    )


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (scale * rng.normal(size=shape)).astype(np.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(optimizer, params, steps=STEPS):
    """Parameters after every step, and the last state, on gradients that depend on the step alone."""
    state, out, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for i in range(steps):
        updates, state = update(random_tree(100 + i), state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out, state


def ours(name, scales=None, **optim):
    cell = cell_of(name, grad_clip=None, **optim)
    params = random_tree(0)
    return run(make_optimizer(Static.of(cell), hyper_parameters(cell), params, scales=scales), params)


def warm_lr(i, lr=2e-2):
    return lr * min(1, (i + 1) / WARMUP)


def warm_lr_traced(i):
    return 2e-2 * jnp.minimum(1, (i + 1) / WARMUP)


class Adam:
    """Kingma & Ba 2015, algorithm 1, on one float64 array."""

    def __init__(self, b1=0.9, b2=0.97, eps=1e-8):
        self.b1, self.b2, self.eps, self.t, self.m, self.v = b1, b2, eps, 0, 0.0, 0.0

    def __call__(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        return self.m / (1 - self.b1**self.t) / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)


class Lion:
    """Chen et al. 2023, algorithm 2."""

    def __init__(self):
        self.m = 0.0

    def __call__(self, g):
        update = np.sign(0.9 * self.m + 0.1 * g)
        self.m = 0.97 * self.m + 0.03 * g
        return update


class Muon:
    """Jordan et al. 2024 on one matrix, moments corrected as Adam's, scaled as Liu et al. 2025."""

    def __init__(self):
        self.t, self.m = 0, 0.0

    def __call__(self, g):
        self.t += 1
        self.m = 0.95 * self.m + 0.05 * g
        x = 0.95 * self.m / (1 - 0.95 ** (self.t + 1)) + 0.05 * g / (1 - 0.95**self.t)
        u, s, vt = np.linalg.svd(x / np.linalg.norm(x), full_matrices=False)
        for _ in range(5):  # the quintic acts on singular values alone
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        return 0.2 * np.sqrt(max(g.shape)) * (u * s) @ vt


def paper(rule, layers_apart=False):
    """All parameters after each step: p <- p - lr (rule(g) + 0.1 p), no decay on norms, in float64."""

    def leaf(path, p):
        rules = {}

        def direction(g):
            kind = rule(path, p)
            if not layers_apart or not is_hidden_matrix(path, p):
                return rules.setdefault(0, kind)(g)
            return np.stack([rules.setdefault(i, rule(path, p))(g[i]) for i in range(len(g))])

        wd = 0.0 if "norm" in jax.tree_util.keystr(path) else 0.1
        p, out = p.astype(np.float64), []
        for i in range(STEPS):
            g = get(random_tree(100 + i), path).astype(np.float64)
            p = p - warm_lr(i) * (direction(g) + wd * p)
            out.append(p)
        return out

    params = random_tree(0)
    return {jax.tree_util.keystr(k): leaf(k, p) for k, p in jax.tree_util.tree_leaves_with_path(params)}


def get(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


RULES = {
    "adamw": lambda path, p: Adam(),
    "lion": lambda path, p: Lion(),
    "muon": lambda path, p: Muon() if is_hidden_matrix(path, p) else Adam(),
}


@pytest.mark.parametrize("name", RULES)
def test_equals_the_paper(name):
    got, _ = ours(name)
    want = paper(RULES[name], layers_apart=name == "muon")
    # float32 moments; Newton-Schulz raises an error in a small singular value up to 3.4445^5 = 485 times
    atol = 2e-5 if name == "muon" else 2e-6
    for i, params in enumerate(got):
        for path, p in jax.tree_util.tree_leaves_with_path(params):
            np.testing.assert_allclose(
                p, want[jax.tree_util.keystr(path)][i], rtol=0, atol=atol, err_msg=f"{path} step {i}"
            )


def test_schedule_free_equals_the_paper():
    """Defazio et al. 2024, algorithm 1 with warm-up: y, z and the average x weighted by lr squared."""
    got, state = ours("schedule_free")
    averaged = contrib.schedule_free_eval_params(state[-1], got[-1])
    for path, p in jax.tree_util.tree_leaves_with_path(random_tree(0)):
        x = y = z = p.astype(np.float64)
        v, weights = 0.0, 0.0
        wd = 0.0 if "norm" in jax.tree_util.keystr(path) else 0.1
        for i in range(STEPS):
            g, lr = get(random_tree(100 + i), path).astype(np.float64), warm_lr(i)
            v = 0.97 * v + 0.03 * g**2
            z = z - lr * (g / (np.sqrt(v / (1 - 0.97 ** (i + 1))) + 1e-8) + wd * y)
            weights += lr**2
            x = (1 - lr**2 / weights) * x + lr**2 / weights * z
            y = 0.1 * z + 0.9 * x
            # x is recovered from y and z in float32 at each step, which adds up a few roundings of size 1
            np.testing.assert_allclose(get(got[i], path), y, rtol=0, atol=3e-6)
        np.testing.assert_allclose(get(averaged, path), x, rtol=0, atol=5e-6)


def test_lion_and_schedule_free_equal_optax():
    """With constants, no warm-up and no norms, against optax's ready-made ones."""
    hp = hyper_parameters(cell_of("lion", grad_clip=None)) | {"warmup": jnp.float32(0)}
    params, none = random_tree(0), lambda p: jax.tree.map(lambda x: True, p)
    del params["blocks"]["norm"]
    grads = {k: v for k, v in random_tree(7).items()}
    del grads["blocks"]["norm"]
    theirs = {
        "lion": optax.lion(2e-2, b1=0.9, b2=0.97, weight_decay=0.1, mask=none),
        "schedule_free": contrib.schedule_free_adamw(2e-2, b1=0.9, b2=0.97, weight_decay=0.1),
    }
    for name, optimizer in theirs.items():
        mine = make_optimizer(Static((), name, "constant"), hp, params)
        a, b, p, q = mine.init(params), optimizer.init(params), params, params
        for _ in range(4):
            u, a = mine.update(grads, a, p)
            w, b = optimizer.update(grads, b, q)
            p, q = optax.apply_updates(p, u), optax.apply_updates(q, w)
        for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(q), strict=True):
            # constants folded at other places: a few units in the last place of values of size one
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-6)


def test_muon_equals_optax_on_each_layer():
    """The stack of matrices is stepped like its layers one by one by optax's ``muon``."""

    def apart(tree):
        return {(name, i): tree["blocks"][name][i] for name in ("q", "down") for i in range(2)}

    got, _ = ours("muon")
    theirs = contrib.muon(warm_lr_traced, beta=0.95, weight_decay=0.1, consistent_rms=0.2)
    p = apart(random_tree(0))
    state, update = theirs.init(p), jax.jit(theirs.update)
    for i in range(STEPS):
        updates, state = update(apart(random_tree(100 + i)), state, p)
        p = optax.apply_updates(p, updates)
    for key, want in p.items():
        # products of other shapes: order of summation, raised by Newton-Schulz as above
        np.testing.assert_allclose(apart(got[-1])[key], want, rtol=0, atol=2e-5)


def test_muon_takes_the_hidden_matrices():
    cell = cell_of("muon")
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(cell["model"]))
    chosen = {
        jax.tree_util.keystr(k, simple=True, separator="/") for k, x in leaves if is_hidden_matrix(k, x)
    }
    mixer = {f"blocks/mixer/{w}" for w in ("q", "k", "v", "out")}
    assert chosen == mixer | {f"blocks/ffn/{w}" for w in ("gate", "up", "down")}


@pytest.mark.parametrize("name", NAMES)
def test_scales_of_a_leaf_are_its_own_hyper_parameters(name):
    """Multipliers of lr, eps and weight decay equal a run with the multiplied numbers; eps is made large."""
    factors = {"lr": 0.5, "eps": 3.0, "weight_decay": 1.7}
    one = jax.tree.map(lambda s: jnp.float32(1), SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    scales = {k: {**one, "embed": jnp.float32(f)} for k, f in factors.items()}
    numbers = {"lr": 2e-2, "eps": 0.3, "weight_decay": 0.2}
    got, plain = ours(name, scales, **numbers)[0][-1], ours(name, **numbers)[0][-1]
    changed = ours(name, **{k: v * factors[k] for k, v in numbers.items()})[0][-1]
    # (g / 3) / (v + eps) against g / (v + 3 eps): other roundings, six steps
    np.testing.assert_allclose(got["embed"], changed["embed"], rtol=0, atol=2e-6)
    assert np.max(np.abs(got["embed"] - plain["embed"])) > 1e-3
    for x, y in zip(jax.tree.leaves(got["blocks"]), jax.tree.leaves(plain["blocks"]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def batch_of(step):
    tokens = np.random.default_rng(step).integers(0, 8, (2, 17))  # eight of 64 tokens: soon learned
    positions = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    ids = {"inputs": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}
    return {**ids, "segment_ids": 0 * positions, "positions": positions, "loss_mask": np.ones((2, 16), "f4")}


@pytest.mark.parametrize("name", ["muon", "schedule_free"])
def test_training_and_one_program_for_two_cells(name):
    """The loss falls; a cell of other numbers runs the same compiled step; donated states are safe."""
    cells = [cell_of(name), cell_of(name, lr=1e-3, beta1=0.8, weight_decay=0.0)]
    static = Static.of(cells[0])
    assert static == Static.of(cells[1])
    step, evaluate = compiled(static)
    for cell in cells:
        hp = hyper_parameters(cell)
        for seed in range(2):  # hp must outlive the donated first state
            state, losses = first_state(static, seed, hp), []
            for i in range(25 if cell is cells[0] else 2):
                state, metrics = step(state, batch_of(i), hp)
                losses.append(float(metrics["loss"]))
        if cell is cells[0]:
            assert losses[-1] < losses[0] - 1.0
            averaged = eval_params(static, state)
            nats, tokens = evaluate(averaged, batch_of(99))
            assert float(nats.sum() / tokens.sum()) < losses[0] - 1.0
            same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), averaged, state.params)
            assert all(jax.tree.leaves(same)) == (name != "schedule_free")
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", NAMES)
def test_vmapped_over_cells_equals_each_alone(name):
    cells = [cell_of(name), cell_of(name, lr=1e-3, beta2=0.9, momentum=0.8, grad_clip=None)]
    static, params, grads = Static.of(cells[0]), random_tree(0), random_tree(1)

    def two_updates(hp):
        optimizer = make_optimizer(static, hp, params)
        state, p = optimizer.init(params), params
        for _ in range(2):
            updates, state = optimizer.update(grads, state, p)
            p = optax.apply_updates(p, updates)
        return p

    hps = [hyper_parameters(c) for c in cells]
    together = jax.jit(jax.vmap(two_updates))(jax.tree.map(lambda *x: jnp.stack(x), *hps))
    for i, hp in enumerate(hps):
        for x, y in zip(jax.tree.leaves(jax.jit(two_updates)(hp)), jax.tree.leaves(together), strict=True):
            # other fusions and batched products: units in the last place, raised by Newton-Schulz as above
            np.testing.assert_allclose(x, y[i], rtol=0, atol=2e-5 if name == "muon" else 2e-6)


def test_schedule_free_refuses_a_decay():
    with pytest.raises(ConfigError, match="schedule.name is 'wsd'; optim.name = 'schedule_free'"):
        cell = cell_of("adamw")
        validate_cell({**cell, "optim": {**cell["optim"], "name": "schedule_free"}})
    with pytest.raises(ConfigError, match="optim.beta1 is 0"):
        cell_of("schedule_free", beta1=0.0)


def test_muon_has_no_adam_parametrisation():
    cell = {
        "model": {"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn_dim": 24},
        "optim": {"lr": 1e-2, "name": "muon"},
        "schedule": {"warmup_steps": 1},
        "train": {"batch": 2, "steps": 4},
    }
    cell["model"] |= {"parametrization": "mup", "base_d_model": 8}
    with pytest.raises(ConfigError, match="optim.name is 'muon' with model.parametrization = 'mup'"):
        validate_cell(cell)
