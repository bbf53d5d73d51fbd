"""The report of a law in other variables than N and D says what it leaves out, and draws no frontier."""

import numpy as np

import fits
from fits.report import write_report


def assert_no_frontier(page):
    for words in ("This law gives no optimal N and D for a budget", "does not trade N against D"):
        assert words in page
    assert 'id="figure-frontier"' not in page and 'id="figure-surface"' not in page
    assert 'id="figure-residuals"' in page


def test_law_in_compute_alone(tmp_path):
    C = np.geomspace(1e18, 1e21, 14)
    fit = fits.fit_table({"flops": C, "loss": 1.8 + 60 * C**-0.1}, "power_C", bootstraps=0, sensitivity=False)
    assert fit.status == "converged"
    page = write_report(None, fit, out=tmp_path / "report.html").read_text(encoding="utf-8")
    assert_no_frontier(page)


def test_law_in_unique_tokens_with_an_allocation(tmp_path):
    # the constants of Muennighoff et al. 2023, held, but for E: one free parameter is fast and identified
    held = {
        "A": np.exp(6.255414), "B": np.exp(7.3049974), "alpha": 0.3526596,
        "R_D": 15.387756, "R_N": 5.309743,
    }  # fmt: skip
    law = fits.get_law("data_constrained_tied")
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 4), np.geomspace(1e9, 1e11, 4)))
    x = {"N": N, "D": D, "U": D / 4}
    loss = law.predict({**held, "E": 1.87}, x)
    table = {"params": N, "tokens": D, "unique_tokens": D / 4, "loss": loss}
    fit = fits.fit_table(table, law, fixed=held, bootstraps=0, sensitivity=False)
    assert fit.status == "converged" and abs(fit.params["E"] - 1.87) < 1e-8
    answer = fits.allocate(fit, 1e22, unique_tokens=25e9)
    page = write_report(None, fit, allocation=answer, out=tmp_path / "report.html").read_text(
        encoding="utf-8"
    )
    assert "tokens per parameter" in page and 'id="figure-surface"' not in page
    assert 'id="explorer-unique"' in page and 'value="2.5e10"' in page
    assert "a law in N, D, U, and runs are chosen by N and D alone" in page
    assert "The law of this report, data_constrained_tied (fixed A = 520.825" in page
    assert 'id="figure-residuals"' in page
