"""The native CPU kernels: what they serve, and how a plan is told to them. The kernels themselves stand in csrc/."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.kernels import native, tiled
from regard.kernels.relative import relative_table, through_table
from regard.mask import And, Band, Before, Blocks, Dense, Documents, Mask, Not, Or
from regard.normalizer import Entmax, Normalizer, Sigmoid, Softmax, Sparsemax
from regard.position import T5, Added, ALiBi
from regard.problem import Plan, sizes
from regard.score import Additive, Product
from regard.tile import Sizes
from regard.word import Slot

# Forward gives, beside its outputs, the largest score of each row and the inverse of its sum, in one tensor, and the output
# in full precision (empty where it is so anyhow): backward takes them.
EXTRAS = 2

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the forward pass gives beside its output, in its order, and the bits that ask for it. What has none is asked for by a
# number, or by what it is to be of.
_BITS = {
    "lse": 1, "max": 2, "entropy": 4, "top_weights": 0, "top_keys": 0, "received": 16, "full": 32, "rows": 0, "mass": 0,
}  # fmt: skip
# The bit that says that no backward pass follows.
_LAST = 8
# How many plans are remembered, with what they come to.
_REMEMBERED = 1024
# The largest weights are kept in order while the scores go by: too many, and keeping them costs more than sorting.
_MOST = 64


def refuse(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """Why it cannot serve a problem; None if it can."""
    q, k, v = tensors[:3]
    if native.missing:
        return native.missing
    if q.device.type != "cpu":
        return f"the tensors are on {q.device.type}"
    if not isinstance(plan.score, Product | Additive):
        return f"it has no score but the dot product and the additive one, and {type(plan.score).__name__} is neither"
    if not isinstance(plan.normalizer, tuple(_NORMALIZERS)):
        return f"it has none of the normalizers in Python, and {type(plan.normalizer).__name__} is one"
    if q.dtype not in _DTYPES or k.dtype not in _DTYPES or v.dtype not in _DTYPES:
        return "it computes in float32, and float64 was given"
    if not (q.numel() and k.numel() and v.numel()):
        return "an axis has size zero"
    if plan.bad_q is not None and not torch.compiler.is_compiling():
        # A compiled graph cannot know: there it is found out at every call, and `tiled` computes it.
        return "queries, keys or values hold NaN or inf, under a mask"
    if plan.bias is not None and not isinstance(plan.bias, Added | ALiBi | T5):
        return f"it has no bias but a tensor, ALiBi and T5, and {type(plan.bias).__name__} is none"
    if not _is_known(plan.mask):
        return "it has no masks in Python"
    if plan.summary.top > _MOST:
        return f"it gives no more than the {_MOST} largest weights"
    return None


def _is_known(mask: Mask | None) -> bool:
    """Is every part of a mask one that has arithmetic of its own?"""
    if isinstance(mask, And | Or):
        return _is_known(mask.left) and _is_known(mask.right)
    return _is_known(mask.inner) if isinstance(mask, Not) else mask is None or type(mask) in _NODES


def forward(plan: Plan, tensors: Sequence[Tensor], last: bool = False) -> tuple[Tensor, ...]:
    """All outputs of a problem, in the order of `Plan.outputs`, and the extras: empty where this is the `last` pass, with
    no backward pass to follow.
    """
    if _has_nonfinite(plan, tensors):
        outputs = tiled.forward(plan, tensors)
        return *outputs, *empty_extras(sizes(*tensors[:2]), tensors[0].new_empty(0, dtype=torch.float32), tensors[2])
    told, words = _words(plan, tensors)
    member = told.member and told.member(tensors)
    wanted = told.wanted + (_LAST if last else 0)
    out, stats, *rest = native.ops.forward_told.default(*words, plan.summary.top, member, told.rows, wanted)
    # Where there is none it is empty, as `stats` are of the last pass: to make a tensor takes a microsecond.
    exact = rest.pop(0) if out.dtype != torch.float32 else stats if last else out.new_empty(0)
    return out, *[rest[place] for place in told.places], stats, exact


def _has_nonfinite(plan: Plan, tensors: Sequence[Tensor]) -> bool:
    if plan.bad_q is None:
        return False
    return any(bool(tensors[slot.index].any()) for slot in (plan.bad_q, plan.bad_k))


def empty_extras(size: Sizes, like: Tensor, v: Tensor) -> list[Tensor]:
    """Tensors like the extras, with nothing in them; `like` is float32."""
    rows = (size.B, size.H, size.L)
    return [like.new_empty(2, *rows), like.new_empty((*rows, v.shape[-1]) if v.dtype != torch.float32 else 0)]


def backward(
    plan: Plan,
    tensors: Sequence[Tensor],
    kept: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors that are `wanted`, from those of the outputs (None = zero)."""
    told, words = _words(plan, tensors)
    dout, *others = gradients
    given = {name: g for name, g in zip(told.names, others, strict=True) if g is not None and name != "top_keys"}
    # The log-sum-exp of the scores is no part of what else than a softmax tells of them.
    dlse = given.pop("lse", None) if isinstance(plan.normalizer, Softmax) else None
    if given or (dout is None and dlse is None) or _has_nonfinite(plan, tensors):
        return tiled.backward(plan, tensors, (), gradients, wanted)
    out, stats, exact = kept
    dout = torch.zeros_like(out) if dout is None else dout
    needed = _needed(plan, tuple(wanted))
    found = native.ops.backward_told.default(
        exact if exact.numel() else out, _rows(dout), stats, None if dlse is None else dlse.contiguous(), *words,
        needed.bits,
    )  # fmt: skip
    results: list[Tensor | None] = [None] * len(tensors)
    results[:3] = [g if want else None for g, want in zip(found, wanted[:3], strict=False)]
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


