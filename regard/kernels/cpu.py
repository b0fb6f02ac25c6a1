"""The native CPU kernels: what they serve, and how a plan is told to them. The kernels themselves stand in csrc/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.kernels import native, tiled
from regard.mask import And, Band, Before, Blocks, Dense, Documents, Mask, Not, Or, Where
from regard.normalizer import Entmax, Normalizer, Sigmoid, Softmax, Sparsemax
from regard.position import T5, Added, ALiBi, Bias
from regard.problem import Plan, sizes
from regard.score import Additive, Product
from regard.tile import Sizes, Tile
from regard.word import Slot, fill

# Forward gives, beside its outputs, the largest score of each row and the inverse of its sum, in one tensor, and the output
# in full precision (empty where it is so anyhow): backward takes them.
EXTRAS = 2

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the forward pass tells beside the largest weights, in its order, before them and after; and the bits that ask for it.
_BEFORE = {"lse": 1, "max": 2, "entropy": 4}
_AFTER = {"received": 16, "full": 32, "rows": 0, "mass": 0}
# The bit that says that no backward pass follows.
_LAST = 8
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
    if any(x.dtype not in _DTYPES for x in (q, k, v)):
        return "it computes in float32, and float64 was given"
    if not (q.numel() and k.numel() and v.numel()):
        return "an axis has size zero"
    if plan.bad_q is not None and not torch.compiler.is_compiling():
        # A compiled graph cannot know: there it is found out at every call, and `tiled` computes it.
        return "queries, keys or values hold NaN or inf, under a mask"
    if plan.bias is not None and not isinstance(plan.bias, Added | ALiBi | T5):
        return f"it has no bias but a tensor, ALiBi and T5, and {type(plan.bias).__name__} is none"
    if _has(plan.mask, Where):
        return "it has no masks in Python"
    if plan.summary.top > _MOST:
        return f"it gives no more than the {_MOST} largest weights"
    return None


def _has(mask: Any, kind: type[Mask]) -> bool:
    if isinstance(mask, And | Or):
        return _has(mask.left, kind) or _has(mask.right, kind)
    return _has(mask.inner, kind) if isinstance(mask, Not) else isinstance(mask, kind)


def forward(plan: Plan, tensors: Sequence[Tensor], last: bool = False) -> tuple[Tensor, ...]:
    """All outputs of a problem, in the order of `Plan.outputs`, and the extras: empty where this is the `last` pass, with
    no backward pass to follow.
    """
    if _has_nonfinite(plan, tensors):
        outputs = tiled.forward(plan, tensors)
        return *outputs, *empty_extras(sizes(*tensors[:2]), tensors[0].new_empty(0, dtype=torch.float32), tensors[2])
    summary, names = plan.summary, plan.outputs[1:]
    bits = _BEFORE | _AFTER
    wanted = sum(bits[name] for name in names if name in bits) + (_LAST if last else 0)
    with torch.no_grad():
        mass = fill(summary, tensors).mass
        member = None if mass is None else mass if mass.dim() == 3 else mass[None]
        numbers = [row % tensors[0].shape[2] for row in summary.row_numbers]
        out, stats, *rest = native.ops.forward(*_words(plan, tensors), summary.top, member, numbers, wanted)
    exact = rest.pop(0) if out.dtype != torch.float32 else out.new_empty(0)
    top = ("top_weights", "top_keys") if summary.top else ()
    order = [*[name for name in _BEFORE if name in names], *top, *[name for name in _AFTER if name in names]]
    found = dict(zip(order, rest, strict=True))
    return out, *[found[name] for name in names], stats, exact


def _has_nonfinite(plan: Plan, tensors: Sequence[Tensor]) -> bool:
    return any(bool(tensors[slot.index].any()) for slot in (plan.bad_q, plan.bad_k) if slot is not None)


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
    given = {name: g for name, g in zip(plan.outputs, gradients, strict=True) if g is not None and name != "top_keys"}
    # The log-sum-exp of the scores is no part of what else than a softmax tells of them.
    simple = {"out", "lse"} if isinstance(plan.normalizer, Softmax) else {"out"}
    if not given.keys() <= simple or "out" not in given or _has_nonfinite(plan, tensors):
        return tiled.backward(plan, tensors, (), gradients, wanted)
    out, stats, exact = kept
    out = exact if exact.numel() else out
    dout, dlse = _rows(given["out"]), given.get("lse")
    with_tensors = fill(plan, tensors)
    needed = _Needed(plan, wanted)
    parts = (
        needed.key_bias, needed.query_bias, needed.added, needed.relative or None, needed.normalizer, needed.weight,
    )  # fmt: skip
    bits = [*wanted[:3], *[part is not None for part in parts]]
    with torch.no_grad():
        found = native.ops.backward(
            out, dout, stats, None if dlse is None else dlse.contiguous(), *_words(plan, tensors),
            sum(bit << i for i, bit in enumerate(bits)),
        )  # fmt: skip
    results: list[Tensor | None] = [None] * len(tensors)
    results[:3] = [g if want else None for g, want in zip(found, wanted[:3], strict=False)]
    rest = iter(found[3:])
    for index in (needed.key_bias, needed.query_bias, needed.added):
        if index is not None:
            results[index] = next(rest).to(tensors[index].dtype)
    if needed.relative:
        for index, gradient in _through_relative(with_tensors, plan, tensors, next(rest), needed.relative):
            results[index] = gradient
    if needed.normalizer is not None:
        per_head, like = next(rest).sum((0, 2)), tensors[needed.normalizer]
        results[needed.normalizer] = (per_head if like.dim() else per_head.sum()).to(like.dtype)
    if needed.weight is not None:
        per_head, like = next(rest), tensors[needed.weight]
        results[needed.weight] = (per_head if like.dim() == 2 else per_head.sum(0)).to(like.dtype)
    return tuple(results)


class _Needed:
    """The indices of the words' tensors whose gradients are wanted; None for those that are not there or not wanted."""

    def __init__(self, plan: Plan, wanted: Sequence[bool]) -> None:
        def index(slot: Any) -> int | None:
            return slot.index if isinstance(slot, Slot) and wanted[slot.index] else None

        score, bias, normalizer = plan.score, plan.bias, plan.normalizer
        self.weight = index(score.v) if isinstance(score, Additive) else None
        dot = score if isinstance(score, Product) else Product()
        self.key_bias, self.query_bias = index(dot.key_bias), index(dot.query_bias)
        self.added = index(bias.tensor) if isinstance(bias, Added) else None
        parts = [] if bias is None or isinstance(bias, Added) else [index(part) for part in vars(bias).values()]
        self.relative = [part for part in parts if part is not None]
        self.normalizer = index(_number(normalizer))


