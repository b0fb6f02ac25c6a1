"""Masks on the GPU: which tiles there are, as lists, and inside a tile arithmetic.

A mask is brought to the form (a & ~b & ...) | (c & ...) | ..., whose parts the kernels are compiled for; its numbers and
tensors are arguments. What `coverage` says of the tiles becomes, for each row of tiles, the list of those that hold
something: no matrix of queries by keys, and no wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.components.component import fill, slots
from regard.components.mask import And, Band, Before, Blocks, Dense, Documents, Mask, Not, Or
from regard.components.tile import Grid, Sizes

_FAR = 1 << 30


@triton.jit
def allowed(call, b, head, query, key):
    """May each pair attend? `query` and `key` broadcast to the tile, `head` to the queries."""
    some = (query != query) | (key != key)
    every = (query == query) & (key == key)
    for n in tl.static_range(call.form.literals):
        every = every & _literal(call, n, b, head, query, key)
        if call.form.terms[n][2]:
            some = some | every
            every = (query == query) & (key == key)
    return some


@triton.jit
def _literal(call, place: tl.constexpr, b, head, query, key):
    kind: tl.constexpr = call.form.terms[place][0]
    p: tl.constexpr = call.form.terms[place][3]
    n: tl.constexpr = call.form.terms[place][4]
    pointers = call.tiles.pointers
    numbers = call.tiles.numbers
    if kind == 0:  # Band: offset, left, right
        behind = query + numbers[n] - key
        ok = (behind <= numbers[n + 1]) & (behind >= -numbers[n + 2])
    elif kind == 4:  # Band without an end on its left: the same numbers
        ok = key <= query + (numbers[n] + numbers[n + 2])
    elif kind == 1:  # Before: stride
        ok = key + 0 * query < tl.load(pointers[p] + b * numbers[n])
    elif kind == 2:  # Documents: two strides; L and S
        own = tl.load(pointers[p] + b * numbers[n] + query, mask=query < numbers[n + 2], other=0)
        ok = own == tl.load(pointers[p + 1] + b * numbers[n + 1] + key, mask=key < numbers[n + 3], other=0)
    else:  # Blocks and Dense: four strides; the size of a block; how many there are
        row = query // numbers[n + 4]
        column = key // numbers[n + 5]
        inside = (row < numbers[n + 6]) & (column < numbers[n + 7])
        at = b * numbers[n] + head * numbers[n + 1] + row.to(tl.int64) * numbers[n + 2] + column * numbers[n + 3]
        ok = tl.load(pointers[p] + at, mask=inside, other=0) != 0
    if call.form.terms[place][1]:
        ok = ~ok
    return ok


class Told(NamedTuple):
    """A mask as the kernels take it: its parts (kind, is it denied, is it the last of a term, the places of its first
    tensor and number), its tensors, and its numbers."""

    terms: tuple[tuple[int, bool, bool, int, int], ...]
    pointers: tuple[Tensor, ...]
    numbers: tuple[int, ...]


def tell(mask: Mask, size: Sizes) -> Told:
    """A filled mask as the kernels take it."""
    parts: dict[int, tuple[int, int, int]] = {}
    tensors: list[Tensor] = []
    numbers: list[int] = []
    told = []
    for term in terms(mask):
        for place, (literal, denied) in enumerate(term):
            if id(literal) not in parts:
                kind, own, own_numbers = _PARTS[type(literal)](literal, size)
                parts[id(literal)] = (kind, len(tensors), len(numbers))
                tensors += own
                numbers += own_numbers
            kind, p, n = parts[id(literal)]
            told.append((kind, denied, place == len(term) - 1, p, n))
    return Told(tuple(told), tuple(tensors), tuple(numbers))


Term = tuple[tuple[Mask, bool], ...]  # masks that must all allow it, or deny it


def terms(mask: Mask, denied: bool = False) -> list[Term]:
    """The terms of which one must hold."""
    if isinstance(mask, Not):
        return terms(mask.inner, not denied)
    if not isinstance(mask, And | Or):
        return [((mask, denied),)]
    left, right = terms(mask.left, denied), terms(mask.right, denied)
    if isinstance(mask, Or) != denied:
        return left + right
    return [a + b for a, b in product(left, right)]


_Part = tuple[int, list[Tensor], list[int]]


def _band(mask: Any, size: Sizes) -> _Part:
    left, right = (_FAR if n is None else min(n, _FAR) for n in (mask.left, mask.right))
    return 4 if mask.left is None else 0, [], [size.offset(mask.align), left, right]


def _before(mask: Any, size: Sizes) -> _Part:
    return 1, [mask.n.contiguous()], [int(mask.n.numel() > 1)]


def _documents(mask: Any, size: Sizes) -> _Part:
    tensors = [ids.contiguous() for ids in (mask.queries, mask.keys)]
    strides = [n if ids.shape[0] > 1 else 0 for ids, n in zip(tensors, (size.L, size.S), strict=True)]
    return 2, tensors, [*strides, size.L, size.S]


def _table(table: Tensor, rows: int, columns: int, size: Sizes) -> _Part:
    strides = [stride if n > 1 else 0 for stride, n in zip(table.stride(), table.shape, strict=True)]
    counts = [-(-size.L // rows), -(-size.S // columns)]
    return 3, [table.view(torch.uint8)], [*strides, rows, columns, *counts]


def _blocks(mask: Any, size: Sizes) -> _Part:
    rows, columns = mask.size(size)
    return _table(mask.table, rows, columns, size)


def _dense(mask: Any, size: Sizes) -> _Part:
    return _table(mask.table, 1, 1, size)


_PARTS: dict[type[Mask], Callable[[Any, Sizes], _Part]] = {
    Band: _band, Before: _before, Documents: _documents, Blocks: _blocks, Dense: _dense,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Lists of tiles.


def lists(
    mask: Mask, tensors: Sequence[Tensor], size: Sizes, queries: int, keys: int, device: torch.device, turned: bool
) -> tuple[Tensor, Tensor]:
    """For each row of tiles its full tiles and then its partial ones (B|1, R, C), and how many there are of each
    (B|1, R, 2); `turned`, for each column of tiles its rows. `mask` is split: what holds no tensor is looked up.
    """
    # What a captured graph makes is its own.
    if slots(mask) or is_captured(device):
        return _lists(fill(mask, tensors), size, queries, keys, device, turned)
    return _known_lists(mask, size, queries, keys, device, turned)


def is_captured(device: torch.device) -> bool:
    """Does a CUDA graph record what runs? Its tensors hold numbers only once it is replayed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def kinds(mask: Mask, size: Sizes, queries: int, keys: int, device: torch.device) -> Tensor:
    """Of each tile: 0 full, 1 partial, 2 empty; int8 (B|1, R, C). A tile that reaches past the end is partial."""
    grid = Grid.of(size, queries, keys, device)
    some, full = (x.expand(-1, grid.first_query.shape[0], grid.first_key.shape[1]) for x in mask.coverage(grid))
    inside = (grid.first_query + queries <= size.L) & (grid.first_key + keys <= size.S)
    return 2 - some.to(torch.int8) - (some & full & inside).to(torch.int8)


def _lists(
    mask: Mask, size: Sizes, queries: int, keys: int, device: torch.device, turned: bool
) -> tuple[Tensor, Tensor]:
    kind = kinds(mask, size, queries, keys, device)
    kind = kind.mT.contiguous() if turned else kind
    order = torch.sort(kind, dim=-1, stable=True).indices
    counts = torch.stack([(kind == 0).sum(-1), (kind == 1).sum(-1)], -1)
    return order.to(torch.int32).contiguous(), counts.to(torch.int32)


_known_lists = lru_cache(256)(_lists)
