"""Encoding of masks for the native operators: nodes of eight integers each, in postfix order.

A node is (kind, three parameters, the indices of two child nodes, the indices of two tensors).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.components.mask import And, Band, Before, Blocks, Dense, Documents, Mask, Not, Or
from regard.components.tile import Sizes

Shapes = tuple[tuple[int, ...], ...]
# Maps the tensors of a call to an argument of an operator.
Maker = Callable[[Sequence[Tensor]], Tensor]
_UNLIMITED = 1 << 40


def can_encode(mask: Mask | None) -> bool:
    """Return whether the native kernels support every node of a mask."""
    if isinstance(mask, And | Or):
        return can_encode(mask.left) and can_encode(mask.right)
    return can_encode(mask.inner) if isinstance(mask, Not) else mask is None or type(mask) in _NODES


def encode_mask(mask: Mask, size: Sizes, shapes: Shapes, nodes: list[int], tensors: list[Maker]) -> int:
    """Append the nodes of a mask to `nodes` and the makers of its tensors to `tensors`; return the index of its root."""
    parameters, children, indices = _NODES[type(mask)](mask, size, shapes, nodes, tensors)
    kind = list(_NODES).index(type(mask))
    nodes += [kind, *parameters, *children, *indices]
    return len(nodes) // 8 - 1


_Node = tuple[tuple[int, int, int], tuple[int, int], tuple[int, int]]


def _band(mask: Band, size: Sizes, shapes: Shapes, nodes: list[int], tensors: list[Maker]) -> _Node:
    left, right = (_UNLIMITED if n is None else n for n in (mask.left, mask.right))
    return (size.offset(mask.align), min(left, _UNLIMITED), min(right, _UNLIMITED)), (0, 0), (-1, -1)


def _before(mask: Before, size: Sizes, shapes: Shapes, nodes: list[int], tensors: list[Maker]) -> _Node:
    return (0, 0, 0), (0, 0), (-1, _add_tensor(lambda n: n.reshape(-1, 1).long(), mask.n, tensors))


def _documents(mask: Documents, size: Sizes, shapes: Shapes, nodes: list[int], tensors: list[Maker]) -> _Node:
    queries, keys = (
        _add_tensor(lambda ids: ids.long().contiguous(), ids, tensors) for ids in (mask.queries, mask.keys)
    )
    return (0, 0, 0), (0, 0), (queries, keys)


def _blocks(mask: Blocks, size: Sizes, shapes: Shapes, nodes: list[int], tensors: list[Maker]) -> _Node:
    table: Any = mask.table
    like = Blocks(torch.empty(shapes[table.index], device="meta"), mask.rows, mask.columns)
    return (0, *like.size(size)), (0, 0), (_add_tensor(_unchanged, table, tensors), -1)


def _dense(mask: Dense, size: Sizes, shapes: Shapes, nodes: list[int], tensors: list[Maker]) -> _Node:
    return (0, 0, 0), (0, 0), (_add_tensor(_unchanged, mask.table, tensors), -1)


def _pair(mask: And | Or, size: Sizes, shapes: Shapes, nodes: list[int], tensors: list[Maker]) -> _Node:
    left = encode_mask(mask.left, size, shapes, nodes, tensors)
    return (0, 0, 0), (left, encode_mask(mask.right, size, shapes, nodes, tensors)), (-1, -1)


def _not(mask: Not, size: Sizes, shapes: Shapes, nodes: list[int], tensors: list[Maker]) -> _Node:
    inner = encode_mask(mask.inner, size, shapes, nodes, tensors)
    return (0, 0, 0), (inner, inner), (-1, -1)


# The position of a mask in this table is its `MaskNode::Kind` in csrc/problem.h.
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


def _add_tensor(convert: Callable[[Tensor], Tensor], slot: Any, tensors: list[Maker]) -> int:
    tensors.append(lambda inputs: convert(inputs[slot.index]))
    return len(tensors) - 1


def _unchanged(x: Tensor) -> Tensor:
    return x
