"""Which implementation of a kernel runs."""

from collections.abc import Callable, Mapping, Sequence

# Every name the kernels know, whether or not a kernel has it yet.
NAMES = ("xla", "xla_chunked", "pallas_tpu", "pallas_gpu", "cudnn")


def choose(kernel: str, implementation: str | Sequence[str] | None, available: Mapping[str, Callable]):
    """The name and function of the implementation to run.

    Args:
      kernel: the kernel's public name, for messages.
      implementation: None (the default, ``xla``), one name, or names in order of preference; of
        several the first that the kernel has is taken, and that is the only kind of fall-back.
      available: name -> function, of the implementations that this kernel has.

    Returns:
      (name, function).

    Raises:
      ValueError: an unknown name, or no name that this kernel has.
    """
    if implementation is None:
        implementation = "xla"
    wanted = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    has = ", ".join(map(repr, available))
    for name in wanted:
        if name not in NAMES:
            raise ValueError(f"implementation is {name!r}, which is unknown; {kernel} has {has}")
    for name in wanted:
        if name in available:
            return name, available[name]
    raise ValueError(f"implementation is {implementation!r}, which {kernel} does not have; it has {has}")
