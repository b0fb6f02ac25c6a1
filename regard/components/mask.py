"""Masks: who may attend to whom. True = may attend, everywhere.

A mask is a predicate on (batch, head, query, key), joined with others by `&`, `|` and `~`. It is never stored as a
matrix of queries by keys: kernels ask it two things, which tiles of the matrix are empty, full or in between (by
arithmetic on the edges of the tiles), and what it says inside one tile.

    mask.causal(align="end") & mask.window(left=255, right=0) | mask.prefix(16)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard import check
from regard.components.tile import Align, Grid, Sizes, Tile

# Per tile of a grid: may some pair attend (never False where one may), and may every pair (never True where one may
# not). Each is a bool tensor that broadcasts to (B, R, C).
Coverage = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Mask:
    """What all masks share: `&` (both), `|` (either), `~` (not)."""

    def __and__(self, other: Mask) -> Mask:
        return And(self, _operand(other, "&"))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _operand(other, "|"))

    # Only what is no mask comes here: the error is ours, and not Python's, which names neither mask nor remedy.
    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value; join masks with &, | and ~ instead of and, or and not")

    def allowed(self, tile: Tile) -> Tensor:
        """May each pair of the tile attend? A bool tensor that broadcasts to (b, h, l, s)."""
        raise NotImplementedError

    def coverage(self, grid: Grid) -> Coverage:
        """Which tiles hold some, and which hold only, pairs that may attend. Unknown by default."""
        unknown = torch.ones(1, grid.first_query.shape[0], grid.first_key.shape[1], dtype=torch.bool)
        return unknown.to(grid.first_query.device), ~unknown.to(grid.first_query.device)

    def check(self, sizes: Sizes, device: torch.device) -> None:
        """Raise a ValueError or TypeError where the mask does not fit the problem."""


def _operand(other: object, sign: str) -> Mask:
    if not isinstance(other, Mask):
        raise check.wrong(f"mask: one side of {sign}", other, "a mask (wrap a bool tensor in mask.dense)", False)
    return other


@dataclass(frozen=True)
class Pair(Mask):
    """Two masks, joined."""

    left: Mask
    right: Mask

    def check(self, sizes: Sizes, device: torch.device) -> None:
        self.left.check(sizes, device)
        self.right.check(sizes, device)


@dataclass(frozen=True)
class And(Pair):
    """Both allow it."""

    def allowed(self, tile: Tile) -> Tensor:
        return self.left.allowed(tile) & self.right.allowed(tile)

    def coverage(self, grid: Grid) -> Coverage:
        (some, full), (some_too, full_too) = self.left.coverage(grid), self.right.coverage(grid)
        return some & some_too, full & full_too


@dataclass(frozen=True)
class Or(Pair):
    """One of them allows it."""

    def allowed(self, tile: Tile) -> Tensor:
        return self.left.allowed(tile) | self.right.allowed(tile)

    def coverage(self, grid: Grid) -> Coverage:
        (some, full), (some_too, full_too) = self.left.coverage(grid), self.right.coverage(grid)
        return some | some_too, full | full_too


@dataclass(frozen=True)
class Not(Mask):
    """The mask inside forbids it."""

    inner: Mask

    def check(self, sizes: Sizes, device: torch.device) -> None:
        self.inner.check(sizes, device)

    def allowed(self, tile: Tile) -> Tensor:
        return ~self.inner.allowed(tile)

    def coverage(self, grid: Grid) -> Coverage:
        some, full = self.inner.coverage(grid)
        return ~full, ~some


@dataclass(frozen=True)
class Band(Mask):
    """Keys at most `left` behind and `right` ahead of the query, both counted without the query's own position."""

    left: int | None
    right: int | None
    align: Align

    def allowed(self, tile: Tile) -> Tensor:
        behind = tile.behind(self.align)
        if self.left is None and self.right is None:
            return torch.ones_like(behind, dtype=torch.bool)
        if self.left is None:
            return behind >= -int(self.right or 0)
        if self.right is None:
            return behind <= self.left
        return (behind >= -self.right) & (behind <= self.left)

    def coverage(self, grid: Grid) -> Coverage:
        offset = grid.sizes.offset(self.align)
        nearest = grid.first_query + offset - grid.last_key
        farthest = grid.last_query + offset - grid.first_key
        some = full = torch.ones_like(nearest, dtype=torch.bool)
        if self.left is not None:
            some, full = some & (nearest <= self.left), full & (farthest <= self.left)
        if self.right is not None:
            some, full = some & (farthest >= -self.right), full & (nearest >= -self.right)
        return some[None], full[None]


