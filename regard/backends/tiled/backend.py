"""The equation in strips of plain PyTorch: any device, any score, memory linear in length, forward and backward.

Rows are whole, so any normalizer and any summary is taken in one pass, and the backward pass is the forward pass of a
block, done again with a graph. Two levels keep that graph small: one from the scores of the block to its weights and
summaries, and one per segment of keys from q, k and the words to the scores. The four products around them are written
out: autograd would compute those of the keys and values in the layout that is twice as slow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.backends.equation import aggregate, can_be_empty, scores
from regard.backends.tiled.row_block import RowBlock, read_gradient, row_blocks, write_output
from regard.components.component import Slot, fill, slots
from regard.components.function import FunctionBias, FunctionScore, captured_slots
from regard.components.position import TensorBias
from regard.components.score import Product
from regard.components.statistic import Statistic
from regard.components.tensor_ops import fold_heads, widen
from regard.components.tile import Range, Sizes, concat_ranges
from regard.plan.nonfinite import nan_scores, without_flags, zero_nonfinite
from regard.plan.problem import Plan, empty_outputs, sizes

# See `Backend`.
about = "plain PyTorch, some rows at a time: everything, in linear memory"
is_automatic = True
is_fastest_for: frozenset[torch.dtype] = frozenset()
masks_nonfinite = False
supported = None
is_differentiable = False
has_all_derivatives = False
is_dispatched = True
saved = 0


def is_for(device_type: str) -> bool:
    """It runs on every device."""
    return True


def refuse(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """Return why it cannot serve a problem; it serves everything whose closures autograd shows."""
    for name, part in (("score", plan.score), ("bias", plan.bias)):
        if isinstance(part, FunctionScore | FunctionBias) and part.captured is None:
            return f"the {name} closes over a tensor that torch.func differentiates, and hides it from us"
    return None


def forward(plan: Plan, tensors: Sequence[Tensor], is_last: bool = False) -> tuple[Tensor, ...]:
    """All outputs of a problem, in the order of `Plan.outputs`."""
    names, plan = plan.outputs, without_flags(plan, tensors)
    tensors = zero_nonfinite(plan, tensors)
    plan = fill(plan, tensors)
    q, k, v = (widen(x.detach()) for x in tensors[:3])
    size = sizes(q, k)
    outputs = dict(zip(names, empty_outputs(plan, q, k, tensors[2]), strict=True))
    statistics = _by_name(plan)
    with torch.no_grad(), _in_full_precision(q):
        for block in row_blocks(plan, size, q.device):
            s = _scores(plan, q, k, block)
            found = block.contributes_to(plan, names)
            values = aggregate(
                plan, s, block.all_keys(v), block.tile, block.columns, found, _empty_rows(plan, s, block)
            )
            for name, value in zip(found, values, strict=True):
                write_output(statistics.get(name), outputs[name], block, value)
    return tuple(outputs.values())


def empty_saved(size: Sizes, like: Tensor, v: Tensor) -> list[Tensor]:
    """Return nothing: the backward pass computes the scores again."""
    return []


def backward(
    plan: Plan,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tensors that need one, from those of the outputs (None = zero)."""
    given, plan = plan.named(gradients), without_flags(plan, tensors)
    # The output is the product of the weights after dropout and the values: the graph ends at the weights.
    dout = given.pop("out", None)
    names = (*given, "dropped") if dout is not None else tuple(given)
    tensors = zero_nonfinite(plan, tensors)
    q, k, v = (widen(x.detach()) for x in tensors[:3])
    totals = _Totals(tensors, needs_grad)
    leaves = _leaves(plan, tensors, needs_grad)
    with_leaves = fill(plan, leaves)
    from_weights = [i for i in slots(plan.normalizer) if needs_grad[i]]
    size, statistics = sizes(q, k), _by_name(plan)
    with torch.no_grad(), _in_full_precision(q):
        for block in row_blocks(with_leaves, size, q.device):
            s = _scores(with_leaves, q, k, block).detach().requires_grad_()
            values, found = block.all_keys(v), block.contributes_to(plan, names)
            with torch.enable_grad():
                empty = _empty_rows(with_leaves, s.detach(), block)
                outputs = aggregate(with_leaves, s, values, block.tile, block.columns, found, empty)
            pairs = []
            for name, output in zip(found, outputs, strict=True):
                if name == "dropped":
                    some = fold_heads(block.queries(dout).to(values.dtype), values)  # type: ignore[arg-type]
                    totals.add_keys(2, block, some.mT @ fold_heads(output.detach(), values))
                    gradient = (some @ values.mT).view(output.shape)
                else:
                    gradient = read_gradient(statistics[name], given[name], block).to(output.dtype)
                if output.requires_grad:
                    pairs.append((output, gradient))
            if not pairs:
                continue
            ds, *dparameters = _gradients(pairs, [s, *(leaves[i] for i in from_weights)])
            for i, parameter in zip(from_weights, dparameters, strict=True):
                totals.add(i, parameter)
            if ds is not None and block.columns:
                # Masked pairs have no gradient, even in a row of NaN.
                for keys in block.partial:
                    ds[..., block.columns_of(keys)].masked_fill_(~block.allowed(with_leaves, keys), 0.0)
                _from_scores(plan, with_leaves, q, k, block, ds, leaves, totals)
    return tuple(zero_nonfinite(plan, tensors, totals.results(tensors)))


