"""The Triton backend: which problems it serves. The kernels are imported when the first of these problems is run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.backends.backend import Supported
from regard.backends.relative import TensorOrRelative, refuse_bias
from regard.backends.tiled import backend as tiled
from regard.components.mask import And, Mask, Not, Or
from regard.components.normalizer import Sigmoid, Softmax
from regard.components.position import TensorBias
from regard.components.score import Additive, Product
from regard.components.statistic import (
    Entropy,
    FullWeights,
    LargestWeight,
    LogSumExp,
    Mass,
    Received,
    RowWeights,
    TopKeys,
    TopWeights,
)
from regard.components.tile import Sizes
from regard.plan.nonfinite import flag_nonfinite
from regard.plan.problem import Plan

# See `Backend`.
about = "Triton kernels for GPUs, in linear memory"
is_automatic = True
is_fastest_for: frozenset[torch.dtype] = frozenset()
masks_nonfinite = True


class _EncodedMasks:
    """The masks that `triton.mask` encodes. It is imported once all other components are known to be supported."""

    def __contains__(self, kind: object) -> bool:
        from regard.backends.triton.mask import ENCODERS

        return kind in ENCODERS


supported = Supported(
    scores={Product, Additive},
    normalizers={Softmax, Sigmoid},
    masks=_EncodedMasks(),
    biases=TensorOrRelative(),
    statistics={
        LogSumExp,
        LargestWeight,
        Entropy,
        Received,
        FullWeights,
        TopWeights,
        TopKeys,
        Mass,
        RowWeights,
    },
)
is_differentiable = False
has_all_derivatives = False
is_dispatched = False
# The row sums, and the output in float32, which is empty if the output is float32 itself.
saved = 2


def is_for(device_type: str) -> bool:
    """Any device but the CPU. There the kernels run in Triton's interpreter, only if the backend is named."""
    return device_type != "cpu"


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The largest weights are kept in registers.
_MAX_TOP = 64
# CUDA limits grid.y to 65,535.
_MAX_HEADS = 65_535
# Wider rows spill registers.
_MAX_WIDTH = 256
# Ampere, the first NVIDIA GPUs whose matrix units support bfloat16.
_MIN_CAPABILITY = (8, 0)
# Offsets into a bias, and indices of queries and keys, are int32.
_MAX_INDEX = 1 << 31
# Literals of a mask in disjunctive normal form, (a & b) | (c & d).
_MAX_LITERALS = 64


def missing() -> str | None:
    """Return why Triton is missing; None if it is installed."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'regard[gpu]'"
    return None


def is_interpreted() -> bool:
    """Whether the kernels run on the CPU in Triton's interpreter, for tests and debugging: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _unsupported_gpu(device: torch.device) -> str | None:
    """Return why a GPU cannot run the kernels; None if it can."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or capability < _MIN_CAPABILITY:
        return "the kernels need an NVIDIA GPU of compute capability 8.0 (Ampere) or newer"
    return None


def refuse(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """Return why it cannot serve a problem; None if it can.

    >>> q = torch.zeros(1, 1, 2, 512)
    >>> regard.explain(q, q, q).reasons["triton"]
    'the width is 512; it supports up to 256'
    """
    q, k, v = tensors[:3]
    if q.device.type != "cuda" and not (q.device.type == "cpu" and is_interpreted()):
        return f"the tensors are on {q.device.type}"
    if reason := missing() or (_unsupported_gpu(q.device) if q.is_cuda else None):
        return reason
    if any(x.dtype not in _DTYPES for x in (q, k, v)):
        return "it computes in float32, and the tensors are float64"
    if not (q.numel() and k.numel() and v.numel()):
        return "a dimension has size 0"
    if q.shape[0] * q.shape[1] > _MAX_HEADS:
        return f"batch size times heads is {q.shape[0] * q.shape[1]:,}; it supports up to {_MAX_HEADS:,}"
    if q.shape[0] * q.shape[1] * max(q.shape[2], k.shape[2]) >= _MAX_INDEX:
        return "its indices of the queries, or keys, of all heads would exceed 31 bits"
    if max(q.shape[-1], v.shape[-1]) > _MAX_WIDTH:
        return f"the width is {max(q.shape[-1], v.shape[-1])}; it supports up to {_MAX_WIDTH}"
    if isinstance(plan.bias, TensorBias):
        slot: Any = plan.bias.tensor
        shape, stride = tensors[slot.index].shape, tensors[slot.index].stride()
        if sum((n - 1) * step for n, step in zip(shape[2:], stride[2:], strict=True)) >= _MAX_INDEX:
            return "its offsets into the bias of one head would exceed 31 bits"
    if max(_count_literals(plan.mask)) > _MAX_LITERALS:
        return f"the mask has more than {_MAX_LITERALS} parts when written as (a & b) | (c & d)"
    if reason := refuse_bias(plan, tensors):
        return reason
    if plan.summary.top > _MAX_TOP:
        return f"it returns up to {_MAX_TOP} largest weights per row, not {plan.summary.top}"
    return None


def _count_literals(mask: Mask | None) -> tuple[int, int]:
    """Bound the number of literals of a mask, and of its negation, in normal form."""
    if mask is None:
        return 0, 0
    if isinstance(mask, Not):
        return _count_literals(mask.inner)[::-1]
    if not isinstance(mask, And | Or):
        return 1, 1
    (a, negated_a), (b, negated_b) = _count_literals(mask.left), _count_literals(mask.right)
    if isinstance(mask, And):
        return 2 * a * b, negated_a + negated_b
    return a + b, 2 * negated_a * negated_b


def forward(plan: Plan, tensors: Sequence[Tensor], is_last: bool = False) -> tuple[Tensor, ...]:
    """Return the outputs of a problem, in the order of `Plan.outputs`, and the saved tensors.

    If `is_last`, no backward pass follows, and saved tensors may be empty.
    """
    from regard.backends.triton import launch

    with _current_device(tensors[0].device):
        results = launch.forward(plan, tensors, is_last)
    row_sums = results["row_sums"]
    return *[results[name] for name in plan.outputs], row_sums, results.get("out_fp32", row_sums.new_empty(0))


def _current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one: Triton launches kernels there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def empty_saved(size: Sizes, like: Tensor, v: Tensor) -> list[Tensor]:
    """Return uninitialized tensors with the shapes and dtypes of the saved ones; `like` is float32."""
    rows = (size.B, size.H, size.L)
    return [like.new_empty(2, *rows), like.new_empty((*rows, v.shape[-1]) if v.dtype != torch.float32 else 0)]


def backward(
    plan: Plan,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tensors that need one, from those of the outputs; None stands for zeros.

    The kernels take the gradients of the output and, with softmax, of the log-sum-exp. `tiled` computes all others.
    """
    given = plan.named(gradients)
    dout = given.pop("out", None)
    dlse = given.pop("lse", None) if isinstance(plan.normalizer, Softmax) else None
    if given or (dout is None and dlse is None):
        plan, flagged = flag_nonfinite(plan, tensors)
        added = len(flagged) - len(tensors)
        return tiled.backward(plan, flagged, (), gradients, (*needs_grad, *[False] * added))[: len(tensors)]
    from regard.backends.triton import launch

    out, row_sums, out_fp32 = saved
    dout = torch.zeros_like(out) if dout is None else dout
    out = out_fp32 if out_fp32.numel() else out
    with _current_device(out.device):
        grads = launch.backward(plan, tensors, dout, out, row_sums, dlse, needs_grad)
    return tuple([grads.get(index) for index in range(len(tensors))])