@dataclass(frozen=True)
class Before(Mask):
    """The first n keys of each batch row; n is integers of shape (B,), (1,) or ()."""

    n: Tensor

    def check(self, sizes: Sizes, device: torch.device) -> None:
        if not check.is_one_of(self.n.shape, ((sizes.B,), (1,), ())):
            raise ValueError(f"mask: n has shape {tuple(self.n.shape)}; expected one int per row, (B,) = ({sizes.B},)")

    def allowed(self, tile: Tile) -> Tensor:
        return tile.key < tile.cut(self.n.view(-1, 1, 1, 1))

    def coverage(self, grid: Grid) -> Coverage:
        n, rows = self.n.view(-1, 1, 1), grid.first_query.shape[0]
        return (grid.first_key < n).expand(-1, rows, -1), (grid.last_key < n).expand(-1, rows, -1)


@dataclass(frozen=True)
class Documents(Mask):
    """Query and key of the same document; ids of queries (B|1, L) and keys (B|1, S)."""

    queries: Tensor
    keys: Tensor

    def check(self, sizes: Sizes, device: torch.device) -> None:
        for name, ids, length in (("queries", self.queries, sizes.L), ("keys", self.keys, sizes.S)):
            if ids.shape[0] not in (1, sizes.B) or ids.shape[1] != length:
                pair = "; give a pair (queries, keys) where their lengths differ" if sizes.L != sizes.S else ""
                raise ValueError(
                    f"mask: the documents of the {name} have shape {check.shape(ids, 1)}; expected "
                    f"({sizes.B}, {length}) or ({length},){pair}"
                )

    def allowed(self, tile: Tile) -> Tensor:
        return tile.cut(self.queries[:, None, :, None]) == tile.cut(self.keys[:, None, None, :])

    def coverage(self, grid: Grid) -> Coverage:
        (low_q, high_q), (low_k, high_k) = (
            _folded(ids, 1, width).aminmax(dim=2)
            for ids, width in ((self.queries, grid.rows), (self.keys, grid.columns))
        )
        low_q, high_q, low_k, high_k = low_q[..., None], high_q[..., None], low_k[:, None], high_k[:, None]
        some = (low_q <= high_k) & (low_k <= high_q)
        return some, some & (low_q == high_q) & (low_k == high_k)


