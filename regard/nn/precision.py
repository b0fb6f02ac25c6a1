"""Recurrent layers in reduced precision, on CPUs that have no primitive for it.

Under autocast torch hands an `nn.LSTM` on the CPU to oneDNN in bfloat16 or float16. oneDNN has bfloat16 LSTMs for CPUs
with AVX-512 only, and float16 LSTMs for even fewer; elsewhere the call raises. Here such a layer computes in float32
instead. Packed sequences and `nn.GRU` do not go through oneDNN.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def run_recurrent(layer: nn.GRU | nn.LSTM, compute: Callable[..., Any], *inputs: Any) -> Any:
    """Return `compute(*inputs)`, which runs the recurrent `layer`.

    Under autocast to a dtype that this CPU has no primitive for, compute in float32 and round the results to that
    dtype, in which autocast would return them.

    Args:
        layer: the layer that `compute` runs.
        compute: takes the inputs and returns a tensor, or a tuple of tensors and of such tuples.
        inputs: each a tensor, a tuple of tensors, or None.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    weight: Any = layer.weight_ih_l0
    # Autocast applies to float32 weights only. For other dtypes torch uses its own implementation.
    applies = dtype is not None and weight.is_cpu and weight.dtype == torch.float32
    if not applies or has_primitive(type(layer).__name__, dtype):
        return compute(*inputs)
    with torch.autocast("cpu", enabled=False):
        return _cast(compute(*_cast(inputs, torch.float32)), dtype)


@cache
def has_primitive(kind: str, dtype: torch.dtype | None) -> bool:
    """Return whether this CPU runs a recurrent layer, "LSTM" or "GRU", under autocast to `dtype`, in inference and in
    training.

    The first call runs a layer of width 1, and warns if that fails. The result is cached per process.
    """
    layer = getattr(nn, kind)(1, 1)
    try:
        for training in (False, True):
            with torch.set_grad_enabled(training), torch.autocast("cpu", dtype):
                layer.train(training)(torch.zeros(1, 1, 1))
    except RuntimeError as error:
        reason = str(error).partition(". ")[0]
        warnings.warn(f"{kind} layers compute in float32: this CPU cannot run them in {dtype} ({reason})", stacklevel=3)
        return False
    return True


# torch.compile calls it while tracing, and treats the result as a constant.
has_primitive._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cast(x: Any, dtype: torch.dtype | None) -> Any:
    """Cast the floating-point tensors of x, which is a tensor, None or a nested tuple of these."""
    if isinstance(x, tuple):
        return tuple(_cast(part, dtype) for part in x)
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
