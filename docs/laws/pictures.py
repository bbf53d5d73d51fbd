"""The pictures of the pages beside this script, one function each.

python docs/laws/pictures.py [NAME ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import fits
from fits.laws import get_law
from fits.laws.attempts import INTENSITY, attempt_cost
from fits.laws.growth import ramp_average
from fits.laws.precision import SIZE
from fits.laws.quality import mixture_loss
from fits.planted import STUDIES, planted
from fits.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    label_log_axis,
    panels,
    png,
    scientific,
    short,
    styled,
)
from fits.solve import solve

ONE = (5.6, 3.4)
POOLS = {"utility": [0.16, 0.125, 0.1, 0.085], "half_life": [6.727, 8.545, 5.273, 2.273]}
SCRATCH = {"E": 1.6, "K": 40.0, "beta": 0.25}  # of a model from scratch, beside planted up-cycled ones
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)


@styled
def data_constrained():
    """Loss against tokens, with new tokens and with one pool of them repeated."""
    figure, [ax] = panels(None, 1, ONE)
    law, p, pool = get_law("data_constrained_tied"), get_law("data_constrained_tied").PUBLISHED, 1e10
    D = np.geomspace(2e9, 1e12, 200)
    for unique, name, colour in ((np.inf, "new tokens", GREY), (pool, "10B tokens, repeated", BLUE)):
        ax.plot(
            D, law.predict(p, {"N": 2e9, "D": D, "U": np.minimum(unique, 1e13)}), color=colour, label=name
        )
    for passes in (1, 4, 16, 40):
        x = passes * pool
        y = float(law.predict(p, {"N": 2e9, "D": x, "U": pool}))
        ax.plot(x, y, "o", color=BLUE, ms=4)
        ax.annotate(
            f"{passes} pass" + "es" * (passes > 1), (x, y), (4, 6), textcoords="offset points", fontsize=8
        )
    ax.set(
        xscale="log", xlabel="training tokens D", ylabel="loss", title="2B parameters, published constants"
    )
    label_log_axis(ax.xaxis, short)
    ax.legend()
    return figure


@styled
def serving():
    """Size and cost of the cheapest model as good as a compute-optimal 13B, against the tokens served."""
    figure, axes = panels(None, 2, (7.6, 3.2))
    served = np.geomspace(1e10, 1e14, 13)
    for size, colour in ((1e9, GREEN), (13e9, BLUE), (70e9, ORANGE)):
        got = [fits.ask("chinchilla", "serve", params=size, inference_tokens=t) for t in served]
        name = f"as good as a {short(size)}"
        axes[0].plot(served, [a["params"] for a in got], color=colour, label=name)
        axes[1].plot(served, [100 * a["saved_share"] for a in got], color=colour, label=name)
    for ax, what in zip(axes, ("parameters to train", "saved, % of training and serving"), strict=True):
        ax.set(xscale="log", xlabel="tokens served", ylabel=what)
        label_log_axis(ax.xaxis, short)
    axes[0].set_yscale("log")
    label_log_axis(axes[0].yaxis, short)
    axes[1].legend()
    return figure


@styled
def precision():
    """The best share of quantization-aware training, and the loss of planted constants against bits."""
    figure, axes = panels(None, 2, (7.6, 3.2))
    S = np.geomspace(5, 1e4, 200)
    axes[0].plot(S, get_law("qat_share").predict(get_law("qat_share").PUBLISHED, {"T": S}), color=BLUE)
    axes[0].plot((40, 2000), (0.161, 0.413), "o", color=ORANGE, label="published")
    axes[0].set(xscale="log", xlabel="tokens a parameter-byte", ylabel="share trained quantization-aware")
    label_log_axis(axes[0].xaxis, short)
    law, p = get_law("precision_joint"), {k: np.array([v]) for k, v in STUDIES["precision_joint"][0].items()}
    bits = np.linspace(2, 16, 100)
    for budget, colour in ((1e20, GREEN), (1e21, BLUE), (1e22, ORANGE)):
        loss = SIZE.answer(law, p, {"flops": budget, "weight_bits": bits})["loss"]
        axes[1].plot(bits, loss, color=colour, label=f"{scientific(budget)} FLOPs")
    best = law.questions["bits"].answer(law, p, {"flops": 1e21})["bits"]
    axes[1].axvline(float(best[0]), color=GREY, lw=0.8, ls=":")
    axes[1].set(xlabel="bits of all three", ylabel="loss at the best size", title="planted constants")
    for ax in axes:
        ax.legend()
    return figure


@styled
def moe():
    """The best granularity against the budget, and leverage against the active share."""
    figure, axes = panels(None, 2, (7.6, 3.2))
    budgets = np.geomspace(1e17, 1e26, 13)
    got = [fits.ask("fine_grained", "granularity", flops=c)["granularity"] for c in budgets]
    axes[0].plot(budgets, got, color=BLUE, label="continuous")
    axes[0].plot((2.95e18, 1.93e20, 6.46e21, 4.97e25), (8, 16, 32, 64), "o", color=ORANGE, label="published")
    axes[0].set(xscale="log", xlabel="training FLOPs", ylabel="best granularity")
    axes[0].set_yscale("log", base=2)
    axes[0].yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    label_log_axis(axes[0].xaxis, scientific)
    law, share = get_law("leverage"), np.geomspace(0.008, 1, 100)
    for budget, colour in ((1e20, GREEN), (1e22, ORANGE)):
        x = {"X": share, "G": 12.0, "C": budget}
        axes[1].plot(share, law.predict(law.PUBLISHED, x), color=colour, label=f"{scientific(budget)} FLOPs")
    axes[1].axhline(1, color=GREY, lw=0.8, ls=":")
    axes[1].set(xscale="log", xlabel="active share of experts", ylabel="leverage over a dense model")
    axes[1].xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    for ax in axes:
        ax.legend()
    return figure


@styled
def sparsity():
    """Loss against sparsity at one budget for several sizes, and the best sparsity against size."""
    figure, axes = panels(None, 2, (7.6, 3.2))
    law, share = get_law("sparsity"), np.geomspace(0.002, 1, 200)
    p, budget = law.PUBLISHED, 1e21
    for size, colour in ((1e9, GREEN), (1e10, BLUE), (1e11, ORANGE)):
        loss = law.predict(p, {"N": size, "D": budget / (6 * size * share), "X": share})
        axes[0].plot(share, loss, color=colour, label=f"{short(size)} parameters")
        best = fits.ask("sparsity", "sparsity", flops=budget, params=size)
        axes[0].plot(best["active_share"], best["loss"], "o", color=colour)
    axes[0].set(xscale="log", xlabel="share of experts at work", ylabel="loss", title="1e21 FLOPs")
    axes[0].set_ylim(1.9, 2.7)
    axes[0].xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    N = np.geomspace(1e8, 1e12, 30)
    for budget, colour in ((1e20, GREEN), (1e21, BLUE), (1e22, ORANGE)):
        got = [fits.ask("sparsity", "sparsity", flops=budget, params=n)["sparsity"] for n in N]
        axes[1].plot(N, got, color=colour, label=f"{scientific(budget)} FLOPs")
    axes[1].set(xscale="log", xlabel="parameters of all experts", ylabel="best sparsity")
    label_log_axis(axes[1].xaxis, short)
    for ax in axes:
        ax.legend()
    return figure


@styled
def growth():
    """Loss of up-cycled models by dense tokens against one from scratch; losses at equal average sizes."""
    figure, axes = panels(None, 2, (7.6, 3.2))
    law, p, D = get_law("upcycling"), STUDIES["upcycling"][0], np.geomspace(1e9, 3e12, 200)
    for dense, colour in ((1e9, GREEN), (1e11, BLUE), (1e13, PURPLE)):
        axes[0].plot(
            D, law.predict(p, {"D1": dense, "D": D}), color=colour, label=f"after {short(dense)} dense"
        )
    axes[0].plot(
        D, SCRATCH["E"] + SCRATCH["K"] * D ** -SCRATCH["beta"], color=GREY, ls="--", label="from scratch"
    )
    axes[0].set(xscale="log", xlabel="tokens after up-cycling", ylabel="loss", title="planted constants")
    label_log_axis(axes[0].xaxis, short)
    ends = np.linspace(0, 1, 100)
    for start, colour in ((0.0, BLUE), (0.25, ORANGE), (0.5, GREEN)):
        inside = ends[ends >= start]
        average = ramp_average(1.0, 0.2, start, inside)
        axes[1].plot(inside, average, color=colour, label=f"pruned to 20 % from {start:g}")
    axes[1].set(xlabel="share of training at which the ramp ends", ylabel="average parameters / N")
    axes[0].legend()
    axes[1].legend(loc="lower right")
    return figure


@styled
def quality():
    """Error against samples seen, for the best pool alone and for the best few together."""
    figure, [ax] = panels(None, 1, ONE)
    p, seen = get_law("quality").PUBLISHED, np.geomspace(8e6, 2e9, 120)
    for count, colour in zip((1, 2, 3, 4), (BLUE, ORANGE, GREEN, PURPLE), strict=True):
        some = (POOLS["utility"][:count], POOLS["half_life"][:count], 12.8e6)
        loss = [mixture_loss(p["E"], p["n0"], *some, n) for n in seen]
        ax.plot(seen, loss, color=colour, label=f"best {10 * count} %")
    ax.set(
        xscale="log", xlabel="samples seen, repeats included", ylabel="error", title="T-MARS pools of 12.8M"
    )
    label_log_axis(ax.xaxis, short)
    ax.legend()
    return figure


@styled
def tuning():
    """Step Law's learning rate and batch, and steps against tokens at equal loss."""
    figure, axes = panels(None, 2, (7.6, 3.2))
    law, D = get_law("tuned_ND"), np.geomspace(1e9, 1e13, 50)
    for size, colour in ((1e8, GREEN), (1e9, BLUE), (1e10, ORANGE)):
        rate = law.predict(law.PUBLISHED, {"N": size, "D": D})
        axes[0].plot(D, rate, color=colour, label=f"{short(size)} parameters")
    axes[0].set(xscale="log", yscale="log", xlabel="training tokens D", ylabel="best learning rate")
    label_log_axis(axes[0].xaxis, short)
    batch, critical = np.geomspace(3e4, 3e7, 100), 8e5
    axes[1].plot(
        batch * (1 + critical / batch) / critical, 1 + critical / batch, color=BLUE, label="equal loss"
    )
    axes[1].plot(2, 2, "o", color=ORANGE, label="critical batch")
    axes[1].set(xscale="log", yscale="log", xlabel="tokens / least tokens", ylabel="steps / least steps")
    for axis in (axes[1].xaxis, axes[1].yaxis):
        label_log_axis(axis, short)
    for ax in axes:
        ax.legend()
    return figure