def _folded(x: Tensor, axis: int, width: int) -> Tensor:
    """An axis in tiles of equal width (tiles, width). The last one may be short: it is filled up with its own last entry,
    which changes neither extreme.
    """
    more = -x.shape[axis] % width
    if more:
        last = x.narrow(axis, -1, 1)
        x = torch.cat([x, last.expand(*[more if n == axis else size for n, size in enumerate(last.shape)])], axis)
    return x.reshape(*x.shape[:axis], x.shape[axis] // width, width, *x.shape[axis + 1 :])


@dataclass(frozen=True)
class Blocks(Mask):
    """A table of which blocks of queries may attend to which blocks of keys: bool (B|1, H|1, L/rows, S/columns)."""

    table: Tensor
    rows: int | None
    columns: int | None

    def size(self, sizes: Sizes) -> tuple[int, int]:
        """How many queries and keys a block holds: by default, the axes are divided evenly, rounded up."""
        rows = self.rows or -(-sizes.L // self.table.shape[2]) or 1
        return rows, self.columns or -(-sizes.S // self.table.shape[3]) or 1

    def check(self, sizes: Sizes, device: torch.device) -> None:
        rows, columns = self.size(sizes)
        shape, blocks = self.table.shape, (-(-sizes.L // rows), -(-sizes.S // columns))
        if shape[2:] != blocks or not check.broadcasts(shape[:2], (sizes.B, sizes.H)):
            given = "" if self.rows else "; give size= where they do not divide the axes evenly"
            raise ValueError(
                f"mask: the block table has shape {check.shape(self.table)}; expected one that broadcasts to "
                f"(B, H, R, C) = {(sizes.B, sizes.H, *blocks)} for L = {sizes.L} queries and S = {sizes.S} keys in "
                f"blocks of {rows} by {columns}{given}"
            )

    def allowed(self, tile: Tile) -> Tensor:
        table = self.table[slice(*tile.b)] if self.table.shape[0] > 1 else self.table
        table = table[:, slice(*tile.h)] if table.shape[1] > 1 else table
        rows, columns = self.size(tile.sizes)
        return table[:, :, tile.query.view(-1, 1) // rows, tile.key.view(-1) // columns]

    def coverage(self, grid: Grid) -> Coverage:
        # A summed-area table tells how many of the blocks that a tile touches are True.
        total = torch.nn.functional.pad(self.table.to(torch.int64).cumsum(-1).cumsum(-2), (1, 0, 1, 0))
        rows, columns = self.size(grid.sizes)
        top, bottom = grid.first_query // rows, grid.last_query // rows + 1
        left, right = grid.first_key // columns, grid.last_key // columns + 1
        count = total[..., bottom, right] - total[..., top, right] - total[..., bottom, left] + total[..., top, left]
        return (count > 0).any(1), (count == (bottom - top) * (right - left)).all(1)


@dataclass(frozen=True)
class Dense(Mask):
    """A bool tensor that broadcasts to (B, H, L, S)."""

    table: Tensor

    def check(self, sizes: Sizes, device: torch.device) -> None:
        full = (sizes.B, sizes.H, sizes.L, sizes.S)
        if not check.broadcasts(self.table.shape, full):
            raise ValueError(
                f"mask: the dense mask has shape {check.shape(self.table)}; expected one that broadcasts to "
                f"(B, H, L, S) = {full} (as (B, L, S) does by table[:, None], and (B, S) by table[:, None, None])"
            )

    def allowed(self, tile: Tile) -> Tensor:
        return tile.cut(self.table)

    def coverage(self, grid: Grid) -> Coverage:
        table = self.table
        rows, columns = grid.first_query.shape[0], grid.first_key.shape[1]
        # Keys, then queries; an axis of size one covers every tile.
        parts = []
        for reduce in (torch.any, torch.all):
            across = table if table.shape[3] == 1 else reduce(_folded(table, 3, grid.columns), 4)
            down = across if table.shape[2] == 1 else reduce(_folded(across, 2, grid.rows), 3)
            parts.append(down.expand(-1, -1, rows, columns))
        return parts[0].any(1), parts[1].all(1)


@dataclass(frozen=True)
class Where(Mask):
    """A predicate in Python, from indices to bools (b, h, l, s); nothing is known of a tile before it is asked."""

    predicate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def check(self, sizes: Sizes, device: torch.device) -> None:
        # Asked about one pair, if there is one, it shows what it gives.
        if not torch.compiler.is_compiling() and sizes.B * sizes.H * sizes.L * sizes.S:
            self.allowed(Tile((0, 1), (0, 1), (0, 1), (0, 1), sizes, device))

    def allowed(self, tile: Tile) -> Tensor:
        out = self.predicate(tile.batch, tile.head, tile.query, tile.key)
        shape = tuple(stop - start for start, stop in (tile.b, tile.h, tile.q, tile.k))
        if not check.is_bools(out) or not check.broadcasts(out.shape, shape):
            name = f"mask: what the predicate of where gives for a part (b, h, l, s) = {shape}"
            raise check.wrong(name, out, "bools that broadcast to it", check.is_bools(out))
        return out


# ---------------------------------------------------------------------------------------------------------------------
# What users call.


def causal(align: Align = None) -> Mask:
    """A query attends to its own position and those before it.

    Args:
        align: where the queries stand among the keys. "start": query 0 beside key 0 (`torch`'s `is_causal`); "end": the
            last query beside the last key (decoding with a cache); a whole number n: query 0 beside key n. It must be
            given when there are not as many queries as keys.
    """
    return Band(None, 0, check.align(align))


def window(left: int | None = None, right: int | None = None, align: Align = None) -> Mask:
    """A query attends to its own position, `left` positions before it and `right` positions after it.

    The query's own token is not counted: `window(255, 0)` reaches 256 keys. None = no limit on that side. `align` is as
    in `causal`, and is taken from the other masks of the same expression where it is left out.

    Source: Beltagy, Peters, Cohan, "Longformer" (2020), section 3.1.
    """
    for name, value in (("left", left), ("right", right)):
        if value is not None:
            check.whole(f"window: {name}", value, 0, ", or None for no limit")
    return Band(left, right, check.align(align))


def lengths(n: Tensor) -> Mask:
    """The first n[b] of all S keys of batch row b are real (more than S: all; less than 0: none). n: integers (B,)."""
    if isinstance(n, list | tuple) and all(check.is_int(part) for part in n):
        n = torch.tensor(n, dtype=torch.int64)
    if not check.is_ints(n) or n.dim() != 1:
        raise check.wrong("lengths: n", n, "integers of shape (B,), or a list of ints", check.is_ints(n))
    return Before(n)


def prefix(n: int | Tensor) -> Mask:
    """Everybody attends to the first n keys, an int or integers of shape (B,). With `causal() |` before it, this is the
    prefix language model of Raffel et al., "T5" (2020), figure 4.
    """
    if check.is_int(n) and n >= 0:
        n = torch.tensor(n)
    if not check.is_ints(n) or n.dim() > 1:
        raise check.wrong("prefix: n", n, "an int >= 0, or integers of shape (B,)", check.is_int(n) or check.is_ints(n))
    return Before(n)


def documents(ids: Tensor | tuple[Tensor, Tensor]) -> Mask:
    """Packed documents: a query attends to the keys of its own document.

    Args:
        ids: integers, the document of each position, shape (B, S) or (S,), for queries and keys alike; or a pair of
            them, for the queries (B, L) and the keys (B, S). Any numbers do; sorted ones let tiles be skipped.
    """
    pair = ids if isinstance(ids, tuple) else (ids, ids)
    if len(pair) != 2:
        raise ValueError(f"documents: ids is a tuple of {len(pair)}; expected a tensor, or a pair (queries, keys)")
    for part in pair:
        if not check.is_ints(part) or part.dim() not in (1, 2):
            raise check.wrong("documents: ids", part, "integers of shape (B, S) or (S,)", check.is_ints(part))
    queries, keys = (part if part.dim() == 2 else part[None] for part in pair)
    return Documents(queries, keys)


def blocks(table: Tensor, size: int | tuple[int, int] | None = None) -> Mask:
    """Block-sparse attention.

    Args:
        table: bool, shape (R, C), (H, R, C) or (B, H, R, C): may this block of queries attend to that block of keys?
        size: how many queries and keys a block holds: a number, or a pair; the last block may be short, so that
            R = ceil(L / size) and C = ceil(S / size). By default the axes are divided evenly.
    """
    if not check.is_bools(table) or table.dim() not in (2, 3, 4) or not table.numel():
        expected = "bool of shape (R, C), (H, R, C) or (B, H, R, C), none of them 0"
        raise check.wrong("blocks: table", table, expected, check.is_bools(table))
    rows, columns = size if isinstance(size, tuple) and len(size) == 2 else (size, size)
    for part in (rows, columns):
        if part is not None and (not check.is_int(part) or part <= 0):
            raise check.wrong("blocks: size", size, "an int > 0, or a tuple of two", isinstance(size, int | tuple))
    return Blocks(table[(None,) * (4 - table.dim())], rows, columns)


def dense(table: Tensor) -> Mask:
    """Any mask, as a bool tensor that broadcasts to (B, H, L, S); True = may attend. It is read, never copied."""
    if not check.is_bools(table) or table.dim() > 4:
        expected = "bool that broadcasts to (B, H, L, S), True = may attend"
        if check.is_floats(table):
            expected += " (a float mask that is added to the scores goes into bias=)"
        raise check.wrong("dense: table", table, expected, check.is_bools(table))
    return Dense(table[(None,) * (4 - table.dim())])


def where(predicate: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> Mask:
    """A mask in Python: `predicate(batch, head, query, key)` takes four index tensors that broadcast together, and
    answers with bool. The `mask_mod` functions of FlexAttention work as they are.
    """
    if not callable(predicate):
        raise check.wrong("where: predicate", predicate, "a function (batch, head, query, key) -> bool tensor", False)
    return Where(predicate)
