"""What fit_speed.py measured, as Markdown."""

from __future__ import annotations


def times(peer: float, own: float) -> str:
    return f"{peer / own:,.0f}" if peer / own >= 10 else f"{peer / own:.1f}"


def is_lowest(measured: dict) -> bool:
    """Whether no peer's objective lies below ours by more than rounding."""
    peers = [measured[k]["objective"] for k in ("lbfgsb", "chinchilla", "exponent_grid") if k in measured]
    return all(measured["ours"]["objective"] <= value * (1 + 1e-12) for value in peers)


def table(head: str, rows: list[str]) -> list[str]:
    return ["", head, "|" + "---|" * (head.count("|") - 1), *rows]


def opening(result: dict) -> list[str]:
    machine = result["machine"]
    part = "Every peer ran all of its starts."
    if not result["full"]:
        part = "Where a peer ran fewer starts than it documents, its full cost is scaled up from those."
    return [
        "# Our fits against the peers'",
        "",
        f"`python benchmarks/fit_speed.py{' --full' if result['full'] else ''}`, {machine['cpus']} CPUs "
        f"({machine['processor']}), one thread a side; {machine['versions']}. "
        f"Load {machine['load_before']:.1f} before, {machine['load_after']:.1f} after. Seconds are CPU "
        f"seconds of the process and its children, all sides in one script taking turns. {part}",
        "",
        "Objective: the sum over runs of Huber(log predicted - log observed), delta 1e-3, recomputed for "
        "every answer by one function of the script.",
    ]


def point_rows(measured: dict) -> list[str]:
    """A line a method, for one table of runs."""
    own, grid = measured["ours"], measured["exponent_grid"]
    head = f"| {measured['table']}, {measured['rows']} runs"
    rows = [
        f"{head} | ours, 12 starts, NumPy ({own['status']}) | 12 | {own['objective']:.10g} "
        f"| {own['cpu_s']:.4f} | 1 |",
        f"{head} | ours, 12 starts, compiled and warm | 12 | parameters {own['compiled_apart']:.0e} apart "
        f"| {own['compiled_cpu_s']:.4f} | {times(own['compiled_cpu_s'], own['cpu_s'])} |",
    ]
    peers = [("SciPy L-BFGS-B, 4,500 published starts", "lbfgsb", "cpu_s_4500")]
    if "chinchilla" in measured:
        peers.append(("chinchilla, its 3,125 documented starts", "chinchilla", "cpu_s_3125"))
    for method, name, key in peers:
        peer = measured[name]
        rows.append(
            f"{head} | {method} | {peer['starts_run']:,} | {peer['objective']:.10g} | {peer[key]:.1f} "
            f"| {times(peer[key], own['cpu_s'])} |"
        )
    rows.append(
        f"{head} | 32 x 32 exponents, Nelder-Mead | 1,024 | {grid['objective']:.10g} "
        f"(not what it minimises) | {grid['cpu_s']:.2f} | {times(grid['cpu_s'], own['cpu_s'])} |"
    )
    return rows


def squares_row(measured: dict) -> str:
    ends = (measured[side]["least_squares_objective"] for side in ("exponent_grid", "ours"))
    return f"| {measured['table']} | " + " | ".join(f"{value:.10g}" for value in ends) + " |"


def starts_row(measured: dict) -> str:
    p = measured["lbfgsb"]
    of = "none" if p["elsewhere_of_successes"] is None else f"{p['elsewhere_of_successes']:.1%}"
    return f"| {measured['table']} | {p['success']:.1%} | {p['elsewhere']:.1%} | {of} |"


def random_row(measured: dict) -> str:
    s = measured["ours"]["random_starts"]
    return (
        f"| {measured['table']} | {s['lowest_over_reported']:.1e} | {s['at_optimum']:.1%} "
        f"| {s['elsewhere']:.1%} | {s['unconverged']:.1%} |"
    )


def bootstrap_row(measured: dict) -> str:
    own, p = measured["ours"], measured["bfgs_bootstrap"]
    return (
        f"| {measured['table']} | {own['bootstraps_cpu_s']:.2f} | {own['bootstraps_converged']:.1%} "
        f"| {p['cpu_s_4000']:.0f} | {times(p['cpu_s_4000'], own['bootstraps_cpu_s'])} "
        f"| {p['above_ours']:.0%} | {p['below_ours']:.0%} | {p['refits_run']} |"
    )


def target_rows(result: dict) -> list[str]:
    first, shell = result["tables"][0], result["shell"]
    own, count = first["ours"], f"{result['bootstraps']:,} bootstraps"
    rows = [
        f"| warm point fit, {first['rows']} runs | 10 ms "
        f"| compiled {1e3 * own['compiled_wall_s']:.1f} ms wall, {1e3 * own['compiled_cpu_s']:.1f} ms CPU; "
        f"NumPy, with nothing to compile, {1e3 * own['wall_s']:.1f} and {1e3 * own['cpu_s']:.1f} ms |",
        f"| {count} | 3 CPU s | {own['bootstraps_cpu_s']:.2f} CPU s |",
    ]
    if shell:
        rows.append(
            f"| `scaling fit`, {count}, cold from the shell | 10 s wall "
            f"| {shell['wall_s']:.1f} s wall, {shell['cpu_s']:.1f} CPU s |"
        )
    return rows


def to_markdown(result: dict) -> str:
    tables = result["tables"]
    lines = [*opening(result), "", "## Point fit"]
    lines += table(
        "| table | method | starts run | objective | CPU s | over ours |",
        [row for t in tables for row in point_rows(t)],
    )
    lines += [
        "",
        f"Ours is the lowest objective on every table: {'yes' if all(map(is_lowest, tables)) else 'NO'}.",
    ]
    lines += ["", "On its own objective, half the sum of squares of raw loss, the exponent grid ends at:"]
    lines += table("| table | exponent grid | ours |", [squares_row(t) for t in tables])
    lines += ["", "## What the published starts come to", ""]
    lines += ["Elsewhere: an objective more than 0.1 % above the lowest."]
    lines += table(
        "| table | L-BFGS-B says success | ends elsewhere | of its successes, elsewhere |",
        [starts_row(t) for t in tables],
    )
    lines += [
        "",
        "Our Newton without our choice of starts, from 256 random ones in a wide box (`random_start_study`):",
    ]
    lines += table(
        "| table | lowest over reported, less 1 | at the optimum | converged elsewhere | unconverged |",
        [random_row(t) for t in tables],
    )
    lines += ["", f"## {result['bootstraps']:,} bootstraps", ""]
    lines += [
        "BFGS: one start, the point fit, with gradient; both sides refit the same resamples. Above: its "
        "objective is more than a millionth above ours; below: more than a billionth below."
    ]
    lines += table(
        "| table | ours, CPU s | converged | BFGS, CPU s | over ours | ends above | below | refits run |",
        [bootstrap_row(t) for t in tables],
    )
    lines += ["", "## Targets", *table("| what | target | measured |", target_rows(result))]
    return "\n".join(lines) + "\n"