class _Needed(NamedTuple):
    """The indices of the words' tensors whose gradients are wanted, and the bits that ask for all gradients."""

    added: list[int]
    relative: list[int]
    normalizer: int | None
    weight: int | None
    bits: int


@lru_cache(_REMEMBERED)
def _needed(plan: Plan, wanted: tuple[bool, ...]) -> _Needed:
    def index(slot: Any) -> int | None:
        return slot.index if isinstance(slot, Slot) and wanted[slot.index] else None

    score, bias = plan.score, plan.bias
    dot = score if isinstance(score, Product) else Product()
    added = [index(dot.key_bias), index(dot.query_bias), index(bias.tensor) if isinstance(bias, Added) else None]
    parts = [] if bias is None or isinstance(bias, Added) else [index(part) for part in vars(bias).values()]
    relative = [part for part in parts if part is not None]
    normalizer, weight = index(_number(plan.normalizer)), index(score.v) if isinstance(score, Additive) else None
    bits = [*wanted[:3], *[part is not None for part in (*added, relative or None, normalizer, weight)]]
    asked = sum(bit << i for i, bit in enumerate(bits))
    return _Needed([part for part in added if part is not None], relative, normalizer, weight, asked)


_Shapes = tuple[tuple[int, ...], ...]
# Of the tensors of a call, what an operator takes.
_Make = Callable[[Sequence[Tensor]], Tensor]


class _Told(NamedTuple):
    """What the operators are told of a plan, whatever numbers its tensors hold."""

    # Those there are of weight, key_bias, query_bias, bias, relative and sink, then those of the mask.
    tensors: list[_Make]
    there: int  # a bit for each of the six
    whole: list[int]  # what is told in numbers, and the same in a tensor
    numbers: Tensor
    member: _Make | None
    rows: list[int]
    wanted: int
    names: tuple[str, ...]  # of all outputs but the first
    places: tuple[int, ...]  # of the same in what the operator gives


# For a short sequence, to find out anew what a plan says would take longer than to compute it. Plans hold no tensors.
@lru_cache(_REMEMBERED)
def _told(plan: Plan, shapes: _Shapes, pairs: bool) -> _Told:
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
    if isinstance(bias, Added):
        added = _made(_known_type, bias.tensor)
    elif bias is not None:
        relative = partial(relative_table, bias, size, torch.float32)
    number = _number(normalizer)
    if number is not None and (isinstance(number, Slot) or number or isinstance(normalizer, Softmax)):
        sink = partial(_per_head, number, H)
    words = (weight, key_bias, query_bias, added, relative, sink)
    nodes: list[int] = []
    masks: list[_Make] = []
    if plan.mask is not None:
        _lay(plan.mask, size, shapes, nodes, masks)
    alpha = normalizer.alpha if isinstance(normalizer, Entmax) else 2.0
    reals = struct.pack("4d", scale, plan.softcap or 0.0, alpha, plan.dropout)
    whole = [_kind(normalizer), int(pairs), *struct.unpack("4q", reals), *nodes]
    with torch._C._DisableTorchDispatch():  # a tensor with numbers, whatever is made of those of this call
        numbers = torch.tensor(whole, device="cpu")
    names = plan.outputs[1:]
    given = [name for name in _BITS if name in names]
    return _Told(
        [*[word for word in words if word is not None], *masks],
        sum(1 << i for i, word in enumerate(words) if word is not None), whole, numbers,
        _made(_groups, summary.mass), [row % L for row in summary.row_numbers],
        sum(_BITS[name] for name in given), names, tuple(given.index(name) for name in names),
    )  # fmt: skip


def _words(plan: Plan, tensors: Sequence[Tensor]) -> tuple[_Told, tuple[Any, ...]]:
    """What the operators take between q and what is asked for, in their order."""
    # Rounded to bfloat16, weights would do for the gradients of q, k and v, but not for those of parameters.
    pairs = len(tensors) == 3 or not any(x.is_floating_point() for x in tensors[3:])
    shapes: _Shapes = tuple([x.shape for x in tensors])
    if torch._C._is_tracing():  # by torch.jit: sizes are tensors
        shapes = tuple(tuple(int(n) for n in shape) for shape in shapes)
    told = _told(plan, shapes, pairs)
    q, k, v = tensors[:3]
    return told, (
        _rows(q), _rows(k), _rows(v), [make(tensors) for make in told.tensors], told.there,
        # Tensors of other classes, such as those without numbers, go together with none that were made before.
        told.numbers if type(q) in (Tensor, torch.nn.Parameter) else torch.tensor(told.whole, device="cpu"),
        int(tensors[plan.seed.index]) if plan.dropout else 0,
    )  # fmt: skip


