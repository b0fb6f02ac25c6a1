"""Packed arguments: a plan and its tensors in the form that the native operators take."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.backends.cpu import extension
from regard.backends.cpu.encode_mask import Maker, encode_mask
from regard.backends.relative import relative_table
from regard.components.component import Slot
from regard.components.normalizer import Entmax, Normalizer, Sigmoid, Softmax, Sparsemax
from regard.components.position import Bias, TensorBias
from regard.components.score import Additive, Product
from regard.plan import cache
from regard.plan.problem import Plan, sizes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackedArgs(NamedTuple):
    """The arguments of the operators that depend only on a plan and on the width of q and k."""

    # Of weight, key_bias, query_bias, bias, relative and sink those that are present, then those of the mask.
    tensors: list[Maker]
    present_mask: int  # one bit for each of the six
    integers: list[int]  # the integer and float arguments, the origin, and the nodes of the mask
    packed: Tensor  # the same as a tensor
    member: Maker | None
    rows: list[int]
    requested: int  # the bits of the requested statistics
    names: tuple[str, ...]  # of all outputs but the first
    order: tuple[int, ...]  # the indices of these outputs in the results of the operator


# Cached: for short sequences, packing would take longer than the kernel. Plans hold no tensors. Of the shapes only the width
# counts, so that decoding with a growing cache packs once.
@cache.derived
def _packed_args(plan: Plan, width: int, allow_bf16_dot: bool) -> PackedArgs:
    score, normalizer, bias, summary = plan.score, plan.normalizer, plan.bias, plan.summary
    weight = key_bias = query_bias = dense_bias = relative = sink = None
    scale = 1.0
    if isinstance(score, Additive):
        weight = _maker(_floats, score.v)
    elif isinstance(score, Product):
        key_bias, query_bias = _maker(_floats, score.key_bias), _maker(_floats, score.query_bias)
        scale = width**-0.5 if score.scale is None else score.scale
    if isinstance(bias, TensorBias):
        dense_bias = _maker(_supported_dtype, bias.tensor)
    elif bias is not None:
        relative = partial(_relative, bias)
    sink_or_bias = _sink_or_bias(normalizer)
    if sink_or_bias is not None and (isinstance(sink_or_bias, Slot) or sink_or_bias or isinstance(normalizer, Softmax)):
        sink = partial(_per_head, sink_or_bias)
    optional = (weight, key_bias, query_bias, dense_bias, relative, sink)
    nodes: list[int] = []
    masks: list[Maker] = []
    if plan.mask is not None:
        encode_mask(plan.mask, nodes, masks)
    alpha = normalizer.alpha if isinstance(normalizer, Entmax) else 2.0
    floats = struct.pack("4d", scale, plan.softcap or 0.0, alpha, plan.dropout)
    integers = [
        _KINDS[NORMALIZERS[type(normalizer)]],
        int(allow_bf16_dot),
        *struct.unpack("4q", floats),
        *plan.origin,
        *nodes,
    ]
    with torch._C._DisableTorchDispatch():  # a tensor with values, even if the tensors of this call are fake
        packed = torch.tensor(integers, device="cpu")
    names = summary.outputs
    returned = [name for name in extension.STATISTICS if name in names]
    return PackedArgs(
        [*[make for make in optional if make is not None], *masks],
        sum(1 << i for i, make in enumerate(optional) if make is not None), integers, packed,
        _maker(_groups, summary.mass), list(summary.row_numbers),
        extension.request(names, is_last=False), names, tuple(returned.index(name) for name in names),
    )  # fmt: skip


def pack(plan: Plan, tensors: Sequence[Tensor]) -> tuple[PackedArgs, tuple[Any, ...]]:
    """Return the packed arguments, and the arguments of the operators from q to seed, in order."""
    # Weights rounded to bfloat16 are precise enough for the gradients of q, k and v, but not for those of parameters.
    allow_bf16_dot = len(tensors) == 3 or not any(x.is_floating_point() for x in tensors[3:])
    q, k, v = tensors[:3]
    args = _packed_args(plan, int(q.shape[-1]), allow_bf16_dot)
    return args, (
        contiguous_rows(q), contiguous_rows(k), contiguous_rows(v),
        [make(tensors) for make in args.tensors], args.present_mask,
        # Subclasses, such as fake tensors, must not be mixed with a cached tensor.
        args.packed if type(q) in (Tensor, torch.nn.Parameter) else torch.tensor(args.integers, device="cpu"),
        int(tensors[plan.seed.index]) if plan.dropout else 0,
    )  # fmt: skip


# The name of each normalizer in csrc/problem.h; sparsemax is entmax of order 2.
NORMALIZERS: dict[type[Normalizer], str] = {
    Softmax: "Softmax", Sigmoid: "Sigmoid", Entmax: "Entmax", Sparsemax: "Entmax",
}  # fmt: skip
_KINDS = {name: kind for kind, name in enumerate(extension.names("normalizers"))}


def _sink_or_bias(normalizer: Normalizer) -> Any:
    """Return the sink of a softmax or the bias of a sigmoid; None for other normalizers."""
    if isinstance(normalizer, Softmax):
        return normalizer.sink
    return normalizer.bias if isinstance(normalizer, Sigmoid) else None


def contiguous_rows(x: Tensor) -> Tensor:
    """Return the tensor with its last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _maker(convert: Callable[[Tensor], Tensor], slot: Any) -> Maker | None:
    """Return a function that converts the tensor of a slot; None if the slot is empty."""
    return None if slot is None else lambda tensors: convert(tensors[slot.index].detach())


def _floats(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _supported_dtype(x: Tensor) -> Tensor:
    return x if x.dtype in DTYPES else x.float()


def _groups(member: Tensor) -> Tensor:
    return member if member.dim() == 3 else member[None]


def _relative(bias: Bias, tensors: Sequence[Tensor]) -> Tensor:
    return relative_table(bias, sizes(*tensors[:2]), torch.float32, tensors)


def _per_head(value: float | Slot, tensors: Sequence[Tensor]) -> Tensor:
    heads = tensors[0].shape[1]
    if isinstance(value, Slot):
        return tensors[value.index].detach().float().expand(heads).contiguous()
    return torch.full((heads,), value, dtype=torch.float32)


class NeededGrads(NamedTuple):
    """The indices of the parameter tensors that need gradients, and the bits that request all gradients."""

    biases: list[int]
    relative: list[int]
    normalizer: int | None
    weight: int | None
    bits: int


@cache.derived
def needed_grads(plan: Plan, needs_grad: tuple[bool, ...]) -> NeededGrads:
    """Return which gradients the backward operator has to compute."""

    def index(slot: Any) -> int | None:
        return slot.index if isinstance(slot, Slot) and needs_grad[slot.index] else None

    score, bias = plan.score, plan.bias
    dot = score if isinstance(score, Product) else Product()
    biases = [index(dot.key_bias), index(dot.query_bias), index(bias.tensor) if isinstance(bias, TensorBias) else None]
    parts = [] if bias is None or isinstance(bias, TensorBias) else [index(part) for part in vars(bias).values()]
    relative = [part for part in parts if part is not None]
    normalizer, weight = index(_sink_or_bias(plan.normalizer)), index(score.v) if isinstance(score, Additive) else None
    bits = [*needs_grad[:3], *[part is not None for part in (*biases, relative or None, normalizer, weight)]]
    requested = sum(bit << i for i, bit in enumerate(bits))
    return NeededGrads([part for part in biases if part is not None], relative, normalizer, weight, requested)
