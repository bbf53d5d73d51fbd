"""Reading tables: every row gets an outcome, units mistakes are said, nothing raises a raw traceback."""

import math

import numpy as np
import pandas as pd
import pytest
from fits_tables import planted_table

import fits
from fits.table import clean, find_budgets, group_close


def frame(**changes):
    table = pd.DataFrame(planted_table(noise=3e-3))
    for column, values in changes.items():
        table[column] = values
    return table


def outcome(table, row):
    return table.rows[row]["outcome"], table.rows[row]["reason"]


def test_every_row_has_an_outcome():
    table = frame()
    table["status"] = "finished"
    table["kept"] = 1
    table["final"] = True
    table = table.astype({"loss": object, "final": object})
    table.loc[0, "loss"] = float("nan")
    table.loc[1, "tokens"] = 0.0
    table.loc[2, "params"] = -5.0
    table.loc[3, "loss"] = "n/a"
    table.loc[4, "status"] = "diverged"
    table.loc[5, "kept"] = 0
    table.loc[6, "loss"] = float("inf")
    table.loc[7, "final"] = False
    table.loc[len(table)] = table.loc[10]
    got = clean(table, exclude=["tokens < 7 * params"])
    assert len(got.rows) == 43
    assert outcome(got, 0) == ("excluded", "loss is nan, not a finite number")
    assert outcome(got, 1) == ("excluded", "tokens is 0.0, not positive")
    assert outcome(got, 2) == ("excluded", "params is -5.0, not positive")
    assert outcome(got, 3) == ("excluded", "loss is n/a, not a finite number")
    assert outcome(got, 4) == ("excluded", "status is diverged, not finished")
    assert outcome(got, 5) == ("excluded", "kept = 0")
    assert outcome(got, 6) == ("excluded", "loss is inf, not a finite number")
    assert outcome(got, 7) == ("excluded", "not the final evaluation")
    assert outcome(got, 42)[0] == "excluded" and "exact duplicate of row 10" in outcome(got, 42)[1]
    ratio = pd.to_numeric(table.tokens) / pd.to_numeric(table.params)
    ruled = [i for i in range(8, 42) if ratio[i] < 7]
    assert ruled and all(outcome(got, i) == ("excluded", "rule: tokens < 7 * params") for i in ruled)
    used = [i for i in range(8, 42) if i not in ruled]
    assert got.index.tolist() == used
    np.testing.assert_array_equal(got.loss, table.loss[used].astype(float))


def test_excluded_rows_do_not_touch_the_fit():
    table = frame()
    clean_fit = fits.fit_table(table, bootstraps=0, sensitivity=False)
    dirty = pd.concat([table, table.iloc[:3], table.iloc[3:6].assign(loss=np.nan)], ignore_index=True)
    dirty_fit = fits.fit_table(dirty, bootstraps=0, sensitivity=False)
    assert dirty_fit.params == clean_fit.params
    assert dirty_fit.diagnostics["rows_excluded"] == 6
    assert "excluded: 3 because loss is nan, not a finite number" in str(dirty_fit)


