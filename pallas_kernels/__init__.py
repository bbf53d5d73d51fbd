"""Attention and scan kernels in JAX; knows arrays only."""

import importlib
import sys
import types

# Imported when first asked for: what each kernel costs can be had without JAX, from pallas_kernels.cost.
_HOMES = {
    "block_sparse_attention": "attention",
    "causal_conv1d": "causal_conv1d",
    "dot_product_attention": "attention",
    "gated_delta_rule": "gated_delta_rule",
    "linear_cross_entropy": "linear_cross_entropy",
    "linear_scan": "linear_scan",
    "mlstm": "mlstm",
    "selective_scan": "selective_scan",
    "ssd": "ssd",
}
__all__ = list(_HOMES)


class _Package(types.ModuleType):
    """Keeps the name of a kernel for its function where its file has the same name."""

    def __setattr__(self, name, value):
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted({*globals(), *__all__})
