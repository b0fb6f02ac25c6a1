"""What is known while a call is made: whether the values of tensors can be read, whether the call is recorded into a graph,
and which derivatives are taken of it.

Code branches on values only where `has_values` says that it may. Everywhere else it branches on shapes, dtypes and
devices, so that a graph that was recorded for some values holds for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch: Any = torch._C._functorch
_MODES: Any = torch._C._TorchDispatchModeKey
_TENSORS = (Tensor, torch.nn.Parameter)


def is_eager(*tensors: Tensor) -> bool:
    """Whether nothing records or transforms a call, and its tensors hold values: the common case, and quick to check."""
    if (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or is_transformed()
    ):
        return False
    return all([type(x) in _TENSORS and not x.is_meta for x in tensors])  # noqa: C419, a generator takes longer


def has_values(*tensors: Tensor) -> bool:
    """Whether the values of tensors can be read, and code may depend on them."""
    if is_symbolic(*tensors) or is_tracing():
        return False
    return not any(is_batched(x) for x in tensors)


def is_symbolic(*tensors: Tensor) -> bool:
    """Whether tensors stand for values that are unknown until a graph is run: in graphs of torch.compile, torch.export and
    make_fx, as fake tensors, and on the meta device. The operators of `backends.compiled_ops` take them.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() and (
        torch._C._get_dispatch_mode(_MODES.FAKE) is not None or torch._C._get_dispatch_mode(_MODES.PROXY) is not None
    ):
        return True
    return any([x.is_meta or (type(x) is not Tensor and getattr(x, "fake_mode", None) is not None) for x in tensors])  # noqa: C419


def is_tracing() -> bool:
    """Whether torch.jit.trace, or an ONNX exporter, records the operations of torch: graphs that hold no other operators."""
    if torch.compiler.is_dynamo_compiling():  # which cannot trace the rest
        return False
    return torch._C._is_tracing() or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())


def is_batched(x: Tensor) -> bool:
    """Whether torch.func.vmap, or a batched gradient, hides an axis of a tensor."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return bool(_functorch.is_legacy_batchedtensor(x))


def is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_forward_mode(tensors: Sequence[Tensor]) -> bool:
    """Whether forward-mode derivatives are taken: of the tensors, or in an enclosing transform of torch.func."""
    if torch._C._are_functorch_transforms_active():
        return any(
            interpreter.key() == _functorch.TransformType.Jvp for interpreter in _functorch.get_interpreter_stack()
        )
    unpack: Any = forward_ad.unpack_dual
    return forward_ad._current_level >= 0 and any(unpack(x).tangent is not None for x in tensors)
