"""Reading compiled programs: by hand on a small text, and on a program whose work is known exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.preflight.hlo import parse
from launch.preflight.traffic import traffic

TEXT = """\
HloModule jit_f, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%taken (p: f32[10,8,128], i: s32[]) -> f32[8,128] {
  %p = f32[10,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,128]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %bitcast = f32[8,128]{1,0} bitcast(%slice)
}

%body (state: (s32[], f32[8,128], f32[10,8,128])) -> (s32[], f32[8,128], f32[10,8,128]) {
  %state = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, f32[10,8,128]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%n, %two)
  %x = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %w = f32[10,8,128]{2,1,0} get-tuple-element(%state), index=2
  %layer = f32[8,128]{1,0:T(8,128)S(1)} fusion(%w, %n), kind=kLoop, calls=%taken
  %gathered = f32[32,128]{1,0} all-gather(%layer), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %reduced = f32[8,128]{1,0:T(8,128)S(1)} all-reduce(%x), channel_id=2, replica_groups=mesh['r'=2,'f'=4] {'f'}, to_apply=%sum
  ROOT %tuple = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, f32[10,8,128]{2,1,0}) tuple(%next, %reduced, %w)
}

%test (state.1: (s32[], f32[8,128], f32[10,8,128])) -> pred[] {
  %state.1 = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, f32[10,8,128]{2,1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%state.1), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%n.1, %ten), direction=LT
}

ENTRY %main (x0: f32[8,128], w0: f32[10,8,128]) -> f32[8,128] {
  %x0 = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  %w0 = f32[10,8,128]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, /*index=2*/f32[10,8,128]{2,1,0}) tuple(%start, %x0, /*index=2*/%w0)
  %loop = (s32[], f32[8,128]{1,0:T(8,128)S(1)}, f32[10,8,128]{2,1,0}) while(%init), condition=%test, body=%body
  %out = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%loop), index=1
  %moved = (f32[8,128]{1,0}, f32[8,128]{1,0:S(1)}, u32[], u32[]) collective-permute-start(%out), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %kernel = f32[8,128]{1,0} custom-call(%out), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"5000","bytes_accessed":"777"}}}
  ROOT %arrived = f32[8,128]{1,0} collective-permute-done(%moved)
}
"""  # noqa: E501


def test_a_text_by_hand():
    module = parse(TEXT)
    assert module.entry == "main"
    runs, unknown = module.runs()
    assert runs == {"main": 1, "body": 5} and unknown == ()  # the counter goes up by 2, to 10
    work = traffic(module, 8)
    tile = 8 * 128 * 4
    found = {c.kind: c for c in work.collectives}
    assert {k: (c.bytes, c.times) for k, c in found.items()} == {
        "all-gather": (4 * tile, 5),
        "all-reduce": (tile, 5),
        "collective-permute": (tile, 1),
    }
    assert found["all-gather"].group == found["all-reduce"].group == (0, 1, 2, 3)
    assert work.by_kind()["all-gather"] == 20 * tile and work.by_kind()["all-to-all"] == 0
    assert work.flops == 5000
    # a trip reads one slice of the weights, writes what it gathers, and moves four integers of its counter;
    # what is in on-chip memory is free
    assert work.memory_bytes == 5 * (tile + 4 * tile + 16) + 777 + tile


def test_trips_can_be_given_and_unknown_ones_are_said():
    module = parse(TEXT)
    assert module.runs({"loop": 7})[0]["body"] == 7
    runs, unknown = parse(TEXT.replace("direction=LT", "direction=NE")).runs()
    assert runs["body"] == 1 and unknown == ("loop",)


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("HloModule empty")


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("f32[4,6]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 4 * 6 * 5),
        ("f32[4,6]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", 2 * 4 * 6 * 5),
        # a product of two shards written as a window that slides over them: half of its places are padding
        (
            "f32[4,2,6]{2,1,0} convolution(%c, %d), window={size=2 pad=1_1 rhs_reversal=1}, "
            "dim_labels=b0f_0io->b0f",
            2 * (2 * 4 * 6 * 5),
        ),
    ],
)
def test_products(line, flops):
    text = "\n".join(
        [
            "ENTRY %main (a: f32[4,5]) -> f32[] {",
            "  %a = f32[4,5]{1,0} parameter(0)",
            "  %b = f32[5,6]{1,0} parameter(1)",
            "  %c = f32[4,1,5]{2,1,0} parameter(2)",
            "  %d = f32[2,5,6]{2,1,0} parameter(3)",
            f"  ROOT %y = {line}",
            "}",
        ]
    )
    assert traffic(parse(text), 1).flops == flops


CODE = """
import json
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from launch.preflight.hlo import parse
from launch.preflight.traffic import traffic

mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def local(x, w):
    def layer(x, _):
        y = lax.all_gather(x, "b", tiled=True) @ w
        x = lax.psum_scatter(y, "b", tiled=True)
        x = lax.all_to_all(x, "a", 1, 0, tiled=True)
        x = lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)])
        return lax.all_to_all(x, "a", 0, 1, tiled=True), None
    x, _ = lax.scan(layer, x, None, length=5)
    return lax.psum(jnp.sum(x), "a")[None]

f = jax.shard_map(local, mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"), check_vma=False)
x, w = jnp.ones((32, 64)), jnp.ones((64, 64))
work = traffic(parse(jax.jit(f).lower(x, w).compile().as_text()), 8)
groups = {c.kind: [len(c.group), c.times] for c in work.collectives}
print(json.dumps([work.flops, work.by_kind(), groups, list(work.unknown_loops)]))
"""


def test_a_program_for_eight_devices_whose_collectives_are_known():
    root = Path(__file__).parents[2]
    flags = "--xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    flops, by_kind, groups, unknown = json.loads(done.stdout.splitlines()[-1])
    shard, whole = 8 * 64 * 4, 32 * 64 * 4
    assert unknown == []
    assert flops == 5 * 2 * 32 * 64 * 64
    assert by_kind == {
        "all-gather": 5 * whole,
        "reduce-scatter": 5 * whole,
        "all-reduce": 4,
        "all-to-all": 2 * 5 * shard,
        "collective-permute": 5 * shard,
    }
    assert groups["all-gather"] == groups["reduce-scatter"] == [4, 5]
    assert groups["all-to-all"] == [2, 5] and groups["all-reduce"] == [2, 1]