# In the order of `Normalizer` in csrc/problem.h; sparsemax is the entmax of order 2.
_NORMALIZERS: dict[type[Normalizer], int] = {Softmax: 0, Sigmoid: 1, Entmax: 2, Sparsemax: 2}


def _kind(normalizer: Normalizer) -> int:
    return next(kind for word, kind in _NORMALIZERS.items() if isinstance(normalizer, word))


def _number(normalizer: Normalizer) -> Any:
    """The sink of a softmax, the bias of a sigmoid."""
    if isinstance(normalizer, Softmax):
        return normalizer.sink
    return normalizer.bias if isinstance(normalizer, Sigmoid) else None


def _rows(x: Tensor) -> Tensor:
    """The tensor with its last axis contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _made(how: Callable[[Tensor], Tensor], slot: Any) -> _Make | None:
    """A tensor of a word, as the operators take it; None where there is none."""
    return None if slot is None else lambda tensors: how(tensors[slot.index].detach())


def _floats(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _known_type(x: Tensor) -> Tensor:
    return x if x.dtype in _DTYPES else x.float()


def _groups(member: Tensor) -> Tensor:
    return member if member.dim() == 3 else member[None]


def _per_head(number: float | Slot, heads: int, tensors: Sequence[Tensor]) -> Tensor:
    if isinstance(number, Slot):
        return tensors[number.index].detach().float().expand(heads).contiguous()
    return torch.full((heads,), number, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Masks as nodes of eight numbers: kind, three parameters, the nodes inside (two), and the places of tensors (two).

_FAR = 1 << 40


def _lay(mask: Mask, size: Sizes, shapes: _Shapes, nodes: list[int], tensors: list[_Make]) -> int:
    """Append a mask to `nodes` and what makes its tensors to `tensors`; give the number of its node."""
    parameters, inside, places = _NODES[type(mask)](mask, size, shapes, nodes, tensors)
    kind = list(_NODES).index(type(mask))
    nodes += [kind, *parameters, *inside, *places]
    return len(nodes) // 8 - 1


_Node = tuple[tuple[int, int, int], tuple[int, int], tuple[int, int]]


def _band(mask: Band, size: Sizes, shapes: _Shapes, nodes: list[int], tensors: list[_Make]) -> _Node:
    left, right = (_FAR if n is None else n for n in (mask.left, mask.right))
    return (size.offset(mask.align), min(left, _FAR), min(right, _FAR)), (0, 0), (-1, -1)


def _before(mask: Before, size: Sizes, shapes: _Shapes, nodes: list[int], tensors: list[_Make]) -> _Node:
    return (0, 0, 0), (0, 0), (-1, _place(lambda n: n.reshape(-1, 1).long(), mask.n, tensors))


def _documents(mask: Documents, size: Sizes, shapes: _Shapes, nodes: list[int], tensors: list[_Make]) -> _Node:
    queries, keys = (_place(lambda ids: ids.long().contiguous(), ids, tensors) for ids in (mask.queries, mask.keys))
    return (0, 0, 0), (0, 0), (queries, keys)


def _blocks(mask: Blocks, size: Sizes, shapes: _Shapes, nodes: list[int], tensors: list[_Make]) -> _Node:
    table: Any = mask.table
    like = Blocks(torch.empty(shapes[table.index], device="meta"), mask.rows, mask.columns)
    return (0, *like.size(size)), (0, 0), (_place(_as_it_is, table, tensors), -1)


def _dense(mask: Dense, size: Sizes, shapes: _Shapes, nodes: list[int], tensors: list[_Make]) -> _Node:
    return (0, 0, 0), (0, 0), (_place(_as_it_is, mask.table, tensors), -1)


def _pair(mask: And | Or, size: Sizes, shapes: _Shapes, nodes: list[int], tensors: list[_Make]) -> _Node:
    left = _lay(mask.left, size, shapes, nodes, tensors)
    return (0, 0, 0), (left, _lay(mask.right, size, shapes, nodes, tensors)), (-1, -1)


def _not(mask: Not, size: Sizes, shapes: _Shapes, nodes: list[int], tensors: list[_Make]) -> _Node:
    inner = _lay(mask.inner, size, shapes, nodes, tensors)
    return (0, 0, 0), (inner, inner), (-1, -1)


# In the order of `MaskNode::Kind` in csrc/problem.h.
_NODES: dict[type[Mask], Callable[..., _Node]] = {
    Band: _band,
    Before: _before,
    Documents: _documents,
    Blocks: _blocks,
    Dense: _dense,
    And: _pair,
    Or: _pair,
    Not: _not,
}


def _place(how: Callable[[Tensor], Tensor], slot: Any, tensors: list[_Make]) -> int:
    tensors.append(lambda given: how(given[slot.index]))
    return len(tensors) - 1


def _as_it_is(x: Tensor) -> Tensor:
    return x
