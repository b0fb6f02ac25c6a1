"""The native CPU backend: which problems it supports, and its forward and backward pass. The kernels are in csrc/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regard.backends import machine
from regard.backends.backend import Supported
from regard.backends.cpu import extension
from regard.backends.cpu.encode_mask import MASKS
from regard.backends.cpu.pack import DTYPES, NORMALIZERS, contiguous_rows, needed_grads, pack
from regard.backends.relative import TensorOrRelative, refuse_bias, through_table
from regard.backends.tiled import backend as tiled
from regard.components.component import Slot
from regard.components.normalizer import Entmax, Softmax
from regard.components.score import Additive, Product
from regard.components.summary import Summary
from regard.components.tile import Sizes
from regard.plan.cache import by_identity
from regard.plan.nonfinite import any_flagged
from regard.plan.problem import Plan, sizes
from regard.tracing import has_values

# See `Backend`.
about = "native CPU kernels, in linear memory"
is_automatic = True
is_fastest_for: frozenset[torch.dtype] = frozenset()
masks_nonfinite = False
supported = Supported(
    scores={Product, Additive},
    normalizers=NORMALIZERS,
    masks=MASKS,
    biases=TensorOrRelative(),
    statistics=set(extension.STATISTICS.values()),
)
is_differentiable = False
has_all_derivatives = False
is_dispatched = True
# The maximum score and the inverse sum of each row, in one tensor; and the output in float32, empty if it already is.
saved = 2


def is_for(device_type: str) -> bool:
    """Return whether the backend runs on a type of device: the CPU."""
    return device_type == "cpu"


_IS_LAST = extension.request((), is_last=True)
# Top-k weights are kept by insertion; for a larger k, sorting is faster.
_MAX_TOP = 64


def refuse(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """Return why the backend does not support a problem; None if it does."""
    q, k, v = tensors[:3]
    if extension.missing:
        return extension.missing
    if q.device.type != "cpu":
        return f"the tensors are on {q.device.type}"
    if q.dtype not in DTYPES or k.dtype not in DTYPES or v.dtype not in DTYPES:
        return "it computes in float32, and the tensors are float64"
    if not (q.numel() and k.numel() and v.numel()):
        return "an axis has size zero"
    if plan.nonfinite_q is not None and has_values(q, k, v):
        # Where values are unknown, each call checks them, and `tiled` computes the nonfinite case.
        return "queries, keys or values contain NaN or inf, under a mask"
    if reason := refuse_bias(plan, tensors):
        return reason
    if isinstance(plan.normalizer, Entmax) and (isinstance(plan.normalizer.alpha, Slot) or plan.normalizer.alpha > 2.0):
        return "it supports entmax with one number alpha <= 2"
    if plan.summary.top > _MAX_TOP:
        return f"it returns at most the {_MAX_TOP} largest weights"
    return None


def forward(plan: Plan, tensors: Sequence[Tensor], is_last: bool = False) -> tuple[Tensor, ...]:
    """Compute all outputs of a problem, in the order of `Plan.outputs`, followed by the saved tensors.

    The saved tensors are empty if no backward pass follows (`is_last`).
    """
    if any_flagged(plan, tensors):
        outputs = tiled.forward(plan, tensors)
        return *outputs, *empty_saved(sizes(*tensors[:2]), tensors[0].new_empty(0, dtype=torch.float32), tensors[2])
    packed, arguments = pack(plan, tensors)
    member = packed.member and packed.member(tensors)
    requested = packed.requested + (_IS_LAST if is_last else 0)
    out, stats, *rest = extension.ops.forward.default(*arguments, plan.summary.top, member, packed.rows, requested)
    # Reuse the empty `stats` as the empty `exact`: creating a tensor takes a microsecond.
    exact = rest.pop(0) if out.dtype != torch.float32 else stats if is_last else out.new_empty(0)
    return out, *[rest[index] for index in packed.order], stats, exact


def plain(q: Tensor, k: Tensor, v: Tensor, summary: Summary | None) -> Sequence[Tensor] | None:
    """Return the outputs of a call with q, k, v and a summary alone; None where one operator does not serve it."""
    if extension.missing or not (q.is_cpu and k.is_cpu and v.is_cpu):
        return None
    if q.dtype != torch.float32 and (not q.is_floating_point() or (machine.HAS_MATRIX_UNITS and summary is None)):
        return None
    if summary is not None and (type(summary) is not Summary or summary.mass is not None or summary.other):
        return None
    request = _OUTPUT_ONLY if summary is None else _plain_request(summary)
    if request is None:
        return None
    try:
        outputs: list[Tensor] = extension.ops.plain.default(q, k, v, request.top, request.bits)
    except NotImplementedError:  # a sparse tensor, or one on another device: the checks of a call raise
        return None
    return [outputs[index] for index in request.order] if outputs else None


class PlainRequest(NamedTuple):
    """A summary as arguments of the operator `plain`, and the indices of the output and the statistics in its results."""

    top: int
    bits: int
    order: tuple[int, ...]


_OUTPUT_ONLY = PlainRequest(0, 0, (0,))
_ANY_SIZES = Sizes(1, 1, 1, 1, 1)


@by_identity
def _plain_request(summary: Summary) -> PlainRequest | None:
    """Return the request of a valid summary of statistics without arguments but `top`; None for others."""
    try:
        summary.check(_ANY_SIZES)
    except (TypeError, ValueError):  # the checks of a call raise
        return None
    if summary.depends_on_lengths or summary.top > _MAX_TOP:
        return None
    names = summary.outputs
    returned = [name for name in extension.STATISTICS if name in names]
    order = (0, *[1 + returned.index(name) for name in names])
    return PlainRequest(summary.top, extension.request(names, is_last=False), order)


def are_finite(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return True if q, k and v contain neither NaN nor inf; False if they do, or if it cannot be checked cheaply."""
    return not extension.missing and q.is_cpu and bool(extension.ops.finite.default(q, k, v))


def empty_saved(size: Sizes, like: Tensor, v: Tensor) -> list[Tensor]:
    """Return uninitialized tensors with the shapes and dtypes of the saved tensors; `like` is float32."""
    rows = (size.B, size.H, size.L)
    return [like.new_empty(2, *rows), like.new_empty((*rows, v.shape[-1]) if v.dtype != torch.float32 else 0)]


def backward(
    plan: Plan,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tensors selected by `needs_grad`, from those of the outputs (None = zero)."""
    given = plan.named(gradients)
    dout = given.pop("out", None)
    # Only softmax has an LSE gradient here; `tiled` computes the others.
    dlse = given.pop("lse", None) if isinstance(plan.normalizer, Softmax) else None
    if given or (dout is None and dlse is None) or any_flagged(plan, tensors):
        return tiled.backward(plan, tensors, (), gradients, needs_grad)
    arguments = pack(plan, tensors)[1]
    out, stats, exact = saved
    dout = torch.zeros_like(out) if dout is None else dout
    needed = needed_grads(plan, tuple(needs_grad))
    dlse = None if dlse is None else dlse.contiguous()
    out = exact if exact.numel() else out
    grads = extension.ops.backward.default(out, contiguous_rows(dout), stats, dlse, *arguments, needed.bits)
    results: list[Tensor | None] = [None] * len(tensors)
    results[:3] = [g if is_needed else None for g, is_needed in zip(grads, needs_grad[:3], strict=False)]
    if len(tensors) == 3:
        return tuple(results)
    rest = iter(grads[3:])
    for index in needed.biases:
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
