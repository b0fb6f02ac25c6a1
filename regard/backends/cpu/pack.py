"""Packed arguments: a plan and its tensors as the native operators take them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.backends.cpu.encode_mask import Maker, Shapes, encode_mask
from regard.backends.relative import relative_table
from regard.components.component import Slot
from regard.components.normalizer import Entmax, Normalizer, Sigmoid, Softmax, Sparsemax
from regard.components.position import TensorBias
from regard.components.score import Additive, Product
from regard.components.tile import Sizes
from regard.plan import cache
from regard.plan.problem import Plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the forward pass gives beside its output, in its order, and the bits that ask for it. What has none is asked for by a
# number, or by what it is to be of.
_BITS = {
    "lse": 1, "max": 2, "entropy": 4, "top_weights": 0, "top_keys": 0, "received": 16, "full": 32, "rows": 0, "mass": 0,
}  # fmt: skip
# The bit that says that no backward pass follows.
IS_LAST = 8


class PackedArgs(NamedTuple):
    """The arguments of the operators that depend on a plan and on shapes only."""

    # Those there are of weight, key_bias, query_bias, bias, relative and sink, then those of the mask.
    tensors: list[Maker]
    there: int  # a bit for each of the six
    whole: list[int]  # what is told in numbers, and the same in a tensor
    numbers: Tensor
    member: Maker | None
    rows: list[int]
    wanted: int
    names: tuple[str, ...]  # of all outputs but the first
    places: tuple[int, ...]  # of the same in what the operator gives


# For a short sequence, to find out anew what a plan says would take longer than to compute it. Plans hold no tensors.
@cache.derived
def _packed_args(plan: Plan, shapes: Shapes, pairs: bool) -> PackedArgs:
    score, normalizer, bias, summary = plan.score, plan.normalizer, plan.bias, plan.summary
    (B, H, L, D), (_, G, S, _) = shapes[:2]
    size = Sizes(B, H, G, L, S)
    weight = key_bias = query_bias = added = relative = sink = None
    scale = 1.0
    if isinstance(score, Additive):
        weight = _made(_floats, score.v)
    elif isinstance(score, Product):
        key_bias, query_bias = _made(_floats, score.key_bias), _made(_floats, score.query_bias)
        scale = D**-0.5 if score.scale is None else score.scale
    if isinstance(bias, TensorBias):
        added = _made(_known_type, bias.tensor)
    elif bias is not None:
        relative = partial(relative_table, bias, size, torch.float32)
    number = _number(normalizer)
    if number is not None and (isinstance(number, Slot) or number or isinstance(normalizer, Softmax)):
        sink = partial(_per_head, number, H)
    words = (weight, key_bias, query_bias, added, relative, sink)
    nodes: list[int] = []
    masks: list[Maker] = []
    if plan.mask is not None:
        encode_mask(plan.mask, size, shapes, nodes, masks)
    alpha = normalizer.alpha if isinstance(normalizer, Entmax) else 2.0
    reals = struct.pack("4d", scale, plan.softcap or 0.0, alpha, plan.dropout)
    whole = [_kind(normalizer), int(pairs), *struct.unpack("4q", reals), *nodes]
    with torch._C._DisableTorchDispatch():  # a tensor with numbers, whatever is made of those of this call
        numbers = torch.tensor(whole, device="cpu")
    names = plan.outputs[1:]
    given = [name for name in _BITS if name in names]
    return PackedArgs(
        [*[word for word in words if word is not None], *masks],
        sum(1 << i for i, word in enumerate(words) if word is not None), whole, numbers,
        _made(_groups, summary.mass), [row % L for row in summary.row_numbers],
        sum(_BITS[name] for name in given), names, tuple(given.index(name) for name in names),
    )  # fmt: skip


def pack(plan: Plan, tensors: Sequence[Tensor]) -> tuple[PackedArgs, tuple[Any, ...]]:
    """What the operators take between q and what is asked for, in their order."""
    # Rounded to bfloat16, weights would do for the gradients of q, k and v, but not for those of parameters.
    pairs = len(tensors) == 3 or not any(x.is_floating_point() for x in tensors[3:])
    shapes: Shapes = tuple([x.shape for x in tensors])
    if torch._C._is_tracing():  # by torch.jit: sizes are tensors
        shapes = tuple(tuple(int(n) for n in shape) for shape in shapes)
    told = _packed_args(plan, shapes, pairs)
    q, k, v = tensors[:3]
    return told, (
        contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), [make(tensors) for make in told.tensors], told.there,
        # Tensors of other classes, such as those without numbers, go together with none that were made before.
        told.numbers if type(q) in (Tensor, torch.nn.Parameter) else torch.tensor(told.whole, device="cpu"),
        int(tensors[plan.seed.index]) if plan.dropout else 0,
    )  # fmt: skip


# In the order of `Normalizer` in csrc/problem.h; sparsemax is the entmax of order 2.
NORMALIZERS: dict[type[Normalizer], int] = {Softmax: 0, Sigmoid: 1, Entmax: 2, Sparsemax: 2}


def _kind(normalizer: Normalizer) -> int:
    return next(kind for word, kind in NORMALIZERS.items() if isinstance(normalizer, word))


def _number(normalizer: Normalizer) -> Any:
    """The sink of a softmax, the bias of a sigmoid."""
    if isinstance(normalizer, Softmax):
        return normalizer.sink
    return normalizer.bias if isinstance(normalizer, Sigmoid) else None


def contiguous_rows(x: Tensor) -> Tensor:
    """The tensor with its last axis contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _made(how: Callable[[Tensor], Tensor], slot: Any) -> Maker | None:
    """A tensor of a word, as the operators take it; None where there is none."""
    return None if slot is None else lambda tensors: how(tensors[slot.index].detach())


def _floats(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _known_type(x: Tensor) -> Tensor:
    return x if x.dtype in DTYPES else x.float()


def _groups(member: Tensor) -> Tensor:
    return member if member.dim() == 3 else member[None]


def _per_head(number: float | Slot, heads: int, tensors: Sequence[Tensor]) -> Tensor:
    if isinstance(number, Slot):
        return tensors[number.index].detach().float().expand(heads).contiguous()
    return torch.full((heads,), number, dtype=torch.float32)


class NeededGrads(NamedTuple):
    """The indices of the words' tensors whose gradients are wanted, and the bits that ask for all gradients."""

    added: list[int]
    relative: list[int]
    normalizer: int | None
    weight: int | None
    bits: int


@cache.derived
def needed_grads(plan: Plan, wanted: tuple[bool, ...]) -> NeededGrads:
    def index(slot: Any) -> int | None:
        return slot.index if isinstance(slot, Slot) and wanted[slot.index] else None

    score, bias = plan.score, plan.bias
    dot = score if isinstance(score, Product) else Product()
    added = [index(dot.key_bias), index(dot.query_bias), index(bias.tensor) if isinstance(bias, TensorBias) else None]
    parts = [] if bias is None or isinstance(bias, TensorBias) else [index(part) for part in vars(bias).values()]
    relative = [part for part in parts if part is not None]
    normalizer, weight = index(_number(plan.normalizer)), index(score.v) if isinstance(score, Additive) else None
    bits = [*wanted[:3], *[part is not None for part in (*added, relative or None, normalizer, weight)]]
    asked = sum(bit << i for i, bit in enumerate(bits))
    return NeededGrads([part for part in added if part is not None], relative, normalizer, weight, asked)
