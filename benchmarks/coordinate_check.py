"""Coordinate check: sizes of activations, and of their change in four Adam steps, against width and depth.

Real training steps on random tokens (``scaling.coordinates``), head size 16, base 32 wide and 2 layers deep:
8 x the width at the base's depth, 8 x the depth at the base's width. Beside each picture's lines stand the
exponents: the power of the width or depth with which a size goes, by least squares.

    python benchmarks/coordinate_check.py [--redraw]        (about 2 CPU minutes)
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from scaling.coordinates import KINDS, sizes, slope

RESULTS = Path(__file__).parent / "results"
WIDTHS, DEPTHS, HEAD_DIM = (32, 64, 128, 256), (2, 4, 8, 16), 16
AXES = {"width": (WIDTHS, ("standard", "mup")), "depth": (DEPTHS, ("standard", "mup", "completep"))}
BASE = {"standard": {}, "mup": {"base_d_model": 32}, "completep": {"base_d_model": 32, "base_layers": 2}}
LR = 2**-7


def model(name: str, axis: str, size: int) -> dict:
    """The ``model`` section of one shape."""
    width, layers = (size, DEPTHS[0]) if axis == "width" else (WIDTHS[0], size)
    heads = width // HEAD_DIM
    shape = {"d_model": width, "layers": layers, "heads": heads, "kv_heads": heads, "head_dim": HEAD_DIM}
    return {**shape, "ffn_dim": width * 5 // 2, "vocab": 64, "parametrization": name, **BASE[name]}


def measure() -> dict:
    """``{axis: {parametrization: [sizes at each size]}}``; the base shape, the same for all, is run once."""
    base, found = sizes(model("standard", "width", WIDTHS[0]), lr=LR), {}
    for axis, (at, names) in AXES.items():
        for name in names:
            wider = [sizes(model(name, axis, size), lr=LR) for size in at[1:]]
            found.setdefault(axis, {})[name] = [base, *wider]
            print(axis, name, exponents(at, found[axis][name]), flush=True)
    return found


def exponents(at, row) -> dict:
    """``{kind: (at the start, of the change)}``."""
    return {
        k: tuple(round(slope(at, [s[k][what] for s in row]), 3) for what in ("start", "change"))
        for k in KINDS
    }


def table(found: dict) -> str:
    """A Markdown table of all exponents."""
    lines = ["| axis | parametrization | what | " + " | ".join(KINDS) + " |", "|---" * (3 + len(KINDS)) + "|"]
    for axis, (at, names) in AXES.items():
        for name in names:
            powers = exponents(at, found[axis][name])
            for i, what in enumerate(("at the start", "change")):
                cells = " | ".join(f"{powers[k][i]:+.2f}" for k in KINDS)
                lines.append(f"| {axis} | {name} | {what} | {cells} |")
    return "\n".join(lines)


def draw(found: dict, axis: str, path: Path) -> None:
    """Sizes at the start (dashed) and of the change (solid) against one axis, a panel a parametrization."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    at, names = AXES[axis]
    fig, panels = plt.subplots(
        1, len(names), figsize=(4.2 * len(names), 3.8), sharey=True, layout="constrained", squeeze=False
    )
    for panel, name in zip(panels[0], names, strict=True):
        powers = exponents(at, found[axis][name])
        for i, kind in enumerate(KINDS):
            row = found[axis][name]
            label = f"{kind}: {powers[kind][1]:+.2f}"
            panel.loglog(at, [s[kind]["change"] for s in row], f"C{i}o-", label=label, ms=4)
            panel.loglog(at, [s[kind]["start"] for s in row], f"C{i}--", lw=0.8, alpha=0.7)
        panel.set(title=name, xlabel={"width": "d_model", "depth": "layers"}[axis], xticks=at, xticklabels=at)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, title=f"change, power of {axis}", title_fontsize=7)
    panels[0, 0].set_ylabel("root mean square of entries\n(dashed: at the start; solid: change)")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report(found: dict) -> str:
    """The result as Markdown."""
    return f"""# Coordinate check

`python benchmarks/coordinate_check.py`, {found["device"]}, float32. Exponents: the power of
the width (32 to 256, 2 layers) or of the depth (2 to 16, 32 wide) with which the root mean square of an
activation goes, before the first step and of its change in four AdamW steps (constant learning rate 2^-7 at
the base shape, 32 wide and 2 layers deep). Branches: sum over layers of what they add to the stream; stream:
after the last layer.

{table(found)}

![width](coordinate_check_width.png)

![depth](coordinate_check_depth.png)

Zero is what a parametrization aims at for the change. Under muP and CompleteP the logits at the start fall
with width^-1/2 by design (Yang et al. 2022: the output vanishes at the start and is learned). Under CompleteP
the branches at the start are independent of each other and their sum falls with depth^-1/2, while what is
learned, which is coherent from layer to layer, keeps its size. Two exponents of the change are not zero: the
logits' under muP and the feed-forward's under CompleteP. Parts from the random start that die out with width
and with depth would look so; that was not tested apart.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of coordinate_check{.json,.md,_*.png}"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="table and pictures from what was measured before"
    )
    args = parser.parse_args()
    raw = args.out / "coordinate_check.json"
    if args.redraw:
        found = json.loads(raw.read_text())
    else:
        found = measure()
        found["device"] = f"jax {jax.__version__} on {jax.devices()[0].device_kind}"
        raw.write_text(json.dumps(found, indent=1) + "\n")
    text = report(found)
    print(text)
    (args.out / "coordinate_check.md").write_text(text)
    for axis in AXES:
        draw(found, axis, args.out / f"coordinate_check_{axis}.png")


if __name__ == "__main__":
    main()
