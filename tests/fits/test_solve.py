"""The solver: derivatives against differences, optima against other optimisers, statuses on bad tables."""

import math

import numpy as np
import pytest
from fits_tables import PLANTED, planted_loss, planted_table
from scipy.optimize import minimize

from fits.errors import FitError
from fits.laws import LAWS, get_law
from fits.objective import AutodiffProblem, PowerSumProblem, RowLoss, make_problem
from fits.solve import cholesky_solve, point_starts, profile, solve
from fits.solve import exponent_grid as grid_of


def logs(table):
    return {"N": np.log(table["params"]), "D": np.log(table["tokens"]), "C": np.log(table["flops"])}


def close(got, want, digits=5):
    """Equal when rounded to that many significant digits (half a unit either way)."""
    return abs(got - want) <= 0.5001 * 10.0 ** (math.floor(math.log10(abs(want))) + 1 - digits)


def plain_objective(table, theta, delta=1e-3, space="log"):
    """The published objective in its own parametrisation: log A, log B, log E, alpha, beta."""
    a, b, e, alpha, beta = theta
    terms = np.stack(
        [
            a - alpha * np.log(table["params"]),
            b - beta * np.log(table["tokens"]),
            np.full(len(table["loss"]), e),
        ]
    )
    r = np.logaddexp.reduce(terms, 0) - np.log(table["loss"])
    return np.where(np.abs(r) <= delta, 0.5 * r**2, delta * (np.abs(r) - 0.5 * delta)).sum()


# --- published tables: reference optima, to as many digits as they are known ---