@styled
def coverage():
    """Failures against attempts: each problem's fall exponentially, their mean as a power."""
    figure, [ax] = panels(None, 1, ONE)
    law, k = get_law("coverage"), np.geomspace(1, 1e5, 200)
    for rate in (0.3, 0.03, 0.003):
        name = "one problem each" if rate == 0.3 else None
        ax.plot(k, (1 - rate) ** k, color=GREY, lw=0.8, ls="--", label=name)
    for floor, a, colour in ((0.0, 0.45, BLUE), (0.0, 0.25, GREEN), (0.05, 0.45, ORANGE)):
        left = law.predict({"U": floor, "a": a, "b": 2.0}, {"K": k})
        ax.plot(k, left, color=colour, label=f"a {a:g}" + f", {floor:g} unsolvable" * (floor > 0))
    ax.set(xscale="log", yscale="log", ylim=(5e-3, 1.1), xlabel="attempts k", ylabel="1 - pass@k")
    label_log_axis(ax.xaxis, short)
    ax.legend(fontsize=8, loc="upper right")
    return figure


@styled
def test_time():
    """Failures against size at three budgets, with and without the cache; the best size by answer length."""
    figure, axes = panels(None, 2, (7.6, 3.2))
    law, p = get_law("coverage_N"), STUDIES["coverage_N"][0]
    question, arrays = law.questions["allocate"], {k: np.array([v]) for k, v in p.items()}
    default = {k: v for k, (v, _) in question.takes.items()}
    N = np.geomspace(1e8, 1e12, 200)
    cache = default["cache"] * (N / 1e9) ** default["cache_power"]
    for budget, colour in ((1e15, GREEN), (1e16, BLUE), (1e17, ORANGE)):
        for intensity, style in ((INTENSITY, "-"), (0.0, ":")):
            one, shared = attempt_cost(N, 512.0, 1000.0, cache, 4.0, intensity)
            k = (budget - shared) / one
            left = np.where(k >= 1, law.predict(p, {"N": N, "K": np.maximum(k, 1.0)}), np.nan)
            name = f"{scientific(budget)} FLOPs" if intensity else None
            axes[0].plot(N, left, style, color=colour, label=name)
    axes[0].set(
        xscale="log", xlabel="parameters", ylabel="1 - pass@k", title="1,000 tokens; dotted: free cache"
    )
    tokens = np.geomspace(100, 1e4, 25)
    got = [question.answer(law, arrays, default | {"flops": 1e18, "tokens": t}) for t in tokens]
    for key, colour, name in (("params", BLUE, "cache counted"), ("params_flops_only", GREY, "FLOPs alone")):
        axes[1].plot(tokens, [float(g[key][0]) for g in got], color=colour, label=name)
    axes[1].set(xscale="log", yscale="log", xlabel="tokens an attempt", ylabel="best size at 1e18")
    axes[1].set_title("planted constants")
    for axis in (axes[0].xaxis, axes[1].xaxis, axes[1].yaxis):
        label_log_axis(axis, short)
    for ax in axes:
        ax.legend()
    return figure


