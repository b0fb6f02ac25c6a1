"""The native CPU kernels: what they serve, and how a plan is told to them. The kernels themselves stand in csrc/."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.backends.cpu import extension
from regard.backends.cpu.encode_mask import can_encode
from regard.backends.cpu.pack import DTYPES, IS_LAST, NORMALIZERS, contiguous_rows, needed_grads, pack
from regard.backends.relative import through_table
from regard.backends.tiled import backend as tiled
from regard.components.normalizer import Softmax
from regard.components.position import T5, ALiBi, TensorBias
from regard.components.score import Additive, Product
from regard.components.tile import Sizes
from regard.plan.nonfinite import any_flagged
from regard.plan.problem import Plan, sizes

# See `Backend`.
about = "native CPU kernels, in linear memory"
is_automatic = True
masks_nonfinite = False
is_differentiable = False
# Per row the largest score and the inverse of the sum, in one tensor; and the output in float32, empty if it is that already.
saved = 2


def is_for(device_type: str) -> bool:
    """The kernels take tensors on the CPU."""
    return device_type == "cpu"


# The largest weights are saved in order while the scores go by: too many, and keeping them costs more than sorting.
_MOST = 64


def refuse(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """Why it cannot serve a problem; None if it can."""
    q, k, v = tensors[:3]
    if extension.missing:
        return extension.missing
    if q.device.type != "cpu":
        return f"the tensors are on {q.device.type}"
    if not isinstance(plan.score, Product | Additive):
        return f"it has no score but the dot product and the additive one, and {type(plan.score).__name__} is neither"
    if not isinstance(plan.normalizer, tuple(NORMALIZERS)):
        return f"it has none of the normalizers in Python, and {type(plan.normalizer).__name__} is one"
    if q.dtype not in DTYPES or k.dtype not in DTYPES or v.dtype not in DTYPES:
        return "it computes in float32, and float64 was given"
    if not (q.numel() and k.numel() and v.numel()):
        return "an axis has size zero"
    if plan.nonfinite_q is not None and not torch.compiler.is_compiling():
        # A compiled graph cannot know: there it is found out at every call, and `tiled` computes it.
        return "queries, keys or values hold NaN or inf, under a mask"
    if plan.bias is not None and not isinstance(plan.bias, TensorBias | ALiBi | T5):
        return f"it has no bias but a tensor, ALiBi and T5, and {type(plan.bias).__name__} is none"
    if not can_encode(plan.mask):
        return "it has no masks in Python"
    if plan.summary.top > _MOST:
        return f"it gives no more than the {_MOST} largest weights"
    return None


def forward(plan: Plan, tensors: Sequence[Tensor], is_last: bool = False) -> tuple[Tensor, ...]:
    """All outputs of a problem, in the order of `Plan.outputs`, and the extras: empty where this is the `last` pass, with
    no backward pass to follow.
    """
    if any_flagged(plan, tensors):
        outputs = tiled.forward(plan, tensors)
        return *outputs, *empty_saved(sizes(*tensors[:2]), tensors[0].new_empty(0, dtype=torch.float32), tensors[2])
    packed, arguments = pack(plan, tensors)
    member = packed.member and packed.member(tensors)
    needs_grad = packed.wanted + (IS_LAST if is_last else 0)
    out, stats, *rest = extension.ops.forward_told.default(
        *arguments, plan.summary.top, member, packed.rows, needs_grad
    )
    # Where there is none it is empty, as `stats` are of the last pass: to make a tensor takes a microsecond.
    exact = rest.pop(0) if out.dtype != torch.float32 else stats if is_last else out.new_empty(0)
    return out, *[rest[place] for place in packed.places], stats, exact


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
    packed, arguments = pack(plan, tensors)
    dout, *others = gradients
    given = {name: g for name, g in zip(packed.names, others, strict=True) if g is not None and name != "top_keys"}
    # The log-sum-exp of the scores is no part of what else than a softmax tells of them.
    dlse = given.pop("lse", None) if isinstance(plan.normalizer, Softmax) else None
    if given or (dout is None and dlse is None) or any_flagged(plan, tensors):
        return tiled.backward(plan, tensors, (), gradients, needs_grad)
    out, stats, exact = saved
    dout = torch.zeros_like(out) if dout is None else dout
    needed = needed_grads(plan, tuple(needs_grad))
    found = extension.ops.backward_told.default(
        exact if exact.numel() else out, contiguous_rows(dout), stats, None if dlse is None else dlse.contiguous(), *arguments,
        needed.bits,
    )  # fmt: skip
    results: list[Tensor | None] = [None] * len(tensors)
    results[:3] = [g if want else None for g, want in zip(found, needs_grad[:3], strict=False)]
    if len(tensors) == 3:
        return tuple(results)
    rest = iter(found[3:])
    for index in needed.added:
        results[index] = next(rest).to(tensors[index].dtype)
    if needed.relative:
        for index, gradient in through_table(plan, tensors, next(rest), needed.relative):
            results[index] = gradient
    if needed.normalizer is not None:
        per_head, like = next(rest).sum((0, 2)), tensors[needed.normalizer]
        results[needed.normalizer] = (per_head if like.dim() else per_head.sum()).to(like.dtype)
    if needed.weight is not None:
        per_head, like = next(rest), tensors[needed.weight]
        results[needed.weight] = (per_head if like.dim() == 2 else per_head.sum(0)).to(like.dtype)
    return tuple(results)
