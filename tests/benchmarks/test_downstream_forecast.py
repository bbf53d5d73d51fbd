"""The script that forecasts benchmarks, on planted models of which everything is known."""

import json

import numpy as np
import pandas as pd
import pytest

from tests.benchmark_script import load_script

script = load_script("downstream_forecast")
TOP, K, GAMMA = 0.78, 3.2, 0.9


def planted(folder):
    """24 models on Chinchilla's law, and their scores: the 17 by one law, and a task that knows no loss."""
    folder.mkdir()
    rows = []
    for n in np.geomspace(1e7, 3e9, 6):
        for multiplier in (0.5, 1.0, 4.0, 16.0):
            d = 20 * n * multiplier
            loss = 1.7 + 400 / n**0.34 + 410 / d**0.28
            name = f"corpus-{n:.3g}-{multiplier}"
            rows.append({"dataset": "corpus", "name": name, "params": n, "tokens": d, "loss_eval1": loss,
                         "chinchilla_multiplier": multiplier})  # fmt: skip
            scores = dict.fromkeys(script.SUBSET, 1 - (TOP - K * np.exp(-GAMMA * loss)))
            scores["guessed"] = 0.5
            text = json.dumps({"eval_metrics": {"icl": scores}})
            (folder / f"evaluation_{name}_heavy.json").write_text(text)
    pd.DataFrame(rows).to_csv(folder / "runs.csv")
    return folder / "runs.csv", folder


def test_planted_laws_are_forecast_exactly(tmp_path):
    runs = script.read(*planted(tmp_path / "evals"))
    assert len(runs) == 18  # D below 20 N is left out
    got = script.points(script.forecasts(runs[["dataset", "name", "params", "tokens", "loss", "flops",
                                               script.AVERAGE, "guessed"]], script.LAWS[0]))  # fmt: skip
    average = got[got.task == script.AVERAGE]
    assert average.used.all() and len(average) == 3
    # both laws hold without noise, so that only the solvers' tolerance is left
    assert average.chained.max() < 1e-3 and average.no_change.min() > 1
    cheap = runs[runs.flops <= runs.flops.max() / script.DECADE]
    assert average.runs.max() == len(cheap)
    # a task that knows no loss determines no law: the best model stands for the forecast
    assert got[got.task == "guessed"].chained.max() == pytest.approx(0, abs=1e-9)


def test_what_no_error_can_be_is_no_forecast():
    got = pd.DataFrame([
        {"task": "t", "status": "converged", "observed": 0.5, "forecast": -2.0, "at_true_loss": 0.4,
         "unchanged": 0.6},
        {"task": "t", "status": "unconverged", "observed": 0.5, "forecast": 0.5, "at_true_loss": 0.5,
         "unchanged": 0.7},
        {"task": "t", "status": "converged", "observed": 0.5, "forecast": 0.45, "at_true_loss": 0.51,
         "unchanged": 0.7},
    ])  # fmt: skip
    out = script.points(got)
    assert out.used.tolist() == [False, False, True]
    assert out.chained.tolist() == pytest.approx([10, 20, 5])
    assert out.true_loss.tolist() == pytest.approx([10, 20, 1])
