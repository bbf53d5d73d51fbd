"""The fit file: nothing is lost, nothing half-written, damage is said."""

import base64
import json
import os

import numpy as np
import pytest
from fits_tables import planted_table

import fits
from fits import fitfile


@pytest.fixture(scope="module")
def fit():
    table = planted_table(noise=3e-3) | {"kept": np.arange(42) != 3}
    return fits.fit_table(table, bootstraps=50, source="planted.csv")


def test_round_trip(fit, tmp_path):
    path = fits.write_fit(fit, tmp_path / "fits" / "chinchilla.json")
    back = fits.read_fit(path)
    assert back.to_dict() == fit.to_dict() and str(back) == str(fit)
    assert (back.draws == fit.draws).all() and back.draws.dtype == np.float64
    assert fits.allocate(back, 1e22).to_dict() == fits.allocate(fit, 1e22).to_dict()


def test_what_a_doubter_needs_is_in_it(fit, tmp_path):
    data = json.loads(fits.write_fit(fit, tmp_path / "f.json").read_text())
    assert data["law"]["formula"] == "L = E + A / N^alpha + B / D^beta"
    assert data["rows"][3] | {} == data["rows"][3] and data["rows"][3]["reason"] == "kept = False"
    assert len(data["rows"]) == 42 and data["data"]["source"] == "planted.csv"
    assert data["data"]["hash"].startswith("sha256:")
    assert {"loss", "delta", "reduction", "optimiser", "initialisation", "compute", "bounds"} <= set(
        data["method"]
    )
    assert {"python", "numpy", "jax", "scaling"} <= set(data["versions"])
    packed = data["draws"]
    draws = np.frombuffer(base64.b64decode(packed["data"]), "<f8").reshape(
        packed["count"], len(packed["names"])
    )
    np.testing.assert_array_equal(draws, fit.draws)


def test_not_finite_numbers_become_null(tmp_path):
    table = planted_table() | {"params": np.full(42, 1e9)}
    fit = fits.fit_table(table, bootstraps=0)
    assert not np.isfinite(fit.diagnostics["condition"])
    text = fits.write_fit(fit, tmp_path / "f.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert fits.read_fit(tmp_path / "f.json").diagnostics["condition"] is None


def test_a_failed_write_leaves_the_old_file(fit, tmp_path, monkeypatch):
    path = fits.write_fit(fit, tmp_path / "f.json")
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(fits.FitError, match="cannot be written: No space left on device"):
        fits.write_fit(fit, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_unwritable_folder(fit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(fits.FitError, match="cannot be written"):
        fits.write_fit(fit, tmp_path / "file" / "f.json")


def test_damage_is_said(fit, tmp_path):
    path = tmp_path / "f.json"
    good = fit.to_dict()

    def reads(data, message):
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        with pytest.raises(fits.FitError, match=message):
            fits.read_fit(path)

    text = json.dumps(good)
    reads(text[: len(text) // 2], "is not a fit file")
    reads({"kind": "allocation"}, "this is not a fit file")
    reads([], "this is not a fit file")
    reads({**good, "schema": 99}, "the fit file has schema 99; this version reads schema 1")
    reads({k: v for k, v in good.items() if k != "params"}, "the fit file is damaged: KeyError: 'params'")
    reads({**good, "law": {**good["law"], "name": "mine"}}, "has the law 'mine', which is not in the library")
    reads({**good, "law": {**good["law"], "parameters": ["E"]}}, r"has parameters \['E'\]")
    cut = {**good["draws"], "data": good["draws"]["data"][:-8]}
    reads({**good, "draws": cut}, "the fit file is damaged: ValueError")
    reads({**good, "params": {}}, "the fit file is damaged: KeyError: 'E'")
    reads({**good, "params": {**good["params"], "E": None}}, "the parameter E is None, not a number")
    reads({**good, "status": 3}, "the fit file has the status 3; it must be one of converged, boundary")
    reads({**good, "intervals": []}, "the fit file is damaged: intervals is a list, not an object")
    reads({**good, "diagnostics": {}}, "the fit file is damaged: diagnostics has no range")
    with pytest.raises(fits.FitError, match="cannot be read: No such file"):
        fits.read_fit(tmp_path / "gone.json")


def test_schema_is_the_one_documented(fit):
    """The top level of schema 1; a change here needs a new schema number."""
    assert fitfile.SCHEMA == 1
    assert set(fit.to_dict()) == {
        "schema", "kind", "law", "status", "reasons", "flags", "params", "fixed", "intervals", "covariance",
        "draws", "objective", "method", "diagnostics", "sensitivity", "rows", "data", "versions",
    }  # fmt: skip
