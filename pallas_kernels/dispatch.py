"""Which implementation of a kernel runs: by name, by target, or by the platform it is lowered for.

A kernel hands in its implementations by name. The caller's ``implementation`` picks among them:

1. a name: that one or an error, never another;
2. several names: the first that takes these arguments;
3. None, inside ``target(...)``: the best one for that platform, as ahead-of-time compilation needs;
4. None: the best one for each platform, chosen when XLA lowers (``lax.platform_dependent``), so that
   one trace serves every device and nothing asks which devices are there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax

# Every name the kernels know, whether or not a kernel has it yet.
NAMES = ("xla", "xla_chunked", "pallas_tpu", "pallas_gpu", "cudnn")
# What None stands for, in order of preference. Lowering sees "cuda" and not which GPU, and the kernels are
# for Hopper alone: on CUDA they are taken by name, or by a target that says which GPU.
PREFERRED = {
    "tpu": ("pallas_tpu", "xla_chunked", "xla"),
    "cuda": ("xla_chunked", "xla"),
    "cpu": ("xla_chunked", "xla"),
}
GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
HOPPER = ("h100", "h200")
KNOWN = {"tpu": GENERATIONS, "cuda": HOPPER, "cpu": ()}

# Both take part in the keys of jit's caches: what was traced under one value is not reused under another.
_target = jax.make_user_context(None)
_interpret = jax.make_user_context(False)


@dataclasses.dataclass(frozen=True)
class Target:
    """A device that is compiled for: ``platform`` tpu, cuda or cpu; its ``generation`` where known."""

    platform: str
    generation: str | None = None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute a kernel.

    Attributes:
      forward: ``forward(*arrays, **options)``: outputs and whatever else the backward pass keeps. All
        implementations of one kernel return the same structure, so that platforms can differ in one trace.
      backward: ``backward(*arrays, **options)``, from what forward kept to the gradients; None where the
        kernel leaves differentiation to JAX.
      refuses: ``refuses(*arrays, **options)``: why these arguments are not for this implementation, in
        words that name the argument, or None. Looks at shapes and dtypes alone.
    """

    forward: Callable
    backward: Callable | None = None
    refuses: Callable | None = None


@contextlib.contextmanager
def target(platform: str, generation: str | None = None):
    """Within it ``implementation=None`` means the best one for ``platform``, whatever devices are here.

    For ahead-of-time compilation; also the way to have block sizes tuned for one TPU generation, and the
    kernels for Hopper GPUs by default.

    Args:
      platform: tpu, cuda or cpu.
      generation: v4, v5e, v5p, v6e or tpu7x of tpu; h100 or h200 of cuda; None where it may be any.
    """
    if platform not in PREFERRED:
        raise ValueError(f"platform is {platform!r}; it must be one of {', '.join(PREFERRED)}")
    if generation is not None and generation not in KNOWN[platform]:
        known = ", ".join(KNOWN[platform]) or "none"
        raise ValueError(f"generation is {generation!r}; for {platform} it is one of: {known}; or None")
    with _target(Target(platform, generation)):
        yield


@contextlib.contextmanager
def interpret(mode=True):
    """Within it Pallas kernels run on the CPU: for tests.

    Args:
      mode: True for the fast interpreter, or ``pltpu.InterpretParams(...)`` for the one that simulates
        memory spaces, copies and races (100 times slower).
    """
    with _interpret(mode):
        yield


def current_target() -> Target | None:
    """The ``Target`` of the enclosing ``target(...)``, or None."""
    return _target.value


def tpu_generation() -> str | None:
    """The generation of TPU that is compiled for, where a target says so."""
    here = _target.value
    return here.generation if here is not None and here.platform == "tpu" else None


def for_generation(table: Mapping):
    """The entry of ``table``, TPU generation -> anything, for ``tpu_generation``, or that of "default"."""
    return table.get(tpu_generation(), table["default"])


def interpret_mode():
    """What ``pl.pallas_call(interpret=...)`` is to be given: False outside ``interpret(...)``."""
    return _interpret.value


def as_now(function: Callable) -> Callable:
    """``function``, whenever it is called, under the target and the interpret mode of this moment."""
    here, mode = _target.value, _interpret.value

    @functools.wraps(function)
    def call(*args):
        with _target(here), _interpret(mode):
            return function(*args)

    return call


def choose(
    kernel: str,
    implementation: str | Sequence[str] | None,
    available: Mapping[str, Implementation],
    *arrays,
    preferred: Mapping[str, Sequence[str]] = PREFERRED,
    **options,
) -> tuple[tuple[str, str], ...]:
    """The implementation for each platform, as ((platform, name), ...); "any" where one serves all.

    Hashable, to be a static argument of ``jax.custom_vjp``; ``run`` takes it.

    Args:
      kernel: the public name, for messages.
      implementation: the caller's.
      available: the kernel's implementations by name.
      preferred: per platform, what None stands for.
      *arrays, **options: passed to each ``refuses``.

    Raises:
      ValueError: an unknown name, a name that this kernel lacks or that does not take these arguments.
    """
    if implementation is None:
        here = current_target()
        if here is not None:
            names = preferred[here.platform]
            if here.generation in HOPPER:
                names = ("pallas_gpu", *names)
            return (("any", _first(kernel, names, available, arrays, options)),)
        picked = {p: _first(kernel, names, available, arrays, options) for p, names in preferred.items()}
        if len(set(picked.values())) == 1:
            return (("any", picked["cpu"]),)
        return tuple(picked.items())
    wanted = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in wanted:
        if name not in NAMES:
            has = ", ".join(map(repr, available))
            raise ValueError(f"implementation is {name!r}, which is unknown; {kernel} has {has}")
    return (("any", _first(kernel, wanted, available, arrays, options)),)


def _first(kernel, wanted, available, arrays, options) -> str:
    why = []
    for name in wanted:
        if name not in available:
            continue
        refuses = available[name].refuses
        reason = refuses(*arrays, **options) if refuses else None
        if reason is None:
            return name
        why.append(f"{name!r}: {reason}")
    if why:
        raise ValueError(f"{kernel} cannot run these arguments by implementation {'; '.join(why)}")
    has = ", ".join(map(repr, available))
    raise ValueError(f"implementation is {wanted!r}, which {kernel} does not have; it has {has}")


def run(choice: tuple[tuple[str, str], ...], functions: Mapping[str, Callable], *arrays):
    """Calls the chosen function, or leaves the choice to lowering where platforms differ.

    Args:
      choice: what ``choose`` returned.
      functions: name -> function of ``arrays``, its options bound already; all of one output structure.
    """
    by_platform = {platform: functions[name] for platform, name in choice}
    if "any" in by_platform:
        return by_platform["any"](*arrays)
    default = by_platform.pop("cpu")
    return jax.lax.platform_dependent(*arrays, **by_platform, default=default)
