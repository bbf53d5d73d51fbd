"""The sections of the kernels' benchmark: small parts of each, so that the whole does not fail at its end."""

import importlib.util
import pathlib
import sys

import jax
import pytest

HERE = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A module of the benchmarks by name, imported as a script beside it would."""
    monkeypatch.syspath_prepend(str(HERE))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("turns", None)


def test_programs_run_by_turns_after_one_that_does_not_count(load):
    turns, calls = load("turns"), []
    programs = {name: lambda x, name=name: calls.append(name) or x for name in ("a", "b")}
    seconds = turns.by_turns(programs, jax.numpy.zeros(3), turns=2, launches=2)
    assert calls == ["a", "a", "b", "b", "b", "b", "a", "a", "a", "a", "b", "b"]
    assert [len(s) for s in seconds.values()] == [2, 2]
    assert turns.ratio([3.0, 8.0, 1.0], [1.0, 2.0, 1.0]) == 3.0
    assert turns.median_ms([0.001, 0.003, 0.002]) == 2.0


def test_every_section_measures(load):
    sections = load("kernels").sections()
    assert {"attention", "delta", "gpu", "scans", "ssd", "tpu", "xent"} <= set(sections)
    assert all(callable(section.measure) for section in sections.values())


@pytest.mark.parametrize("on_cpu", [True, False])
def test_attention_is_measured_over_the_whole_matrix(load, on_cpu):
    section = load("kernel_attention")
    cases = section.matrix(on_cpu, quick=False)
    assert len(set(cases)) == len(cases)
    assert {pattern for pattern, _, _ in cases} == set(section.PATTERNS)
    assert {T for pattern, T, H in cases if H == 64} == {2**n for n in range(10, 16)}
    assert {H for _, _, H in cases} == {64, 128, 256}
    assert on_cpu or len(cases) == len(section.PATTERNS) * 6 * 3


@pytest.mark.slow
def test_quick_rows_of_scans_and_attention(load):
    for name, title in (("kernel_scans", "linear_scan"), ("kernel_attention", "attention")):
        (found, rows), *rest = load(name).measure(quick=True).items()
        assert found == title and not rest
        assert all(row.keys() == rows[0].keys() and row["ms"] > 0 for row in rows)
        assert {row["pass"] for row in rows} == {"forward", "gradient"}


def test_no_table_without_libtpu(load, monkeypatch, capsys):
    section = load("kernel_tpu")
    monkeypatch.setattr(section.importlib.util, "find_spec", lambda name: None)
    assert section.measure(quick=True) == {}
    assert "libtpu" in capsys.readouterr().out


def test_data_beside_the_kernels_says_sizes_that_rank_and_fit(load):
    section = load("kernel_tpu")
    for blocks in (section.attention_blocks, section.linear_scan_blocks, section.gated_delta_rule_blocks,
                   section.linear_cross_entropy_blocks):  # fmt: skip
        for generation in section.dispatch.GENERATIONS:
            text, cycles = section.from_table(blocks, generation, True)
            assert " x " in text and "None" not in cycles and cycles.endswith(f"per {blocks.UNIT}")


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_row_compiled_for_tpu(load):
    section = load("kernel_tpu")

    def row(function, T):
        x = section.array(section.f32, 1, T, 2048)
        return section._compiled(function, (x, x), 2, True, "v5e")

    found = row(section.pk.linear_scan, 256)
    assert (found["compiles"], found["custom calls"]) == ("yes", 2)
    assert 1 < found["moved / floor"] < 1.1
    refused = row(lambda a, b: section.pk.linear_scan(a, b, block_sizes=(4096, 2048)), 4096)
    assert refused["compiles"].startswith("no: ") and refused["custom calls"] is None
