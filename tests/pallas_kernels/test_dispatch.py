"""Which implementation runs: names, order, targets and platforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch

PLUS = {
    "xla": dispatch.Implementation(lambda x: x + 1),
    "xla_chunked": dispatch.Implementation(lambda x: x + 2),
    "pallas_tpu": dispatch.Implementation(
        lambda x: x + 3, refuses=lambda x: "x is odd" if x.size % 2 else None
    ),
}


def call(x, implementation=None):
    choice = dispatch.choose("plus", implementation, PLUS, x)
    return dispatch.run(choice, {name: i.forward for name, i in PLUS.items()}, x)


def test_a_name_is_taken_or_refused():
    x = jnp.zeros(3)
    assert float(call(x, "xla")[0]) == 1
    with pytest.raises(ValueError, match=r"plus cannot run these arguments .*'pallas_tpu': x is odd"):
        call(x, "pallas_tpu")
    with pytest.raises(ValueError, match="'cudnn'.*which plus does not have; it has 'xla'"):
        call(x, "cudnn")
    with pytest.raises(ValueError, match="'flash', which is unknown"):
        call(x, ("xla", "flash"))


def test_of_several_names_the_first_that_takes_the_arguments():
    names = ("cudnn", "pallas_tpu", "xla")
    assert float(call(jnp.zeros(3), names)[0]) == 1
    assert dispatch.choose("plus", names, PLUS, jnp.zeros(4)) == (("any", "pallas_tpu"),)


def test_none_is_chosen_by_the_platform_that_is_lowered_for():
    x = jnp.zeros(4)
    assert float(call(x)[0]) == 2  # CPU: xla_chunked before xla
    lowered = {
        p: jax.jit(call).trace(x).lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cpu", "cuda")
    }
    added = {p: next(c for c in "123" if f"dense<{c}.0" in text) for p, text in lowered.items()}
    assert added == {"tpu": "3", "cpu": "2", "cuda": "2"}


def test_target_wins_over_the_platform_and_takes_part_in_jit_caching():
    jitted = jax.jit(call)
    x = jnp.zeros(4)
    assert float(jitted(x)[0]) == 2
    with dispatch.target("tpu", "v5e"):
        assert dispatch.current_target() == dispatch.Target("tpu", "v5e")
        assert float(jitted(x)[0]) == 3
    assert dispatch.current_target() is None
    assert float(jitted(x)[0]) == 2


def test_kernels_for_hopper_are_taken_where_the_target_says_so():
    has = PLUS | {"pallas_gpu": dispatch.Implementation(lambda x: x + 4)}
    x = jnp.zeros(4)
    assert dict(dispatch.choose("plus", None, has, x))["cuda"] == "xla_chunked"
    with dispatch.target("cuda"):
        assert dispatch.choose("plus", None, has, x) == (("any", "xla_chunked"),)
    with dispatch.target("cuda", "h100"):
        assert dispatch.choose("plus", None, has, x) == (("any", "pallas_gpu"),)


def test_a_kernel_may_prefer_otherwise():
    order = {"tpu": ("xla",), "cuda": ("xla",), "cpu": ("xla_chunked",)}
    choice = dispatch.choose("plus", None, PLUS, jnp.zeros(4), preferred=order)
    assert dict(choice) == {"tpu": "xla", "cuda": "xla", "cpu": "xla_chunked"}


@pytest.mark.parametrize("wrong", [("gpu",), ("tpu", "v9"), ("cuda", "v5e")])
def test_unknown_targets(wrong):
    with pytest.raises(ValueError, match="must be one of|is one of"), dispatch.target(*wrong):
        pass


def test_interpret_is_a_context():
    assert dispatch.interpret_mode() is False
    with dispatch.interpret():
        assert dispatch.interpret_mode() is True
    assert dispatch.interpret_mode() is False


def test_platforms_differ_under_vmap_and_grad():
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(jax.vmap(call)(x[:, None])[:, 0], x + 2)
    np.testing.assert_array_equal(jax.grad(lambda x: call(x).sum())(x), 1)


def test_a_function_keeps_the_contexts_of_the_moment():
    with dispatch.interpret(), dispatch.target("tpu", "v6e"):
        later = dispatch.as_now(lambda: (dispatch.interpret_mode(), dispatch.current_target().generation))
    assert later() == (True, "v6e")
    assert dispatch.interpret_mode() is False and dispatch.current_target() is None
