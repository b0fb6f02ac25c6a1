"""The Triton kernels of the GPU: what they serve. They are imported when the first problem comes that is theirs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.backends.tiled import backend as tiled
from regard.components.mask import And, Band, Before, Blocks, Dense, Documents, Mask, Not, Or
from regard.components.normalizer import Sigmoid, Softmax
from regard.components.position import T5, ALiBi, TensorBias
from regard.components.score import Additive, Product
from regard.components.tile import Sizes
from regard.plan.nonfinite import flag_nonfinite
from regard.plan.problem import Plan

# See `Backend`.
about = "Triton kernels for GPUs, in linear memory"
is_automatic = True
masks_nonfinite = True
is_differentiable = False
# The sum of each row, and the output in float32, empty if it is that already.
saved = 2


def is_for(device_type: str) -> bool:
    """On the CPU the kernels run in Triton's interpreter, when they are asked for by name."""
    return device_type != "cpu"


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MASKS = (Band, Before, Documents, Blocks, Dense)
# The largest weights are kept in registers.
_MOST = 64
# So long is an axis of the grid of programs.
_MOST_HEADS = 65_535
# What is wider fills them.
_WIDEST = 256
# Of NVIDIA's GPUs, the first whose matrix units take bfloat16.
_OLDEST = (8, 0)
# Where a number of a bias stands is told in 31 bits, and so is that of a query or a key.
_FARTHEST = 1 << 31
# A mask is brought to the form (a & b) | (c & d): of so many parts at most.
_PARTS = 64


def missing() -> str | None:
    """Why there are no Triton kernels; None if there are."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'regard[gpu]'"
    return None


def is_interpreted() -> bool:
    """Do the kernels run on the CPU, by Triton's interpreter? For tests, and to find faults: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _unfit(device: torch.device) -> str | None:
    """Why a GPU cannot run them; None if it can."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or capability < _OLDEST:
        return "they are written for NVIDIA's GPUs from Ampere on"
    return None


def refuse(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """Why it cannot serve a problem; None if it can."""
    q, k, v = tensors[:3]
    if q.device.type != "cuda" and not (q.device.type == "cpu" and is_interpreted()):
        return f"the tensors are on {q.device.type}"
    if reason := missing() or (_unfit(q.device) if q.is_cuda else None):
        return reason
    if not isinstance(plan.score, Product | Additive):
        return f"it has no score but the dot product and the additive one, and {type(plan.score).__name__} is neither"
    if not isinstance(plan.normalizer, Softmax | Sigmoid):
        return f"it has no normalizer but softmax and sigmoid, and {type(plan.normalizer).__name__} is neither"
    if any(x.dtype not in _DTYPES for x in (q, k, v)):
        return "it computes in float32, and float64 was given"
    if not (q.numel() and k.numel() and v.numel()):
        return "an axis has size zero"
    if q.shape[0] * q.shape[1] > _MOST_HEADS:
        return f"it has no more than {_MOST_HEADS:,} heads in all batch rows, and here are {q.shape[0] * q.shape[1]:,}"
    if q.shape[0] * q.shape[1] * max(q.shape[2], k.shape[2]) >= _FARTHEST:
        return "it counts the queries, or the keys, of all heads in 31 bits"
    if max(q.shape[-1], v.shape[-1]) > _WIDEST:
        return f"it has no rows of more than {_WIDEST} numbers, and these have {max(q.shape[-1], v.shape[-1])}"
    if plan.bias is not None and not isinstance(plan.bias, TensorBias | ALiBi | T5):
        return f"it has no bias but a tensor, ALiBi and T5, and {type(plan.bias).__name__} is none"
    if isinstance(plan.bias, TensorBias):
        added: Any = plan.bias.tensor
        shape, stride = tensors[added.index].shape, tensors[added.index].stride()
        if sum((n - 1) * step for n, step in zip(shape[2:], stride[2:], strict=True)) >= _FARTHEST:
            return "its bias has 2^31 numbers a head at most"
    parts = _parts(plan.mask)
    if parts is None:
        return "it has no masks in Python"
    if max(parts) > _PARTS:
        return f"it has no mask of more than {_PARTS} parts, once that is brought to the form (a & b) | (c & d)"
    if plan.summary.top > _MOST:
        return f"it gives no more than the {_MOST} largest weights"
    return None


def _parts(mask: Mask | None) -> tuple[int, int] | None:
    """How many parts a mask has in the form (a & b) | (c & d), and how many what denies it; None where one is in Python."""
    if mask is None or type(mask) in _MASKS:
        return (0, 0) if mask is None else (1, 1)
    if isinstance(mask, Not):
        inner = _parts(mask.inner)
        return inner and inner[::-1]
    if not isinstance(mask, And | Or):
        return None
    left, right = _parts(mask.left), _parts(mask.right)
    if left is None or right is None:
        return None
    (a, b), (denied_a, denied_b) = zip(left, right, strict=True)
    if isinstance(mask, And):
        return 2 * a * b, denied_a + denied_b
    return a + b, 2 * denied_a * denied_b


def forward(plan: Plan, tensors: Sequence[Tensor], is_last: bool = False) -> tuple[Tensor, ...]:
    """All outputs of a problem, in the order of `Plan.outputs`, and the extras: the second empty where this is the `last`
    pass, with no backward pass to follow.
    """
    from regard.backends.triton import launch

    with _on(tensors[0].device):
        results = launch.forward(plan, tensors, is_last)
    sums = results["sums"]
    return *[results[name] for name in plan.outputs], sums, results.get("exact", sums.new_empty(0))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton starts kernels on the GPU that is current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def empty_saved(size: Sizes, like: Tensor, v: Tensor) -> list[Tensor]:
    """Tensors like the extras, with nothing in them; `like` is float32."""
    rows = (size.B, size.H, size.L)
    return [like.new_empty(2, *rows), like.new_empty((*rows, v.shape[-1]) if v.dtype != torch.float32 else 0)]


def backward(
    plan: Plan,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors that are `needs_grad`, from those of the outputs (None = zero)."""
    given = plan.named(gradients)
    dout = given.pop("out", None)
    # The log-sum-exp of the scores is no part of what else than a softmax tells of them.
    dlse = given.pop("lse", None) if isinstance(plan.normalizer, Softmax) else None
    if given or (dout is None and dlse is None):
        plan, everything = flag_nonfinite(plan, tensors)
        more = len(everything) - len(tensors)
        return tiled.backward(plan, everything, (), gradients, (*needs_grad, *[False] * more))[: len(tensors)]
    from regard.backends.triton import launch

    out, sums, exact = saved
    dout = torch.zeros_like(out) if dout is None else dout
    with _on(out.device):
        found = launch.backward(plan, tensors, dout, exact if exact.numel() else out, sums, dlse, needs_grad)
    return tuple([found.get(place) for place in range(len(tensors))])
