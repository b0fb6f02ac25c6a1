"""Parts of problems: what masks and biases are for some of the batch rows, heads, queries and keys of a longer problem.

A part is computed as a problem of its own. Masks and biases that depend on positions are replaced by equivalent ones in the
coordinates of the part, so that every backend takes them. Those of users, which have no equivalent, are evaluated in the
coordinates of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.components.function import FunctionBias
from regard.components.position import T5, ALiBi, Bias, TensorBias, alibi_slopes
from regard.components.predicate import (
    AlignedBand,
    Band,
    Before,
    Blocks,
    Dense,
    Documents,
    Mask,
    Where,
    map_masks,
)  # fmt: skip
from regard.components.tile import Box, Tile


def mask_of_part(mask: Mask, box: Box) -> Mask:
    """Return the mask of a part of a problem.

    >>> from regard.components.tile import Box, Sizes
    >>> whole = Sizes(1, 1, 1, 6, 6)
    >>> part = Box((0, 1), (0, 1), (4, 6), (2, 5), whole)  # queries 4 and 5, keys 2 to 4
    >>> causal = mask_of_part(mask.causal(), part)
    >>> x = torch.zeros(3, 1)
    >>> regard.attention(x[:2], x, x, mask=causal & mask.window(left=2), summary=Summary(full=True))[1].full
    tensor([[0.3333, 0.3333, 0.3333],
            [0.0000, 0.5000, 0.5000]])
    """
    return map_masks(mask, lambda leaf: _MASKS.get(type(leaf), PartMask)(leaf, box))


def bias_of_part(bias: Bias, box: Box) -> Bias:
    """Return the bias of a part of a problem."""
    return _BIASES.get(type(bias), PartBias)(bias, box)


@dataclass(frozen=True)
class PartMask(Mask):
    """Any mask, evaluated in the coordinates of the whole problem."""

    whole: Mask
    box: Box

    def allowed(self, tile: Tile) -> Tensor:
        return self.whole.allowed(tile.within(self.box))


@dataclass(frozen=True)
class PartBias(Bias):
    """Any bias, evaluated in the coordinates of the whole problem."""

    whole: Bias
    box: Box

    def bias(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        return self.whole.bias(tile.within(self.box), dtype)


@dataclass(frozen=True)
class ShiftedFunction:
    """A function of batch, head, query and key, for indices that are counted from the start of a part."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Any]
    origin: tuple[int, int, int, int]

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Any:
        b, h, q, k = self.origin
        return self.function(batch + b, head + h, query + q, key + k)


def _rows(x: Tensor, box: Box) -> Tensor:
    """Return the batch rows of the part of a tensor (B|1, ...)."""
    return x[slice(*box.b)] if x.shape[0] > 1 else x


def _band(mask: Band, box: Box) -> Mask:
    return replace(mask, align=box.offset(mask.align))


def _aligned_band(mask: AlignedBand, box: Box) -> Mask:
    position = _rows(mask.position, box)
    if position.shape[1] > 1:
        position = position[:, slice(*box.q)]
    else:
        position = position + (box.q[0] - (box.sizes.L if mask.from_end else 0))
    return AlignedBand(mask.left, mask.right, position - box.k[0])


def _before(mask: Before, box: Box) -> Mask:
    return Before((_rows(mask.n, box) if mask.n.dim() else mask.n) - box.k[0])


def _documents(mask: Documents, box: Box) -> Mask:
    return Documents(_rows(mask.queries, box)[:, slice(*box.q)], _rows(mask.keys, box)[:, slice(*box.k)])


def _blocks(mask: Blocks, box: Box) -> Mask:
    rows, columns = mask.size(box.sizes)
    if box.q[0] % rows or box.k[0] % columns:
        return PartMask(mask, box)  # a block would start before the part
    ranges = tuple((start // n, -(-stop // n)) for (start, stop), n in ((box.q, rows), (box.k, columns)))
    table = _rows(mask.table, box)
    table = table[:, slice(*box.h)] if table.shape[1] > 1 else table
    return Blocks(table[:, :, slice(*ranges[0]), slice(*ranges[1])], rows, columns)


def _dense(mask: Dense, box: Box) -> Mask:
    return Dense(box.cut(mask.table))


def _where(mask: Where, box: Box) -> Mask:
    return Where(ShiftedFunction(mask.predicate, box.origin))


def _tensor_bias(bias: TensorBias, box: Box) -> Bias:
    return TensorBias(box.cut(bias.tensor))


def _alibi(bias: ALiBi, box: Box) -> Bias:
    slopes, heads = bias.slopes, box.sizes.H
    if slopes is None and box.h != (0, heads):
        slopes = torch.tensor(alibi_slopes(heads)[slice(*box.h)])
    elif slopes is not None:
        slopes = slopes[slice(*box.h)] if slopes.dim() == 1 else slopes[slice(*box.b), slice(*box.h)]
    return ALiBi(slopes, box.offset(bias.align))


def _t5(bias: T5, box: Box) -> Bias:
    return replace(bias, table=bias.table[:, slice(*box.h)], align=box.offset(bias.align))


def _function_bias(bias: FunctionBias, box: Box) -> Bias:
    return FunctionBias(ShiftedFunction(bias.function, box.origin), bias.captured)


# The equivalents of each class in the coordinates of a part. Other classes are evaluated in those of the whole.
_MASKS: dict[type[Mask], Callable[[Any, Box], Mask]] = {
    Band: _band, AlignedBand: _aligned_band, Before: _before, Documents: _documents, Blocks: _blocks, Dense: _dense,
    Where: _where,
}  # fmt: skip
_BIASES: dict[type[Bias], Callable[[Any, Box], Bias]] = {
    TensorBias: _tensor_bias, ALiBi: _alibi, T5: _t5, FunctionBias: _function_bias,
}  # fmt: skip
