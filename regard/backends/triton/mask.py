"""Masks on the GPU: lists of the tiles to visit, and arithmetic inside partial tiles.

A mask is brought to disjunctive normal form, (a & ~b & ...) | (c & ...) | ..., for which the kernels are compiled.
Integers and tensors of its literals are arguments. `coverage` gives, for each row of tiles, the list of tiles that are
not empty: without an L x S matrix, and without waiting for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.components.component import fill, slots
from regard.components.mask import AlignedBand, And, Band, Before, Blocks, Dense, Documents, Mask, Not, Or
from regard.components.tile import Grid, Sizes
from regard.plan.cache import derived

# An offset that no difference of positions exceeds.
_UNBOUNDED = 1 << 30

# Kinds of literals.
_BAND: tl.constexpr = tl.constexpr(0)
_BEFORE: tl.constexpr = tl.constexpr(1)
_DOCUMENTS: tl.constexpr = tl.constexpr(2)
_TABLE: tl.constexpr = tl.constexpr(3)
_LEFT_UNBOUNDED_BAND: tl.constexpr = tl.constexpr(4)
_ALIGNED_BAND: tl.constexpr = tl.constexpr(5)

# Kinds of tiles, in the order in which they are listed.
FULL: tl.constexpr = tl.constexpr(0)
PARTIAL: tl.constexpr = tl.constexpr(1)
EMPTY: tl.constexpr = tl.constexpr(2)


@triton.jit
def allowed(args, b, head, query, key):
    """Which pairs may attend. `query` and `key` broadcast to the tile, `head` to the queries."""
    any_term = (query != query) | (key != key)
    term = (query == query) & (key == key)
    for n in tl.static_range(args.config.num_literals):
        term = term & _literal(args, n, b, head, query, key)
        if args.config.terms[n][2]:
            any_term = any_term | term
            term = (query == query) & (key == key)
    return any_term


@triton.jit
def _literal(args, index: tl.constexpr, b, head, query, key):
    kind: tl.constexpr = args.config.terms[index][0]
    p: tl.constexpr = args.config.terms[index][3]
    n: tl.constexpr = args.config.terms[index][4]
    tensors = args.tiles.mask_tensors
    integers = args.tiles.mask_integers
    if kind == _BAND:  # offset, left, right
        behind = query + integers[n] - key
        ok = (behind <= integers[n + 1]) & (behind >= -integers[n + 2])
    elif kind == _LEFT_UNBOUNDED_BAND:  # the same integers
        ok = key <= query + (integers[n] + integers[n + 2])
    elif kind == _BEFORE:  # stride
        ok = key + 0 * query < tl.load(tensors[p] + b * integers[n])
    elif kind == _ALIGNED_BAND:  # two strides; L; offset; left, right
        at = b * integers[n] + query * integers[n + 1]
        position = tl.load(tensors[p] + at, mask=query < integers[n + 2], other=0)
        behind = position + query * (1 - integers[n + 1]) + integers[n + 3] - key
        ok = (behind <= integers[n + 4]) & (behind >= -integers[n + 5])
    elif kind == _DOCUMENTS:  # two strides; L and S
        query_id = tl.load(tensors[p] + b * integers[n] + query, mask=query < integers[n + 2], other=0)
        ok = query_id == tl.load(tensors[p + 1] + b * integers[n + 1] + key, mask=key < integers[n + 3], other=0)
    else:  # _TABLE: four strides; queries and keys per element; rows and columns
        row = query // integers[n + 4]
        column = key // integers[n + 5]
        inside = (row < integers[n + 6]) & (column < integers[n + 7])
        at = b * integers[n] + head * integers[n + 1] + row.to(tl.int64) * integers[n + 2] + column * integers[n + 3]
        ok = tl.load(tensors[p] + at, mask=inside, other=0) != 0
    if args.config.terms[index][1]:
        ok = ~ok
    return ok


class EncodedMask(NamedTuple):
    """A mask as the kernels take it.

    Each literal in `terms` is (kind, is it negated, is it the last of its term, index of its first tensor, index of its
    first integer).
    """

    terms: tuple[tuple[int, bool, bool, int, int], ...]
    tensors: tuple[Tensor, ...]
    integers: tuple[int, ...]


def encode_mask(mask: Mask, size: Sizes) -> EncodedMask:
    """Encode a mask whose slots are filled. A literal that occurs twice is stored once.

    >>> from regard.backends.triton.mask import encode_mask
    >>> from regard.components.tile import Sizes
    >>> encoded = encode_mask(mask.window(4, 0, align="start"), Sizes(B=1, H=1, G=1, L=8, S=8))
    >>> encoded.terms, encoded.integers  # kind 0, not negated, last of its term; offset, left, right
    (((0, False, True, 0, 0),), (0, 4, 0))
    """
    encoded: dict[int, tuple[int, int, int]] = {}
    tensors: list[Tensor] = []
    integers: list[int] = []
    literals = []
    for term in to_normal_form(mask):
        for index, (literal, is_negated) in enumerate(term):
            if id(literal) not in encoded:
                kind, own_tensors, own_integers = ENCODERS[type(literal)](literal, size)
                encoded[id(literal)] = (kind, len(tensors), len(integers))
                tensors += own_tensors
                integers += own_integers
            kind, p, n = encoded[id(literal)]
            literals.append((kind, is_negated, index == len(term) - 1, p, n))
    return EncodedMask(tuple(literals), tuple(tensors), tuple(integers))


Term = tuple[tuple[Mask, bool], ...]  # a conjunction of masks, each with whether it is negated


def to_normal_form(mask: Mask, is_negated: bool = False) -> list[Term]:
    """Return the terms whose disjunction is the mask, or its negation.

    >>> from regard.backends.triton.mask import to_normal_form
    >>> a, b, c = mask.causal(), mask.window(4, 0), mask.prefix(2)
    >>> [len(term) for term in to_normal_form(a & (b | c))]  # (a & b) | (a & c)
    [2, 2]
    >>> [len(term) for term in to_normal_form(~(a & b & c))]  # ~a | ~b | ~c
    [1, 1, 1]
    """
    if isinstance(mask, Not):
        return to_normal_form(mask.inner, not is_negated)
    if not isinstance(mask, And | Or):
        return [((mask, is_negated),)]
    left, right = to_normal_form(mask.left, is_negated), to_normal_form(mask.right, is_negated)
    if isinstance(mask, Or) != is_negated:
        return left + right
    return [a + b for a, b in product(left, right)]


_Literal = tuple[int, list[Tensor], list[int]]  # kind, tensors, integers


def _encode_band(mask: Any, size: Sizes) -> _Literal:
    left, right = (_UNBOUNDED if n is None else min(n, _UNBOUNDED) for n in (mask.left, mask.right))
    kind = _LEFT_UNBOUNDED_BAND if mask.left is None else _BAND
    return kind.value, [], [size.offset(mask.align), left, right]


def _encode_aligned_band(mask: Any, size: Sizes) -> _Literal:
    left, right = (_UNBOUNDED if n is None else min(n, _UNBOUNDED) for n in (mask.left, mask.right))
    position, per_query = mask.position.contiguous(), int(mask.position.shape[1] > 1)
    batch = position.shape[1] if position.shape[0] > 1 else 0
    offset = -size.L if mask.from_end and not per_query else 0
    return _ALIGNED_BAND.value, [position], [batch, per_query, size.L, offset, left, right]


def _encode_before(mask: Any, size: Sizes) -> _Literal:
    return _BEFORE.value, [mask.n.contiguous()], [int(mask.n.numel() > 1)]


def _encode_documents(mask: Any, size: Sizes) -> _Literal:
    tensors = [ids.contiguous() for ids in (mask.queries, mask.keys)]
    strides = [n if ids.shape[0] > 1 else 0 for ids, n in zip(tensors, (size.L, size.S), strict=True)]
    return _DOCUMENTS.value, tensors, [*strides, size.L, size.S]


def _encode_table(table: Tensor, rows: int, columns: int, size: Sizes) -> _Literal:
    strides = [stride if n > 1 else 0 for stride, n in zip(table.stride(), table.shape, strict=True)]
    counts = [-(-size.L // rows), -(-size.S // columns)]
    return _TABLE.value, [table.view(torch.uint8)], [*strides, rows, columns, *counts]


def _encode_blocks(mask: Any, size: Sizes) -> _Literal:
    rows, columns = mask.size(size)
    return _encode_table(mask.table, rows, columns, size)


def _encode_dense(mask: Any, size: Sizes) -> _Literal:
    return _encode_table(mask.table, 1, 1, size)


ENCODERS: dict[type[Mask], Callable[[Any, Sizes], _Literal]] = {
    Band: _encode_band,
    AlignedBand: _encode_aligned_band,
    Before: _encode_before,
    Documents: _encode_documents,
    Blocks: _encode_blocks,
    Dense: _encode_dense,
}


# ---------------------------------------------------------------------------------------------------------------------
# Lists of tiles.


def list_tiles(
    mask: Mask, tensors: Sequence[Tensor], size: Sizes, queries: int, keys: int, device: torch.device, transposed: bool
) -> tuple[Tensor, Tensor]:
    """List the full, then the partial tiles of each row of tiles, or of each column of tiles if `transposed`.

    Lists of masks without tensors are cached.

    Args:
        mask: a mask of a plan, whose tensors are slots.
        tensors: the tensors of the problem.
        queries, keys: the size of a tile.

    Returns:
        The lists (B|1, R, C), int32, and how many tiles are full and partial (B|1, R, 2), int32. What follows these in
        a list is unspecified.

    >>> from regard.backends.triton.mask import list_tiles
    >>> from regard.components.tile import Sizes
    >>> causal, size = mask.causal(align="start"), Sizes(B=1, H=1, G=1, L=32, S=32)
    >>> order, counts = list_tiles(causal, (), size, queries=16, keys=16, device=torch.device("cpu"), transposed=False)
    >>> order[0, 1].tolist(), counts[0].tolist()  # the second row of tiles: tile 0 is full, tile 1 is partial
    ([0, 1], [[0, 1], [1, 1]])
    """
    # Tensors made while a CUDA graph is captured belong to the graph.
    if slots(mask) or is_capturing(device):
        return _make_lists(fill(mask, tensors), size, queries, keys, device, transposed)
    return _cached_lists(mask, size, queries, keys, device, transposed, _current_stream(device))


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured. Its tensors hold values only once it is replayed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _current_stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def classify_tiles(mask: Mask, size: Sizes, queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the kind of each tile, int8 (B|1, R, C). A tile that reaches past the end is never FULL.

    >>> from regard.backends.triton.mask import classify_tiles
    >>> from regard.components.tile import Sizes
    >>> size = Sizes(B=1, H=1, G=1, L=32, S=40)
    >>> classify_tiles(mask.causal(align="start"), size, 16, 16, torch.device("cpu"))[0].tolist()
    [[1, 2, 2], [0, 1, 2]]
    """
    grid = Grid.of(size, queries, keys, device)
    some, full = (x.expand(-1, grid.first_query.shape[0], grid.first_key.shape[1]) for x in mask.coverage(grid))
    inside = (grid.first_query + queries <= size.L) & (grid.first_key + keys <= size.S)
    kinds: Tensor = EMPTY.value - some.to(torch.int8) - (some & full & inside).to(torch.int8)
    return kinds


def _make_lists(
    mask: Mask, size: Sizes, queries: int, keys: int, device: torch.device, transposed: bool
) -> tuple[Tensor, Tensor]:
    kinds = classify_tiles(mask, size, queries, keys, device)
    kinds = kinds.mT.contiguous() if transposed else kinds
    order = torch.sort(kinds, dim=-1, stable=True).indices
    counts = torch.stack([(kinds == FULL.value).sum(-1), (kinds == PARTIAL.value).sum(-1)], -1)
    return order.to(torch.int32).contiguous(), counts.to(torch.int32)


def _make_lists_on_stream(
    mask: Mask, size: Sizes, queries: int, keys: int, device: torch.device, transposed: bool, stream: int | None
) -> tuple[Tensor, Tensor]:
    """The lists are filled asynchronously. As the stream is part of the cache key, only that stream reads them."""
    return _make_lists(mask, size, queries, keys, device, transposed)


# The lists of a causal mask of 131,072 tokens take 4 MB.
_cached_lists = derived(_make_lists_on_stream, 256)