def _words(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What the operators take between q and what is asked for, in their order."""
    q, k, v = (_rows(x.detach()) for x in tensors[:3])
    size = sizes(q, k)
    plan = fill(plan, tensors)
    score, normalizer, bias = plan.score, plan.normalizer, plan.bias
    added = relative = sink = None
    weight = key_bias = query_bias = None
    scale = 1.0
    if isinstance(score, Additive):
        weight = _floats(score.v)
    elif isinstance(score, Product):
        key_bias, query_bias = _floats(score.key_bias), _floats(score.query_bias)
        scale = q.shape[-1] ** -0.5 if score.scale is None else score.scale
    if isinstance(bias, Added):
        added = bias.tensor.detach()
        added = added if added.dtype in _DTYPES else added.float()
    elif bias is not None:
        with torch.no_grad():
            relative = _relative(bias, size, torch.float32)
    number = _number(normalizer)
    if number is not None and (isinstance(number, Tensor) or number or isinstance(normalizer, Softmax)):
        sink = _per_head(number, q)
    nodes: list[int] = []
    found: list[Tensor] = []
    if plan.mask is not None:
        _lay(plan.mask, size, nodes, found)
    return (
        q, k, v, weight, key_bias, query_bias, added, relative, sink, found, nodes, scale,
        0.0 if plan.softcap is None else plan.softcap,
        _kind(normalizer), normalizer.alpha if isinstance(normalizer, Entmax) else 2.0,
        plan.dropout, int(plan.seed) if plan.dropout else 0,
        # Rounded to bfloat16, weights would do for the gradients of q, k and v, but not for those of parameters.
        not any(x.is_floating_point() for x in tensors[3:]),
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


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def _per_head(number: float | Tensor, q: Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number.detach().float().expand(q.shape[1]).contiguous()
    return torch.full((q.shape[1],), number, dtype=torch.float32)


def _relative(bias: Bias, size: Sizes, dtype: torch.dtype) -> Tensor:
    """A bias that depends on the distance alone, as a table (H, L + S - 1 + 64) of query - key + S - 1: memory linear in
    length. The kernels read whole vectors, past the last query.
    """
    # Query 0 has key -n at the distance that query n has key 0.
    tile = Tile((0, 1), (0, size.H), (0, 1), (1 - size.L, size.S), size, torch.device("cpu"))
    table = bias.bias(tile, dtype)[0, :, 0].flip(-1)
    return torch.nn.functional.pad(table, (0, 64)).contiguous()


def _through_relative(
    plan: Plan, split: Plan, tensors: Sequence[Tensor], gradient: Tensor, needed: Sequence[int]
) -> list[tuple[int, Tensor]]:
    """From the gradient of the table by distance to those of what it is made of."""
    leaves = [x.detach().requires_grad_() if i in needed else x for i, x in enumerate(tensors)]
    bias = fill(split.bias, leaves)
    with torch.enable_grad():
        table = _relative(bias, sizes(*tensors[:2]), gradient.dtype)  # type: ignore[arg-type]
    found = torch.autograd.grad(table, [leaves[i] for i in needed], gradient.sum_to_size(table.shape))
    return list(zip(needed, found, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Masks as nodes of eight numbers: kind, three parameters, the nodes inside (two), and the places of tensors (two).

_FAR = 1 << 40


def _lay(mask: Mask, size: Sizes, nodes: list[int], tensors: list[Tensor]) -> int:
    """Append a mask to `nodes` and its tensors to `tensors`; give the number of its node."""
    parameters, inside, places = _NODES[type(mask)](mask, size, nodes, tensors)
    kind = list(_NODES).index(type(mask))
    nodes += [kind, *parameters, *inside, *places]
    return len(nodes) // 8 - 1


_Node = tuple[tuple[int, int, int], tuple[int, int], tuple[int, int]]


def _band(mask: Band, size: Sizes, nodes: list[int], tensors: list[Tensor]) -> _Node:
    left, right = (_FAR if n is None else n for n in (mask.left, mask.right))
    return (size.offset(mask.align), min(left, _FAR), min(right, _FAR)), (0, 0), (-1, -1)


def _before(mask: Before, size: Sizes, nodes: list[int], tensors: list[Tensor]) -> _Node:
    return (0, 0, 0), (0, 0), (-1, _place(mask.n.reshape(-1, 1).long(), tensors))


def _documents(mask: Documents, size: Sizes, nodes: list[int], tensors: list[Tensor]) -> _Node:
    queries, keys = (_place(ids.long().contiguous(), tensors) for ids in (mask.queries, mask.keys))
    return (0, 0, 0), (0, 0), (queries, keys)


def _blocks(mask: Blocks, size: Sizes, nodes: list[int], tensors: list[Tensor]) -> _Node:
    return (0, *mask.size(size)), (0, 0), (_place(mask.table, tensors), -1)


def _dense(mask: Dense, size: Sizes, nodes: list[int], tensors: list[Tensor]) -> _Node:
    return (0, 0, 0), (0, 0), (_place(mask.table, tensors), -1)


def _pair(mask: And | Or, size: Sizes, nodes: list[int], tensors: list[Tensor]) -> _Node:
    left = _lay(mask.left, size, nodes, tensors)
    return (0, 0, 0), (left, _lay(mask.right, size, nodes, tensors)), (-1, -1)


def _not(mask: Not, size: Sizes, nodes: list[int], tensors: list[Tensor]) -> _Node:
    inner = _lay(mask.inner, size, nodes, tensors)
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


def _place(tensor: Tensor, tensors: list[Tensor]) -> int:
    tensors.append(tensor)
    return len(tensors) - 1