TARGETS = {
    "huber": ({}, (1.817218, 477.826, 2143.417, 0.3473105, 0.3671724), 5),
    "lad": ({"loss": "lad"}, (1.81686, 482.01, 2085.44, 0.34781, 0.36585), 5),
    "least squares": ({"loss": "least_squares"}, (1.8646, 593.3, 4875.6, 0.3603, 0.4059), 4),
    "raw": (
        {"loss": "least_squares", "space": "raw"},
        (1.8828136, 567.8055, 7581.852, 0.3576151, 0.4276206), 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(TARGETS))
def test_epoch_240(epoch, name):
    options, targets, digits = TARGETS[name]
    kept = epoch[epoch.kept == 1]
    _, point = solve(get_law("chinchilla"), logs(kept), kept.loss.to_numpy(), **options)
    assert point.status == "converged", point.reasons
    for key, want in zip(("E", "A", "B", "alpha", "beta"), targets, strict=True):
        assert close(point.params[key], want, digits), (key, point.params[key], want)


def test_epoch_objectives(epoch):
    kept = epoch[epoch.kept == 1]
    x, y = logs(kept), kept.loss.to_numpy()
    objective = {k: solve(get_law("chinchilla"), x, y, **o)[1].objective for k, (o, _, _) in TARGETS.items()}
    # the figures carry 11 or more digits; a sum of 240 terms is exact to about 1e-14
    assert math.isclose(objective["huber"], 0.0010182740178, rel_tol=1e-10)
    assert math.isclose(objective["lad"], 1.1294946536, rel_tol=1e-9)
    assert math.isclose(2 * objective["raw"], 0.0832038077, rel_tol=1e-8)  # ours is half the sum of squares


def test_epoch_245(epoch):
    _, point = solve(get_law("chinchilla"), logs(epoch), epoch.loss.to_numpy())
    for key, want in zip(
        ("E", "A", "B", "alpha", "beta"), (1.89134, 495.73, 12845.6, 0.34931, 0.45305), strict=True
    ):
        assert close(point.params[key], want), (key, point.params[key])


def test_kyo_234(kyo):
    for options, targets in (
        ({}, (1.78389, 442.16, 1271.81, 0.34263, 0.34200)),
        ({"loss": "least_squares"}, (1.79624, 510.79, 1335.56, 0.35126, 0.34406)),
    ):
        _, point = solve(get_law("chinchilla"), logs(kyo), kyo.loss.to_numpy(), **options)
        for key, want in zip(("E", "A", "B", "alpha", "beta"), targets, strict=True):
            assert close(point.params[key], want), (options, key, point.params[key])


def test_no_random_start_beats_the_optimum(epoch):
    """64 starts of L-BFGS-B on the objective written out here; half of them end elsewhere, none lower."""
    kept = {k: epoch[epoch.kept == 1][k].to_numpy() for k in ("params", "tokens", "flops", "loss")}
    _, point = solve(get_law("chinchilla"), logs(kept), kept["loss"])
    p = point.params
    theta = [math.log(p["A"]), math.log(p["B"]), math.log(p["E"]), p["alpha"], p["beta"]]
    assert math.isclose(plain_objective(kept, theta), point.objective, rel_tol=1e-10)
    rng = np.random.default_rng(0)
    lowest = np.inf
    for _ in range(64):
        start = rng.uniform([0, 0, -1, 0, 0], [25, 25, 1, 2, 2])
        found = minimize(lambda t: plain_objective(kept, t), start, method="L-BFGS-B")
        lowest = min(lowest, found.fun)
    assert lowest >= point.objective * (1 - 1e-9)
    assert lowest <= point.objective * 1.05, (
        "the independent optimiser should come close, else it tests nothing"
    )


# --- derivatives, and the two ways to compute them ---

CASES = [("huber", 1e-3, "log"), ("huber", 1e-2, "raw"), ("least_squares", 1.0, "log"), ("lad", 1e-3, "log")]


@pytest.mark.parametrize(("loss", "delta", "space"), CASES)
@pytest.mark.parametrize("name", ["chinchilla", "tied", "product", "power_C"])
def test_numpy_and_autodiff_agree(name, loss, delta, space):
    """Written derivatives against JAX's, and JAX's value against the objective written out."""
    table, law, rng = planted_table(noise=3e-3), LAWS[name], np.random.default_rng(1)
    x = {v: logs(table)[v] for v in law.variables}
    ours = PowerSumProblem(law, x, table["loss"], space)
    jaxs = AutodiffProblem(law, x, table["loss"], space)
    base = {"E": 1.8, "A": 480.0, "B": 2100.0, "K": 1500.0, "alpha": 0.35, "beta": 0.36, "gamma": 0.16}
    params = {k: base[k] * rng.uniform(0.9, 1.1, 3) for k in law.parameters}
    weights = rng.exponential(size=(3, len(table["loss"])))
    row_loss = RowLoss(loss, delta)
    one = ours.evaluate(ours.from_params(params), weights, row_loss)
    two = jaxs.evaluate(jaxs.from_params(params), weights, row_loss)
    np.testing.assert_allclose(one.value_B, two.value_B, rtol=1e-10)
    # the coordinates differ: compare gradients through the matrix d ours / d jax's, by differences of the map
    step = 1e-6
    for lane in range(3):
        q = jaxs.from_params({k: v[lane] for k, v in params.items()})[0]

        def to_ours(q):
            return ours.from_params(jaxs.to_params(q[None]))[0]

        columns = [(to_ours(q + d) - to_ours(q - d)) / (2 * step) for d in step * np.eye(len(q))]
        chain = np.stack(columns, 1)
        # central differences of a smooth map with step 1e-6: relative error about 1e-9
        np.testing.assert_allclose(
            one.gradient_BxK[lane] @ chain,
            two.gradient_BxK[lane],
            rtol=1e-6,
            atol=1e-9 * np.abs(two.gradient_BxK[lane]).max(),
        )
        np.testing.assert_allclose(
            chain.T @ one.majoriser_BxKxK[lane] @ chain,
            two.majoriser_BxKxK[lane],
            rtol=1e-6,
            atol=1e-9 * np.abs(two.majoriser_BxKxK[lane]).max(),
        )


@pytest.mark.parametrize("space", ["log", "raw"])
@pytest.mark.parametrize("name", ["chinchilla", "tied", "product"])
def test_gradient_and_hessian_are_derivatives(name, space):
    """Against central differences of the value and of the gradient, least squares (smooth everywhere)."""
    table, law = planted_table(noise=3e-3), LAWS[name]
    problem = make_problem(law, {v: logs(table)[v] for v in law.variables}, table["loss"], space)
    weights = np.random.default_rng(2).exponential(size=(1, len(table["loss"])))
    row_loss = RowLoss("least_squares", 1.0)
    p = point_starts(problem, weights[0], 1)[0] * 1.05
    at = problem.evaluate(p[None], weights, row_loss)
    for k, e in enumerate(1e-5 * np.eye(len(p))):
        up, down = (problem.evaluate((p + s * e)[None], weights, row_loss) for s in (1, -1))
        slope = (up.value_B[0] - down.value_B[0]) / 2e-5
        bend = (up.gradient_BxK[0] - down.gradient_BxK[0]) / 2e-5
        # central differences with step 1e-5: third derivatives times 1e-10, rounding 1e-16 / 1e-5
        np.testing.assert_allclose(at.gradient_BxK[0, k], slope, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(at.hessian_BxKxK[0, k], bend, rtol=1e-5, atol=1e-7)


def test_numpy_and_jax_fits_agree(epoch):
    kept = epoch[epoch.kept == 1]
    law, x, y = get_law("chinchilla"), logs(kept), kept.loss.to_numpy()
    _, ours = solve(law, x, y)
    from fits.objective import AutodiffProblem
    from fits.solve import newton

    problem = AutodiffProblem(law, x, y, "log")
    start = problem.from_params({"E": 1.9, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.35})
    found = newton(problem, start, np.ones((1, len(y))), RowLoss("huber", 1e-3))
    assert found.converged_B[0]
    for key, value in problem.to_params(found.p_BxK).items():
        # both sit at the minimum to its rounding; parameters follow with the condition number, about 1e3
        assert math.isclose(value[0], ours.params[key], rel_tol=1e-9), key
    assert math.isclose(found.value_B[0], ours.objective, rel_tol=1e-12)


def test_jax_stays_in_float32_outside():
    import jax.numpy as jnp

    solve(get_law("kaplan"), logs(planted_table(noise=1e-3)), planted_table(noise=1e-3)["loss"])
    assert jnp.ones(2).dtype == jnp.float32


def test_row_losses():
    r = np.array([-3.0, -0.5, 0.0, 1e-4, 2.0])
    np.testing.assert_allclose(RowLoss("huber", 1.0).value(r), [2.5, 0.125, 0, 5e-9, 1.5])
    np.testing.assert_allclose(RowLoss("least_squares", 1.0).value(r), [4.5, 0.125, 0, 5e-9, 2.0])
    np.testing.assert_allclose(RowLoss("lad", 1e-9).value(r), np.abs(r), atol=1e-9)
    first, second, robust = RowLoss("huber", 1.0).derivatives(r)
    np.testing.assert_allclose(first, [-1, -0.5, 0, 1e-4, 1])
    np.testing.assert_allclose(second, [0, 1, 1, 1, 0])
    np.testing.assert_allclose(robust, [1 / 3, 1, 1, 1, 0.5])


def test_cholesky_solve_against_numpy():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((50, 5, 5))
    matrix, rhs = root @ root.transpose(0, 2, 1) + 0.1 * np.eye(5), rng.standard_normal((50, 5))
    x, good = cholesky_solve(matrix, rhs)
    assert good.all()
    np.testing.assert_allclose(x, np.linalg.solve(matrix, rhs[..., None])[..., 0], rtol=1e-8, atol=1e-10)
    assert not cholesky_solve(-matrix, rhs)[1].any(), "a negative matrix is not positive"
    assert not cholesky_solve(np.full((1, 5, 5), np.nan), rhs[:1])[1].any(), "NaN never passes"


def test_profile_is_weighted_least_squares():
    table = planted_table(noise=3e-3)
    problem = make_problem(get_law("chinchilla"), logs(table), table["loss"])
    weights = np.random.default_rng(0).exponential(size=(2, len(table["loss"])))
    grid = grid_of(problem, 5)
    rss, p = profile(problem, weights, grid)
    checked = 0
    for lane in range(2):
        for g, (alpha, beta) in enumerate(grid):
            X = (
                np.stack([np.ones(42), table["params"] ** -alpha, table["tokens"] ** -beta], 1)
                / table["loss"][:, None]
            )
            X = X / np.abs(X).max(0)
            root = np.sqrt(weights[lane])[:, None]
            coefficients, _, _, _ = np.linalg.lstsq(X * root, root[:, 0], rcond=None)
            if (coefficients >= 0).all():
                want = ((X @ coefficients - 1) ** 2 * weights[lane]).sum()
                # the normal equations square a condition number of up to 1e4
                assert math.isclose(rss[lane, g], want, rel_tol=1e-4, abs_tol=1e-9)
                checked += 1
    assert checked >= 10
    assert p.shape == (2, len(grid), 5)


# --- options ---


def test_fixed_parameters(epoch):
    kept = epoch[epoch.kept == 1]
    law, x, y = get_law("chinchilla"), logs(kept), kept.loss.to_numpy()
    _, free = solve(law, x, y)
    for name, value in free.params.items():
        _, pinned = solve(law, x, y, fixed={name: value})
        assert pinned.params[name] == value
        assert math.isclose(pinned.objective, free.objective, rel_tol=1e-9), name
        for other, want in free.params.items():
            # the pinned value is the optimum itself, so nothing else may move beyond the solver's own 1e-8
            assert math.isclose(pinned.params[other], want, rel_tol=1e-6), (name, other)
    _, low = solve(law, x, y, fixed={"E": 1.6})
    assert low.params["E"] == 1.6 and low.objective > free.objective


def test_weights_are_repetitions():
    table = planted_table(noise=4e-3)
    counts = np.random.default_rng(0).integers(0, 4, len(table["loss"]))
    law, x = get_law("chinchilla"), logs(table)
    _, weighted = solve(law, x, table["loss"], weights=counts.astype(float))
    rows = np.repeat(np.arange(len(counts)), counts)
    _, repeated = solve(law, {k: v[rows] for k, v in x.items()}, table["loss"][rows])
    assert math.isclose(weighted.objective, repeated.objective, rel_tol=1e-10)
    for key, value in repeated.params.items():
        assert math.isclose(weighted.params[key], value, rel_tol=1e-6), key


def test_the_unit_of_the_loss_does_not_matter():
    table, law = planted_table(noise=3e-3), get_law("chinchilla")
    _, nats = solve(law, logs(table), table["loss"])
    _, bits = solve(law, logs(table), table["loss"] / math.log(2))
    for key in ("alpha", "beta"):
        assert math.isclose(nats.params[key], bits.params[key], rel_tol=1e-7)
    for key in ("E", "A", "B"):
        assert math.isclose(nats.params[key] / math.log(2), bits.params[key], rel_tol=1e-7)


def test_units_of_n_and_d_do_not_matter():
    table, law = planted_table(noise=3e-3), get_law("chinchilla")
    _, one = solve(law, logs(table), table["loss"])
    _, two = solve(law, {k: v - math.log(1e6) for k, v in logs(table).items()}, table["loss"])
    assert math.isclose(one.objective, two.objective, rel_tol=1e-12)
    assert math.isclose(one.params["A"], two.params["A"] * 1e6 ** one.params["alpha"], rel_tol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mse"}, "loss is 'mse'; it must be one of huber, lad, least_squares"),
        ({"space": "linear"}, "space is 'linear'; it must be one of log, raw"),
        ({"delta": 0.0}, "delta is 0.0; it must be a positive number"),
        ({"delta": float("nan")}, "delta is nan"),
        ({"fixed": {"gamma": 1.0}}, "fixed names 'gamma'; chinchilla has the parameters E, A, B"),
        ({"fixed": {"alpha": -1.0}}, "fixed alpha is -1.0; it must be a number between"),
        ({"fixed": PLANTED}, "fixed names every parameter of chinchilla"),
        ({"bounds": {"E": (2.0, 1.0)}}, "bounds of E are"),
        ({"bounds": {"F": (0, 1)}}, "bounds names 'F'"),
        ({"bounds": {"A": (1.0, 2.0)}}, "bounds of A are"),
    ],
)
def test_bad_options_are_named(options, message):
    table = planted_table()
    with pytest.raises(FitError, match=message.replace("(", r"\(")):
        solve(get_law("chinchilla"), logs(table), table["loss"], **options)


# --- statuses ---


def test_fewer_rows_than_parameters():
    table = {k: v[:4] for k, v in planted_table().items()}
    with pytest.raises(FitError, match="the table has 4 usable rows; chinchilla has 5 free parameters"):
        solve(get_law("chinchilla"), logs(table), table["loss"])


def test_two_sizes_do_not_determine_three_parameters():
    N, D = (a.ravel() for a in np.meshgrid([1e8, 1e9], np.geomspace(1e9, 1e11, 8)))
    table = {"params": N, "tokens": D, "flops": 6 * N * D, "loss": planted_loss(N, D)}
    _, point = solve(get_law("chinchilla"), logs(table), table["loss"])
    assert point.status == "not identified"
    assert "do not tell" in point.reasons[0]


def test_no_floor_is_a_boundary():
    table = planted_table(p={**PLANTED, "E": 0.0})
    _, point = solve(get_law("chinchilla"), logs(table), table["loss"])
    assert point.status == "boundary" and point.at_bound == ["E"]
    assert "E ended at its bound, 0" in point.reasons


def test_a_free_offset_that_runs_away_is_said():
    """28 points of L = 12 - 0.5 log N: a power law fits ever better as its offset falls without end."""
    N = np.geomspace(1e6, 1e9, 28)
    loss = 12 - 0.5 * np.log(N)
    for kind in ("huber", "least_squares"):
        _, held = solve(get_law("power_N"), {"N": np.log(N)}, loss, loss=kind)
        assert held.params["E"] == 0.0 and held.at_bound == ["E"] and held.status != "converged"
        _, free = solve(get_law("power_N"), {"N": np.log(N)}, loss, loss=kind, bounds={"E": (None, None)})
        # how far it gets is a matter of steps; that the loss has no floor left is not
        assert free.params["E"] < -20 and free.objective < 0.1 * held.objective
        assert free.status in ("boundary", "not identified", "unconverged"), free.reasons


def test_a_flat_valley_is_not_identified():
    """Six losses at each size, spread far beyond delta: any curve between the middle two is as good."""
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 3e9, 6), np.geomspace(2e9, 6e10, 6)))
    _, point = solve(get_law("power_N"), {"N": np.log(N)}, planted_loss(N, D))
    assert point.status == "not identified"
    assert "different parameters fit equally well" in point.reasons[0]


def test_nothing_to_fit_is_not_converged():
    table = planted_table()
    for loss in (np.full(42, 2.5), np.linspace(2, 3, 42)[np.argsort(table["params"])]):
        _, point = solve(get_law("chinchilla"), logs(table), loss)
        assert point.status != "converged", point