class _Totals:
    """Running sums of the gradients. Those of k and v are transposed, keys innermost, as the products return them."""

    def __init__(self, tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> None:
        self.sums = [
            torch.zeros(
                (*x.shape[:-2], *(x.shape[:-3:-1] if i in (1, 2) else x.shape[-2:])),
                dtype=widen(x.new_empty(0)).dtype, device=x.device,
            )
            if want else None
            for i, (x, want) in enumerate(zip(tensors, needs_grad, strict=True))
        ]  # fmt: skip
        self.needs_grad = [i for i, want in enumerate(needs_grad) if want]

    def add(self, index: int, gradient: Tensor | None) -> None:
        total = self.sums[index]
        if total is not None and gradient is not None:
            total.add_(gradient)

    def add_queries(self, block: RowBlock, gradient: Tensor) -> None:
        if self.sums[0] is not None:
            block.queries(self.sums[0]).add_(gradient)

    def add_keys(self, index: int, block: RowBlock, gradient: Tensor, segment: Range | None = None) -> None:
        """Add the gradient (b, g, n, w) of k or v, for one segment or the whole block."""
        total = self.sums[index]
        if total is None:
            return
        if segment is not None:
            block.keys(total.mT, segment).mT.add_(gradient)
            return
        for keys in block.columns:
            block.keys(total.mT, keys).mT.add_(gradient[..., block.columns_of(keys)])

    def results(self, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the gradients in the shapes and dtypes of the tensors."""
        results = [None if x is None else x.mT.contiguous() if i in (1, 2) else x for i, x in enumerate(self.sums)]
        return tuple([None if x is None else x.to(y.dtype) for x, y in zip(results, tensors, strict=True)])


def _from_scores(
    plan: Plan,
    with_leaves: Plan,
    q: Tensor,
    k: Tensor,
    block: RowBlock,
    ds: Tensor,
    leaves: Sequence[Tensor],
    totals: _Totals,
) -> None:
    """Add the gradients of q, k and the tensors of score and bias, from that of a block's scores."""
    score, bias = with_leaves.score, with_leaves.bias
    closed = isinstance(score, Product) and plan.softcap is None
    # Autograd differentiates everything before the scores, or the bias alone where the product has a closed form.
    parameters = [i for i in slots(plan.bias if closed else (plan.score, plan.bias)) if i in totals.needs_grad]
    parameters = [i for i in parameters if not _is_added(plan, i)]
    some_q = block.queries(q).detach()
    for keys in block.segments(with_leaves, q.shape[-1]):
        part = dataclasses.replace(block.tile, k=keys)
        some_k, gradient = block.keys(k, keys).detach(), ds[..., block.columns_of(keys)]
        if isinstance(plan.bias, TensorBias):
            total = totals.sums[_index(plan.bias.tensor)]
            if total is not None:
                part.cut(total).add_(gradient.sum_to_size(part.cut(total).shape))
        if closed:
            _product(plan.score, score, block, keys, some_q, some_k, gradient, totals)  # type: ignore[arg-type]
        inputs = [
            *([] if closed else [some_q.requires_grad_(), some_k.requires_grad_()]),
            *(leaves[i] for i in parameters),
        ]
        if not inputs:
            continue
        with torch.enable_grad():
            s = bias.bias(part, q.dtype) if closed and bias is not None else scores(with_leaves, some_q, some_k, part)
        if not s.requires_grad:
            continue
        found = list(_gradients([(s, gradient.sum_to_size(s.shape).to(s.dtype))], inputs))
        if not closed:
            dq, dk = found[:2]
            if dq is not None:
                totals.add_queries(block, dq)
            if dk is not None:
                totals.add_keys(1, block, dk.mT, keys)
        for i, parameter in zip(parameters, found[0 if closed else 2 :], strict=True):
            totals.add(i, parameter)


def _product(
    plan: Product, score: Product, block: RowBlock, keys: Range, q: Tensor, k: Tensor, ds: Tensor, totals: _Totals
) -> None:
    """Add the gradients of a dot-product score, from ds (b, h, l, s)."""
    folded = fold_heads(ds, k)
    totals.add_queries(block, score.scaled((folded @ k).view(q.shape)))
    totals.add_keys(1, block, fold_heads(score.scaled(q), k).mT @ folded, keys)
    _add_bias(totals, plan.key_bias, (block.tile.b, block.tile.g, keys), folded, -2)
    _add_bias(totals, plan.query_bias, (block.tile.b, block.tile.h, block.tile.q), ds, -1)


def _add_bias(totals: _Totals, slot: Any, parts: tuple[Range, Range, Range], ds: Tensor, axis: int) -> None:
    total = None if slot is None else totals.sums[_index(slot)]
    if total is not None:
        total[tuple([slice(*part) for part in parts])].add_(ds.sum(axis))


def _index(slot: Any) -> int:
    assert isinstance(slot, Slot)
    return slot.index


def _gradients(pairs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    # Whatever a user's score computed once from its parameters is part of the graph of every segment: it is retained.
    return torch.autograd.grad(
        [p[0] for p in pairs], inputs, [p[1] for p in pairs], allow_unused=True, retain_graph=True
    )


def _leaves(plan: Plan, tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor]:
    """Return the tensors of the components, as leaves of new graphs where they need a gradient."""
    # The tensors that a Python function closes over are the leaves themselves. All others are widened, since a gradient has
    # the dtype of its leaf: if the gradients of the blocks nearly cancel, rounding each of them would dominate their sum.
    own = captured_slots(plan.score, plan.bias)
    fresh = [i for i, want in enumerate(needs_grad) if want and i > 2 and not _is_added(plan, i)]
    return [
        x if i in own else widen(x.detach()).requires_grad_() if i in fresh else x.detach()
        for i, x in enumerate(tensors)
    ]


def _is_added(plan: Plan, slot: int) -> bool:
    """Whether this is a tensor added to the scores. It may be as large as they are, so its gradient is summed in place."""
    return isinstance(plan.bias, TensorBias) and _index(plan.bias.tensor) == slot


def _by_name(plan: Plan) -> dict[str, Statistic]:
    return {statistic.name: statistic for statistic in plan.summary.statistics}


def _scores(plan: Plan, q: Tensor, k: Tensor, block: RowBlock) -> Tensor:
    tile = block.tile
    some_q = block.queries(q)

    def segment(keys: Range) -> Tensor:
        part = dataclasses.replace(tile, k=keys)
        return nan_scores(plan, scores(plan, some_q, block.keys(k, keys), part), part)

    if not block.columns:
        return some_q.new_full((*some_q.shape[:3], 1), -math.inf)
    with torch.no_grad():
        s = concat_ranges(block.segments(plan, q.shape[-1]), segment)
        for keys in block.partial:
            s[..., block.columns_of(keys)].masked_fill_(~block.allowed(plan, keys), -math.inf)
    return s


def _empty_rows(plan: Plan, s: Tensor, block: RowBlock) -> Tensor | None:
    if block.columns and not block.partial and not can_be_empty(dataclasses.replace(plan, mask=None)):
        return None
    empty = s.amax(-1, keepdim=True) == -math.inf
    return empty if bool(empty.any()) else None


def _in_full_precision(x: Tensor) -> Any:
    """Disable autocast: it has chosen the precision of q, k and v, and sums are in float32."""
    return torch.autocast(x.device.type, enabled=False)
