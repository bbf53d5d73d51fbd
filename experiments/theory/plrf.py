"""Power-law random features in a point of each of the seven phases, where the exponents are known.

In each point an isoFLOP study twice: of the mean of SGD at sizes of 1e6 to 1e11, by the deterministic
equivalent, where the exponents have come near their limits; and of SGD itself at sizes that a laptop trains,
where they have not. `scaling fit STUDY --by family` prints both beside the truth (docs/theory.md).
"""

import math

from ml_collections import ConfigDict

from scaling.theory.plrf import frontier

POINTS = [(0.7, 0.3), (0.4, 0.3), (0.2, 0.9), (1.0, 0.7), (0.8, 1.4), (0.42, 0.9), (0.27, 0.8)]
"""(alpha, beta) of phases Ia, Ib, Ic, II, III, IVa, IVb."""
BUDGETS = {"equivalent": [1e15, 1e16, 1e17, 1e18], "sgd": [3e3, 1e4, 3e4]}
"""f = d B steps."""


def get_config(points=POINTS, budgets=BUDGETS, draws=64):
    cells = []
    for dynamics, fs in budgets.items():
        for alpha, beta in points:
            for f in fs:
                # powers of sqrt 2, seven around the best size, as after a pilot study
                best = frontier(alpha, beta, [f])[0][0]
                nearest = round(2 * math.log2(best))
                fields = {"alpha": alpha, "beta": beta, "dynamics": dynamics}
                fields["draws"] = draws if dynamics == "sgd" else 1
                for k in range(nearest - 3, nearest + 4):
                    size = max(2, round(2 ** (k / 2)))
                    fixed = {f"trainer.{name}": value for name, value in fields.items()}
                    cells.append({"params": size, "flops": 6 * f, "set": fixed})
    return ConfigDict(
        dict(
            name="plrf",
            grid=dict(kind="list", cells=cells, min_steps=24),
            trainer=dict(name="plrf", rate=0.25),
            train=dict(batch=1),
        )
    )
