"""How well planted laws are recovered: 200 simulated studies of each law of ``fits.planted``.

Each study is the law on its grid with log-normal noise, row by row, fitted by least squares; the intervals
are those that a fit prints (``fits.few_clusters``, every row alone). A share of 200 near 95 % has a standard
error of 1.5 %, so that 90 to 98 % is what a right interval gives nearly always.

    python benchmarks/law_recovery.py [--studies 200] [--law NAME ...] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from fits.planted import STUDIES, recover

PREFACE = """# Recovery of planted laws

`python benchmarks/law_recovery.py`: 200 simulated studies a law (`fits.planted` has the parameters and
grids), log-normal noise of the given standard deviation row by row, least squares. Of each law's parameters:
the lowest and highest share of estimates within two of their standard errors of the truth, and of 95 %
intervals that hold it; the largest mean error, over the standard deviation of the estimates. A share near
95 % of 200 has a standard error of 1.5 %.
"""
HEAD = "| law | rows | noise | studies | failed | within 2 standard errors | 95 % intervals | largest bias |"
LINE = "|" + "---|" * (HEAD.count("|") - 1)


def row(got: dict) -> str:
    """One line of the table: the lowest and highest share over the law's parameters, with their names."""

    def ends(field):
        by = sorted(got["parameters"].items(), key=lambda kv: kv[1][field])
        (low, a), (high, b) = by[0], by[-1]
        return f"{100 * a[field]:.1f} % ({low}) to {100 * b[field]:.1f} % ({high})"

    name, worst = max(got["parameters"].items(), key=lambda kv: abs(kv[1]["bias"]))
    return (
        f"| `{got['law']}` | {got['rows']} | {got['noise']:g} | {got['studies']} | {got['failed']} "
        f"| {ends('within')} | {ends('covered')} | {worst['bias']:+.2f} ({name}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--law", action="append", help="only these; the rest of --json stays")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    args = parser.parse_args()
    began, out = time.perf_counter(), []
    print(HEAD, LINE, sep="\n")
    for name in args.law or STUDIES:
        out.append(recover(name, args.studies))
        print(row(out[-1]), flush=True)
    took = time.perf_counter() - began
    print(f"\n{took:.0f} s")
    if args.json:
        kept = json.loads(args.json.read_text()) if args.law and args.json.exists() else []
        out = [g for g in kept if g["law"] not in args.law] + out
        out.sort(key=lambda g: list(STUDIES).index(g["law"]))
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text("\n".join([PREFACE, HEAD, LINE, *map(row, out)]) + "\n")


if __name__ == "__main__":
    main()