@styled
def rl():
    """Data against updates at equal return, and the cheapest ratio at three prices."""
    figure, [ax] = panels(None, 1, ONE)
    law = get_law("updates_to_data")
    p, ratio = (
        {k: np.array([v]) for k, v in STUDIES["updates_to_data"][0].items()},
        np.geomspace(0.05, 200, 300),
    )
    data = law.predict(STUDIES["updates_to_data"][0], {"R": ratio})
    ax.plot(data, ratio * data, color=BLUE, label="equal return")
    for price, colour in ((1.0, ORANGE), (0.1, GREEN), (0.01, PURPLE)):
        got = law.questions["budget"].answer(law, p, {"price_datum": 1.0, "price_update": price})
        ax.plot(got["data"], got["updates"], "o", color=colour, label=f"an update at {price:g} of a step")
    ax.set(
        xscale="log", yscale="log", xlabel="environment steps", ylabel="updates", title="planted constants"
    )
    for axis in (ax.xaxis, ax.yaxis):
        label_log_axis(axis, short)
    ax.legend()
    return figure


@styled
def recurrence():
    """Parameters that passes are worth against what they cost, and the best passes against the budget."""
    figure, axes = panels(None, 2, (7.6, 3.2))
    times = np.geomspace(1, 64, 100)
    for phi, colour in ((1.0, GREY), (0.65, GREEN), (0.46, BLUE), (0.2, ORANGE)):
        axes[0].plot(times, times**phi, color=colour, label=f"phi {phi:g}")
    axes[0].plot(4, 4**0.46, "o", color=BLUE)
    axes[0].set(
        xscale="log", yscale="log", xlabel="passes", ylabel="parameters worth / N", title="all parameters"
    )
    for axis in (axes[0].xaxis, axes[0].yaxis):
        axis.set_major_formatter(lambda v, _: f"{v:g}")
    law, budgets = get_law("recurrence"), np.geomspace(1e16, 1e22, 25)
    for phi, colour in ((0.65, GREEN), (0.46, BLUE), (0.2, ORANGE)):
        p = {k: np.array([v]) for k, v in (STUDIES["recurrence"][0] | {"phi": phi}).items()}
        given = {"params": 1e8, "recurrent_params": 8e7}
        best = [law.questions["iterations"].answer(law, p, given | {"flops": c}) for c in budgets]
        axes[1].plot(budgets, [float(b["iterations"][0]) for b in best], color=colour, label=f"phi {phi:g}")
    axes[1].set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="best passes")
    axes[1].set_title("100M parameters, planted constants")
    axes[1].yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    label_log_axis(axes[1].xaxis, scientific)
    for ax in axes:
        ax.legend()
    return figure


