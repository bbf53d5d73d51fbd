"""Slices by name, the roofline's arithmetic, prices, and the cache of what was compiled."""

import json
import math

import pytest

from launch.preflight import cache
from launch.preflight.hardware import GENERATIONS, GPUS, parse_target, smaller_slices
from launch.preflight.prices import DEFAULT, read_prices
from launch.preflight.roofline import sent_bytes, step_time
from launch.preflight.traffic import spans
from scaling.chips import BANDWIDTH, PEAK_FLOPS
from scaling.config import ConfigError


@pytest.mark.parametrize(
    ("name", "shape", "devices", "words"),
    [
        ("v5e", (1, 1), 1, "v5e: 1 chip, 1x1, 1 host"),
        ("v5e-256", (16, 16), 256, "v5e-256: 256 chips, 16x16, 64 hosts"),
        ("v5e-8", (2, 4), 8, "v5e-8: 8 chips, 2x4, 1 host"),
        ("v5e:4x8", (4, 8), 32, "v5e-32: 32 chips, 4x8, 8 hosts"),
        ("v6e-64", (8, 8), 64, "v6e-64: 64 chips, 8x8, 16 hosts"),
        ("v5p-128", (4, 4, 4), 64, "v5p-128: 64 chips, 4x4x4, 16 hosts"),
        ("v4-8", (2, 2, 1), 4, "v4-8: 4 chips, 2x2x1, 1 host"),
        ("tpu7x-8", (2, 2, 1), 8, "tpu7x-8: 4 chips, 2x2x1, 1 host"),
        ("H100-8", (8,), 8, "H100-8: 8 GPUs"),
    ],
)
def test_slices_by_name(name, shape, devices, words):
    target = parse_target(name)
    assert (target.shape, target.devices, str(target)) == (shape, devices, words)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9", "target is 'v9'; it must be one of v4, v5e"),
        ("v5e-3", r"v5e has slices v5e-1, v5e-4, .*v5e-256 \(the number counts chips\)"),
        ("v5p-64x", "target is 'v5p-64x'"),
        ("v5p-4", "TensorCores, two a chip"),
        ("v5e:3x3", "v5e has slices 1x1, 2x2"),
        ("h100-12", "h100-1 to h100-8, or whole nodes of 8"),
    ],
)
def test_targets_that_are_not(name, said):
    with pytest.raises(ConfigError, match=said):
        parse_target(name)


def test_smaller_slices_go_from_one_chip_to_the_target():
    assert [s.chips for s in smaller_slices(parse_target("v5e-64"))] == [1, 4, 8, 16, 32, 64]
    assert [s.chips for s in smaller_slices(parse_target("v5p-128"))] == [1, 4, 8, 16, 32, 64]
    assert [s.chips for s in smaller_slices(parse_target("h100-16"))] == [1, 2, 4, 8, 16]
    assert [s.name for s in smaller_slices(parse_target("v5e"))] == ["v5e"]


def test_every_chip_has_its_figures():
    for name in (*GENERATIONS, *GPUS):
        target = parse_target(name)
        assert target.peak_flops == PEAK_FLOPS[target.chip] / target.devices_per_chip
        assert target.bandwidth == BANDWIDTH[target.chip] / target.devices_per_chip
        assert target.memory > 1e10
    assert parse_target("tpu7x").memory == 96 << 30  # a device is half a chip


def test_network_counts_the_links_that_a_group_can_use():
    pod, part = parse_target("v5e-256"), parse_target("v5e-16")
    assert pod.network((16, 16)) == 4 * 50e9  # both axes close to rings
    assert pod.network((16, 1)) == 2 * 50e9
    assert part.network((4, 4)) == 2 * 50e9  # neither does
    assert parse_target("v5p-128").network((4, 4, 4)) == 6 * 100e9
    assert parse_target("tpu7x-128").network((4, 4, 4)) == 3 * 100e9  # two devices share a chip's links
    assert parse_target("h100-8").network((8,)) == 450e9
    assert parse_target("h100-16").network((16,)) == 50e9


def test_roofline_arithmetic():
    target = parse_target("v5e-16")
    assert sent_bytes("all-gather", 160.0, 16) == sent_bytes("reduce-scatter", 160.0, 16) == 150
    assert sent_bytes("all-reduce", 160.0, 16) == 300 and sent_bytes("collective-permute", 160.0, 16) == 160
    assert sent_bytes("all-reduce", 160.0, 1) == 0
    moved = [{"kind": "all-gather", "bytes": 16e9, "devices": 16, "spans": [4, 4], "times": 10}]
    times = step_time(197e12, 0.819e12 / 2, moved, target)
    assert times.compute == pytest.approx(1) and times.memory == pytest.approx(0.5)
    assert times.network == pytest.approx(10 * 15e9 / 100e9)
    assert times.seconds == times.network and times.bound == "network"
    assert times.in_turn == pytest.approx(3)


def test_spans_of_groups():
    places = [(x, y) for x in range(2) for y in range(4)]
    assert spans((0, 1, 2, 3), places) == (1, 4) and spans(range(8), places) == (2, 4)


def test_prices_as_shipped():
    prices = read_prices()
    assert set(prices.chip_hour) == {*GENERATIONS, *GPUS} and prices.currency == "USD"
    assert "http" not in DEFAULT.read_text().split("[chip_hour]")[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dated = 1", "dated is 1; it must be a text"),
        ('dated = "x"\ncurrency = "EUR"', "chip_hour is None; it must be a table"),
        ('dated = "x"\ncurrency = "EUR"\n[chip_hour]\nv5 = 1', "unknown key 'v5'; did you mean"),
        (
            'dated = "x"\ncurrency = "EUR"\n[chip_hour]\nv5e = -1',
            "chip_hour.v5e is -1; it must be a positive",
        ),
        ("dated =", "is not TOML"),
    ],
)
def test_prices_that_are_not(tmp_path, text, said):
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_prices(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prices(tmp_path / "none.toml")


def test_cache(tmp_path, monkeypatch):
    kept = cache.Cache(tmp_path / "deep")
    name = cache.key("module @step {}", "v5e:2x2")
    assert kept.get(name) is None
    kept.put(name, {"flops": 1.5})
    assert kept.get(name) == {"flops": 1.5} and (kept.hits, kept.misses) == (1, 1)
    others = {cache.key("module @step { }", "v5e:2x2"), cache.key("module @step {}", "v5e:4x4")}
    monkeypatch.setattr(cache, "versions", lambda: {"jax": "0", "jaxlib": "0", "libtpu": None})
    others.add(cache.key("module @step {}", "v5e:2x2"))
    assert len({name, *others}) == 4
    path = tmp_path / "deep" / f"{name}.json"
    for text in ("", "{", "[]", json.dumps({"format": cache.FORMAT + 1, "found": {}}), "\0"):
        path.write_text(text)
        assert kept.get(name) is None
    assert cache.Cache(None).get(name) is None
    assert math.isfinite(kept.misses)
