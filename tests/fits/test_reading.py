"""Tables as papers spell them: text for numbers, other names for columns; what was read is said."""

import numpy as np
import pandas as pd
import pytest
from fits_tables import planted_table

import fits
from fits.reading import counts, likely_columns, say_mapping
from fits.table import clean


def frame(**changes):
    return pd.DataFrame(planted_table(noise=3e-3)).assign(**changes)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1.3B", 1.3e9), ("125m", 125e6), (" 44,000,000 ", 44e6), ("2.5 billion", 2.5e9), ("1T", 1e12),
        ("6.3 B tokens", 6.3e9), ("7B params", 7e9), (".5k", 500.0), ("1,234.5", 1234.5), ("300e9", 3e11),
    ],
)  # fmt: skip
def test_counts_spelled_out(text, value):
    got, spelled = counts(np.array([text, 5.0], object), 1.0)
    assert got[0] == value and got[1] == 5.0
    assert spelled == ([] if text == "300e9" else [0])


@pytest.mark.parametrize(
    "text", ["", "n/a", "1,5", "0,125", "12,34,567", "1.3X", "B", "-", "1.3 B B", "1e400", "3±0.1", "1.2.3"]
)
def test_what_may_mean_two_things_is_no_number(text):
    assert not np.isfinite(counts(np.array([text, 5.0], object), 1.0)[0][0])


def test_a_suffix_is_its_own_unit():
    got, _ = counts(np.array(["1.3B", "1,300", 2.0], object), 1e6)
    np.testing.assert_array_equal(got, [1.3e9, 1300e6, 2e6])


def test_text_fits_as_numbers_do_and_is_flagged():
    plain = frame()
    plain["params"], plain["tokens"] = (plain[c].round(-6) for c in ("params", "tokens"))
    text = plain.assign(
        params=[f"{n / 1e9:.12g}B" if i % 2 else n for i, n in enumerate(plain.params)],
        tokens=[f"{d:,.0f}" for d in plain.tokens],
    )
    fit, same = (fits.fit_table(t, bootstraps=0, sensitivity=False) for t in (text, plain))
    assert fit.params == pytest.approx(same.params, rel=1e-6)
    said = [f["text"] for f in fit.flags if f["code"] == "text_numbers"]
    assert said[0].startswith("params: 21 values are text and were read as numbers, such as '")
    assert said[1].startswith("tokens: 42 values are text") and "(row 0) as" in said[1]
    assert "text_numbers" not in [f["code"] for f in same.flags]


def test_a_comma_in_a_loss_is_not_guessed_at():
    table = frame()
    table["loss"] = [f"{v:.3f}".replace(".", ",") for v in table.loss]
    with pytest.raises(fits.FitError, match="none of the table's 42 rows can be used; .*because loss is"):
        fits.fit_table(table)


def test_the_message_on_missing_columns_can_be_pasted():
    table = frame()
    foreign = pd.DataFrame({"Name": "x", "params_M": table.params, "tokens (B)": table.tokens,
                            "Final Loss": table.loss, "lr": 1e-3})  # fmt: skip
    with pytest.raises(fits.FitError) as error:
        fits.fit_table(foreign)
    text = str(error.value)
    assert "no column 'params', 'tokens' or 'loss'; it has Name, params_M, tokens (B), Final Loss, lr" in text
    assert "columns={'params': 'params_M', 'tokens': 'tokens (B)', 'loss': 'Final Loss'}" in text
    assert 'param_unit=1e6, token_unit=1e9 (--map "params=params_M,tokens=tokens (B),loss=Final Loss"' in text
    assert text.endswith("--param-unit 1e6 --token-unit 1e9)")


def test_names_that_are_known_elsewhere():
    assert likely_columns(["params", "tokens", "loss"], ["N", "D", "val/loss"]) == {
        "params": "N", "tokens": "D", "loss": "val/loss"
    }  # fmt: skip
    assert likely_columns(["tokens"], ["batch_tokens", "steps"]) == {}
    assert likely_columns(["params"], ["lr", "color"]) == {}
    assert say_mapping({"loss": "ce"}) == "columns={'loss': 'ce'} (--map \"loss=ce\")"