@styled
def private():
    """Loss against steps at three totals of noise, and against batch at constant noise or constant ratio."""
    figure, axes = panels(None, 2, (7.6, 3.2))
    law, p, examples = get_law("dp_sgd"), STUDIES["dp_sgd"][0], 1.28e6
    arrays, steps = {k: np.array([v]) for k, v in p.items()}, np.geomspace(100, 1e5, 200)
    for noise, colour in ((0.5, GREEN), (2.0, BLUE), (8.0, ORANGE)):
        Q = examples / noise * np.sqrt(2 / steps)
        axes[0].plot(
            steps, law.predict(p, {"S": steps, "Q": Q}), color=colour, label=f"total noise {noise:g}"
        )
        given = {"noise": noise, "examples": examples, "batch": 4096.0}
        best = law.questions["steps"].answer(law, arrays, given)
        axes[0].plot(best["steps"], best["loss"], "o", color=colour)
    axes[0].set(xscale="log", xlabel="steps", ylabel="loss", title="planted constants")
    batch = np.geomspace(128, 65536, 100)
    for sigma, colour, name in (
        (2.5, GREY, "sigma 2.5"),
        (2.5 * batch / 32768, BLUE, "B / sigma kept"),
    ):
        loss = law.predict(p, {"S": 4000.0, "Q": batch / sigma})
        axes[1].plot(batch, loss + 0 * batch, color=colour, label=name)
    axes[1].plot(
        32768, law.predict(p, {"S": 4000.0, "Q": 32768 / 2.5}), "o", color=ORANGE, label="private run"
    )
    axes[1].set(xscale="log", xlabel="batch", ylabel="loss after 4,000 steps")
    for ax in axes:
        label_log_axis(ax.xaxis, short)
        ax.legend()
    return figure