def test_other_names_and_units():
    table = frame()
    foreign = pd.DataFrame({"N": table.params / 1e6, "D_B": table.tokens / 1e9, "final_loss": table.loss})
    columns = {"params": "N", "tokens": "D_B", "loss": "final_loss"}
    ours = fits.fit_table(table[["params", "tokens", "loss"]], bootstraps=0, sensitivity=False)
    theirs = fits.fit_table(
        foreign, bootstraps=0, sensitivity=False, columns=columns, token_unit=1e9, param_unit=1e6
    )
    for key, value in ours.params.items():
        # the rescaled columns differ in the last place; parameters follow with the condition number
        assert math.isclose(theirs.params[key], value, rel_tol=1e-8)
    assert theirs.data["columns"] == columns and theirs.data["units"] == {"params": 1e6, "tokens": 1e9}
    with pytest.raises(fits.FitError, match=r"tokens has a median of .* state the unit \(token_unit=1e9"):
        fits.fit_table(foreign, columns=columns, param_unit=1e6)
    with pytest.raises(fits.FitError, match=r"params look to be in millions or billions"):
        fits.fit_table(foreign, columns=columns, token_unit=1e9)


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (frame().drop(columns="loss"), {}, "the table has no column 'loss'; it has params, tokens, flops"),
        (
            frame(),
            {"columns": {"loss": "final_los"}},
            "columns maps loss to 'final_los', which the table lacks",
        ),
        (
            frame(),
            {"columns": {"final": "loss"}},
            "nothing reads 'final'; the name on the left is one of",
        ),
        (frame(loss=np.nan), {}, "none of the table's 42 rows can be used; 42 because loss is nan"),
        (frame(flops=1.0), {}, "flops has a median of 1,"),
        (frame(), {"token_unit": -1.0}, "the unit of tokens is -1.0; it must be a positive number"),
        (frame(), {"exclude": ["nonsense > 3"]}, "exclude has the rule 'nonsense > 3', which cannot be read"),
        (frame(), {"exclude": ["tokens + 1"]}, "it must be true or false for each row"),
        (frame().iloc[:0], {}, "the table has no rows"),
        ({"params": [1e8, 2e8], "tokens": [1e9], "loss": [3.0, 2.9]}, {}, "columns have different lengths"),
        ([1, 2, 3], {}, "the table is a list; it must be a DataFrame or a mapping"),
        (frame().iloc[:3], {}, "the table has 3 usable rows; chinchilla has 5 free parameters"),
        (frame(), {"cluster": "trunk"}, "cluster is 'trunk'; it must be auto, size, budget, compute"),
        (frame(), {"scheme": "jackknife"}, "scheme is 'jackknife'; it must be one of pairs, bayesian"),
        (frame(), {"seed": -1}, "seed is -1; it must be zero or a positive integer"),
        (frame(), {"bootstraps": -1}, "bootstraps is -1; it must be zero or a positive integer"),
    ],
)
def test_bad_tables_end_in_a_sentence(table, options, message):
    with pytest.raises(fits.FitError) as error:
        fits.fit_table(table, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_flops_default_to_six_params_tokens():
    table = planted_table()
    without = clean({k: table[k] for k in ("params", "tokens", "loss")})
    np.testing.assert_allclose(without.flops, 6 * table["params"] * table["tokens"], rtol=1e-15)
    assert without.flops_from == "6 params tokens"
    holes = np.where(np.arange(42) < 3, np.nan, table["flops"])
    filled = clean({**table, "flops": holes})
    np.testing.assert_allclose(filled.flops, table["flops"], rtol=1e-12)
    assert filled.flops_from == "column flops (3 blank rows: 6 params tokens)"


def test_hash_follows_the_data():
    table = planted_table()
    one = clean(table).hash
    assert one == clean(pd.DataFrame(table)).hash
    nudged = table["loss"].copy()
    nudged[17] = np.nextafter(nudged[17], 9)
    assert clean({**table, "loss": nudged}).hash != one
    assert clean({**table, "kept": np.arange(42) != 5}).hash != one


def test_groups_of_nearly_equal_values():
    assert group_close(np.array([1e9, 3e8, 1.004e9, 3e8, 2e9])).tolist() == [1, 0, 1, 0, 2]


def test_epoch_has_42_sizes(epoch):
    kept = epoch[epoch.kept == 1]
    assert len(np.unique(group_close(kept.params))) == 42


def test_budgets_from_the_plan_or_from_flops():
    table = planted_table()
    rng = np.random.default_rng(0)
    jittered = table["flops"] * rng.uniform(0.97, 1.03, 42)
    groups, budgets = find_budgets(clean({**table, "flops": jittered}))
    np.testing.assert_array_equal(groups, np.repeat(np.arange(6), 7))
    np.testing.assert_allclose(budgets, np.geomspace(1e19, 3e21, 6), rtol=0.03)
    planned, exact = find_budgets(clean({**table, "flops": jittered, "budget": table["flops"]}))
    np.testing.assert_array_equal(planned, groups)
    np.testing.assert_allclose(exact, np.geomspace(1e19, 3e21, 6), rtol=1e-12)


def test_read_table(tmp_path):
    table = frame()
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    table.to_json(tmp_path / "t.jsonl", lines=True, orient="records", double_precision=15)
    for name in ("t.csv", "t.parquet", "t.jsonl"):
        # JSON lines are written with 15 decimals
        np.testing.assert_allclose(fits.read_table(tmp_path / name).loss, table.loss, rtol=1e-14)
    for name, text, message in (
        ("gone.csv", None, "is not a file"),
        ("t.xls", "x", "ends in '.xls'"),
        ("bad.parquet", "not parquet", "cannot be read as a table"),
        ("empty.csv", "", "cannot be read as a table"),
        ("head.csv", "params,tokens,loss\n", "has no rows"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(fits.FitError, match=message):
            fits.read_table(tmp_path / name)