@pytest.mark.parametrize(
    "columns, words",
    [
        (["params", "flops", "loss"], r"flops / \(6 params\) would be the tokens of a run"),
        (
            ["params", "steps", "batch_tokens", "loss"],
            "steps times batch_tokens would be",
        ),
    ],
)
def test_tokens_that_could_be_computed(columns, words):
    with pytest.raises(fits.FitError, match="no column 'tokens'.*" + words):
        fits.fit_table(frame(steps=10.0, batch_tokens=1e6)[columns])


def test_blanks_around_a_column_name():
    got = clean(frame().rename(columns={"params": " params", "loss": "loss "}))
    assert len(got) == 42
    assert len(clean(frame().rename(columns={"loss": " L"}), columns={"loss": " L"})) == 42
    with pytest.raises(fits.FitError, match="two columns named 'loss'"):
        clean(frame().assign(**{"loss ": 1.0}))


def test_a_size_beyond_all_bounds_is_read_without_a_warning():
    table = frame()
    table.loc[0, "params"] = 1e300
    with np.errstate(all="raise"):
        assert len(clean(table)) == 42
        got = clean(table.drop(columns="flops"), param_unit=1e9, token_unit=1e9)
    assert got.rows[0]["reason"] == "params is 1e+300, not a finite number"


def test_print_names_the_rows_left_out_and_ends_after_a_dozen_reasons():
    table = frame().astype({"loss": object})
    table.loc[[1, 7], "loss"] = -1.0
    table.loc[20:, "loss"] = [f"{i}?" for i in range(22)]
    fit = fits.fit_table(table, "tied", bootstraps=0, sensitivity=False)
    lines = [x for x in str(fit).splitlines() if x.startswith("excluded")]
    assert lines[0] == "excluded: 2 because loss is -1.0, not positive (rows 1, 7)"
    assert lines[1] == "excluded: 1 because loss is 0?, not a finite number (row 20)"
    assert lines[-1] == "excluded: 11 more for 11 other reasons; see the fit's rows" and len(lines) == 13


@pytest.mark.parametrize(
    "head, words",
    [
        ("params,tokens,loss,loss", "cannot be read as a table: two columns are named 'loss'"),
        ("params;tokens;loss;seed", "its columns seem to be separated by ';', not ','"),
        ("params\ttokens\tloss\tseed", r"its columns seem to be separated by '\\t', not ','"),
    ],
)
def test_a_file_whose_columns_are_unclear_is_refused(tmp_path, head, words):
    between = next(c for c in ",;\t" if c in head)
    lines = [head, *(between.join(["1e9", "2e10", "2.5", "1"]) for _ in range(3))]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    with pytest.raises(fits.FitError, match=words):
        fits.read_table(tmp_path / "runs.csv")


def test_pinned_parameters_are_not_counted_against_the_rows():
    table = frame().iloc[[0, 3, 9, 14, 20, 26, 33, 38]]
    fit = fits.fit_table(table, fixed={"E": 1.8, "alpha": 0.35}, bootstraps=0, sensitivity=False)
    assert "few_rows" not in [f["code"] for f in fit.flags] and fit.diagnostics["degrees_of_freedom"] == 5
    fit = fits.fit_table(table, fixed={"E": 1.8}, bootstraps=0, sensitivity=False)
    assert "8 rows for 4 free parameters: 4 degrees of freedom" in str(fit)


def test_finished_in_other_words():
    words = ["Completed", "done", "finished", "SUCCESS"]
    got = clean(frame(status=[words[i % 4] if i else "crashed" for i in range(42)]))
    assert len(got) == 41 and got.rows[0]["reason"] == "status is crashed, not finished"