@styled
def ensemble():
    """Loss against parameters in all, by members, with the asymptote."""
    figure, [ax] = panels(None, 1, ONE)
    law, p = get_law("ensemble"), STUDIES["ensemble"][0]
    for members, colour in ((1, GREY), (2, GREEN), (8, BLUE)):
        N = np.geomspace(1e8, 3e10 / members, 60)
        name = f"{members} member" + "s" * (members > 1)
        ax.plot(N * members, law.predict(p, {"N": N, "M": members}), color=colour, label=name)
    total = np.geomspace(2e8, 3e10, 60)
    arrays = {k: np.array([v]) for k, v in p.items()}
    best = [float(law.questions["split"].answer(law, arrays, {"total_params": t})["loss"][0]) for t in total]
    ax.plot(total, best, color=ORANGE, ls="--", label="best split")
    ax.axhline(p["E"], color=GREY, lw=0.8, ls=":")
    ax.set(
        xscale="log", xlabel="parameters of all members", ylabel="loss", title="planted constants, fixed data"
    )
    label_log_axis(ax.xaxis, short)
    ax.legend()
    return figure


@styled
def downstream():
    """Planted errors against loss, fitted to the weaker models and forecast for the stronger ones."""
    figure, axes = panels(None, 2, (7.6, 3.2))
    for ax, name in zip(axes, ("downstream_exponential", "downstream_sigmoid"), strict=True):
        law, _, x, exact, noise = planted(name)
        y = exact * np.exp(noise * np.random.default_rng(0).standard_normal(len(exact)))
        weak = x["V"] > x["V"][12]
        _, point = solve(law, {"V": np.log(x["V"][weak])}, y[weak], loss="least_squares", starts=4)
        ax.plot(x["V"][weak], y[weak], "o", ms=3, color=BLUE, label="fitted")
        ax.plot(x["V"][~weak], y[~weak], "o", ms=3, color=ORANGE, label="held out")
        ax.plot(x["V"], law.predict(point.params, x), color=GREY, label="forecast")
        ax.set(xlabel="loss", ylabel="error on the benchmark", title=name)
        ax.legend()
    return figure


@styled
def broken():
    """The released simulation of 4-digit addition, and its two powers."""
    figure, [ax] = panels(None, 1, ONE)
    law, x = get_law("broken_D"), np.geomspace(1, 4095, 400)
    p = law.PUBLISHED
    ax.plot(x, law.predict(p, {"D": x}), color=BLUE, label="broken power")
    before = x < 1.2 * p["d"]
    ax.plot(x[before], p["E"] + p["K"] * x[before] ** -p["c0"], color=GREY, ls="--", label="the power before")
    ax.axvline(p["d"], color=ORANGE, lw=0.8, ls=":", label="break")
    ax.set(
        xscale="log", xlabel="training examples", ylabel="loss", title="4-digit addition, released constants"
    )
    label_log_axis(ax.xaxis, short)
    ax.legend(loc="lower left")
    return figure


@styled
def energy():
    """Joules an output token against the output length, at three input lengths."""
    figure, [ax] = panels(None, 1, ONE)
    law, p, out = get_law("energy"), STUDIES["energy"][0], np.geomspace(4, 32768, 200)
    arrays = {k: np.array([v]) for k, v in p.items()}
    for length, colour in ((64, GREEN), (4096, BLUE), (32768, ORANGE)):
        cost = law.predict(p, {"I": float(length), "O": out}) / out
        ax.plot(out, cost, color=colour, label=f"{length} tokens in")
        best = law.questions["sweet_spot"].answer(law, arrays, {"input_tokens": float(length)})
        ax.plot(best["output_tokens"], best["joules_per_token"], "o", color=colour)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="tokens out",
        ylabel="joules a token out",
        title="planted constants",
    )
    label_log_axis(ax.xaxis, short)
    ax.legend()
    return figure


PICTURES = {
    f.__name__: f
    for f in (
        data_constrained,
        serving,
        precision,
        moe,
        sparsity,
        growth,
        quality,
        tuning,
        coverage,
        test_time,
        rl,
        recurrence,
        private,
        ensemble,
        downstream,
        broken,
        energy,
    )
}


def main() -> None:
    for name in sys.argv[1:] or PICTURES:
        path = Path(__file__).with_name(f"{name}.png")
        path.write_bytes(png(PICTURES[name](), dpi=100))
        print(path)


if __name__ == "__main__":
    main()
