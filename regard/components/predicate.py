"""The classes of masks: predicates on pairs of a query and a key. Users call the functions of `mask`.

Backends match on these classes: the native and Triton kernels evaluate most of them without a tensor (L, S).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard import check
from regard.components.tile import Align, Grid, Sizes, Tile
from regard.tracing import has_values

# Two bool tensors per tile of a grid, which broadcast to (B, R, C): whether any pair may attend (False only if the tile
# is empty), and whether all pairs may (True only if it is full).
Coverage = tuple[Tensor, Tensor]
# More than any number of positions.
_UNLIMITED = 1 << 40


@dataclass(frozen=True)
class Mask:
    """Base class of masks, with the operators `&` (and), `|` (or) and `~` (not)."""

    # Whether `check` depends on the lengths L and S: then plans are cached per length.
    depends_on_lengths = False

    def __and__(self, other: Mask) -> Mask:
        return And(self, _operand(other, "&"))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _operand(other, "|"))

    # Reached only if the left operand is not a mask: `_operand` raises an error that explains the remedy.
    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value; join masks with &, | and ~ instead of and, or and not")

    def allowed(self, tile: Tile) -> Tensor:
        """Return which pairs of a tile may attend: a bool tensor that broadcasts to (b, h, l, s)."""
        raise NotImplementedError

    def coverage(self, grid: Grid) -> Coverage:
        """Return which tiles contain any, and which only, pairs that may attend. By default all tiles are partial."""
        unknown = torch.ones(1, grid.first_query.shape[0], grid.first_key.shape[1], dtype=torch.bool)
        return unknown.to(grid.first_query.device), ~unknown.to(grid.first_query.device)

    @property
    def integers(self) -> tuple[int, ...]:
        """Up to four integers that, with the tensors, determine the mask: what the native kernels read of it."""
        return ()

    def check(self, sizes: Sizes, device: torch.device) -> None:
        """Raise a ValueError or TypeError if the mask does not fit the sizes of the problem."""


def _operand(other: object, sign: str) -> Mask:
    if not isinstance(other, Mask):
        raise check.error(f"mask: one side of {sign}", other, "a mask (wrap a bool tensor in mask.dense)", False)
    return other


@dataclass(frozen=True)
class BinaryMask(Mask):
    """Base class of two combined masks."""

    left: Mask
    right: Mask

    def check(self, sizes: Sizes, device: torch.device) -> None:
        self.left.check(sizes, device)
        self.right.check(sizes, device)


@dataclass(frozen=True)
class And(BinaryMask):
    """Pairs that both masks allow."""

    def allowed(self, tile: Tile) -> Tensor:
        return self.left.allowed(tile) & self.right.allowed(tile)

    def coverage(self, grid: Grid) -> Coverage:
        (some, full), (other_some, other_full) = self.left.coverage(grid), self.right.coverage(grid)
        return some & other_some, full & other_full


@dataclass(frozen=True)
class Or(BinaryMask):
    """Pairs that at least one mask allows."""

    def allowed(self, tile: Tile) -> Tensor:
        return self.left.allowed(tile) | self.right.allowed(tile)

    def coverage(self, grid: Grid) -> Coverage:
        (some, full), (other_some, other_full) = self.left.coverage(grid), self.right.coverage(grid)
        return some | other_some, full | other_full


@dataclass(frozen=True)
class Not(Mask):
    """Pairs that the inner mask does not allow."""

    inner: Mask

    def check(self, sizes: Sizes, device: torch.device) -> None:
        self.inner.check(sizes, device)

    def allowed(self, tile: Tile) -> Tensor:
        return ~self.inner.allowed(tile)

    def coverage(self, grid: Grid) -> Coverage:
        some, full = self.inner.coverage(grid)
        return ~full, ~some


def leaves(mask: Mask | None) -> list[Mask]:
    """Return the masks that `&`, `|` and `~` combine, in order."""
    if isinstance(mask, BinaryMask):
        return leaves(mask.left) + leaves(mask.right)
    if isinstance(mask, Not):
        return leaves(mask.inner)
    return [] if mask is None else [mask]


def map_masks(mask: Mask, change: Callable[[Mask], Mask]) -> Mask:
    """Return a combination of masks with each of them changed."""
    if isinstance(mask, BinaryMask):
        return type(mask)(map_masks(mask.left, change), map_masks(mask.right, change))
    return Not(map_masks(mask.inner, change)) if isinstance(mask, Not) else change(mask)


def conjuncts(mask: Mask | None) -> list[Mask]:
    """Return the masks that the outermost `&` combine, in order."""
    if isinstance(mask, And):
        return conjuncts(mask.left) + conjuncts(mask.right)
    return [] if mask is None else [mask]


def _limits(left: int | None, right: int | None) -> tuple[int, int]:
    """Return the limits of a band as integers."""
    return _UNLIMITED if left is None else min(left, _UNLIMITED), _UNLIMITED if right is None else min(
        right, _UNLIMITED
    )


def _coverage(nearest: Tensor, farthest: Tensor, left: int | None, right: int | None) -> Coverage:
    """Return the coverage of a band, from the extremes of query position minus key position in each tile."""
    some = full = torch.ones_like(nearest, dtype=torch.bool)
    if left is not None:
        some, full = some & (nearest <= left), full & (farthest <= left)
    if right is not None:
        some, full = some & (farthest >= -right), full & (nearest >= -right)
    return some, full


@dataclass(frozen=True)
class Band(Mask):
    """Keys from `left` positions before to `right` positions after the query; its own position is not counted."""

    left: int | None
    right: int | None
    align: Align

    @property
    def integers(self) -> tuple[int, ...]:
        offset = 0 if self.align is None or isinstance(self.align, str) else self.align
        return offset, int(self.align == "end"), *_limits(self.left, self.right)

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
        some, full = _coverage(nearest, farthest, self.left, self.right)
        return some[None], full[None]


@dataclass(frozen=True)
class Before(Mask):
    """The first n keys of each batch row; n is an integer tensor of shape (B,), (1,) or ()."""

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
    """Pairs of the same document, from document ids of queries (B|1, L) and keys (B|1, S)."""

    depends_on_lengths = True

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
            _in_tiles(ids, 1, width).aminmax(dim=2)
            for ids, width in ((self.queries, grid.rows), (self.keys, grid.columns))
        )
        low_q, high_q, low_k, high_k = low_q[..., None], high_q[..., None], low_k[:, None], high_k[:, None]
        some = (low_q <= high_k) & (low_k <= high_q)
        return some, some & (low_q == high_q) & (low_k == high_k)


def _in_tiles(x: Tensor, axis: int, width: int) -> Tensor:
    """Split a dimension into (tiles, width). A short last tile is padded with its last element, which changes neither
    its minimum nor its maximum.
    """
    more = -x.shape[axis] % width
    if more:
        last = x.narrow(axis, -1, 1)
        x = torch.cat([x, last.expand(*[more if n == axis else size for n, size in enumerate(last.shape)])], axis)
    return x.reshape(*x.shape[:axis], x.shape[axis] // width, width, *x.shape[axis + 1 :])


@dataclass(frozen=True)
class Blocks(Mask):
    """Which blocks of queries may attend to which blocks of keys: bool (B|1, H|1, L/rows, S/columns)."""

    depends_on_lengths = True

    table: Tensor
    rows: int | None
    columns: int | None

    @property
    def integers(self) -> tuple[int, ...]:
        return self.rows or 0, self.columns or 0

    def size(self, sizes: Sizes) -> tuple[int, int]:
        """Return the number of queries and keys per block; by default the dimensions are divided evenly, rounded up."""
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
        # A summed-area table gives the number of True blocks that a tile overlaps.
        total = torch.nn.functional.pad(self.table.to(torch.int64).cumsum(-1).cumsum(-2), (1, 0, 1, 0))
        rows, columns = self.size(grid.sizes)
        top, bottom = grid.first_query // rows, grid.last_query // rows + 1
        left, right = grid.first_key // columns, grid.last_key // columns + 1
        count = total[..., bottom, right] - total[..., top, right] - total[..., bottom, left] + total[..., top, left]
        return (count > 0).any(1), (count == (bottom - top) * (right - left)).all(1)


@dataclass(frozen=True)
class Dense(Mask):
    """A bool tensor that broadcasts to (B, H, L, S)."""

    depends_on_lengths = True

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
        # Reduce keys, then queries. A dimension of size 1 covers every tile.
        parts = []
        for reduce in (torch.any, torch.all):
            across = table if table.shape[3] == 1 else reduce(_in_tiles(table, 3, grid.columns), 4)
            down = across if table.shape[2] == 1 else reduce(_in_tiles(across, 2, grid.rows), 3)
            parts.append(down.expand(-1, -1, rows, columns))
        return parts[0].any(1), parts[1].all(1)


@dataclass(frozen=True)
class Where(Mask):
    """A Python function from index tensors to a bool tensor (b, h, l, s). Its coverage is unknown."""

    predicate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def check(self, sizes: Sizes, device: torch.device) -> None:
        # Call it for one pair, which validates its result.
        if has_values() and sizes.B * sizes.H * sizes.L * sizes.S:
            self.allowed(Tile((0, 1), (0, 1), (0, 1), (0, 1), sizes, device))

    def allowed(self, tile: Tile) -> Tensor:
        out = self.predicate(tile.batch, tile.head, tile.query, tile.key)
        check_allowed(out, tile.shape)
        return out


def check_allowed(out: object, shape: Sequence[int]) -> None:
    """Raise unless the result of the predicate for a tile of this shape fits it."""
    name = "mask: the result of the predicate of where"
    check.result_for_tile(name, out, shape, check.is_bool_tensor(out), "bool")


@dataclass(frozen=True)
class AlignedBand(Mask):
    """Keys from `left` positions before to `right` positions after the query, whose position is that of a tensor.

    Query i of batch row b has the position `position[b, i]`, for a tensor (B|1, L); for a tensor (B|1, 1) the position
    `position[b, 0] + i`, minus L if `from_end`.
    """

    left: int | None
    right: int | None
    position: Tensor
    from_end: bool = False

    @property
    def depends_on_lengths(self) -> bool:  # type: ignore[override]
        return self.position.shape[1] > 1

    @property
    def integers(self) -> tuple[int, ...]:
        return *_limits(self.left, self.right), int(self.from_end)

    def positions(self, sizes: Sizes) -> Tensor:
        """Return the positions of all queries, (B|1, L)."""
        if self.position.shape[1] > 1:
            return self.position
        return self.position + torch.arange(sizes.L, device=self.position.device) - (sizes.L if self.from_end else 0)

    def check(self, sizes: Sizes, device: torch.device) -> None:
        shape = self.position.shape
        if shape[0] not in (1, sizes.B) or shape[1] not in (1, sizes.L):
            raise ValueError(
                f"mask: align has shape {check.shape(self.position, 1)}; expected the key position of query 0 of each row, "
                f"(B,) = ({sizes.B},), or of each query, (B, L) = {(sizes.B, sizes.L)}"
            )

    def allowed(self, tile: Tile) -> Tensor:
        behind = tile.cut(self.positions(tile.sizes)[:, None, :, None]) - tile.key
        allowed = torch.ones_like(behind, dtype=torch.bool)
        allowed = allowed if self.left is None else allowed & (behind <= self.left)
        return allowed if self.right is None else allowed & (behind >= -self.right)

    def coverage(self, grid: Grid) -> Coverage:
        first, last = _in_tiles(self.positions(grid.sizes), 1, grid.rows).aminmax(dim=2)
        nearest, farthest = first[..., None] - grid.last_key, last[..., None] - grid.first_key
        return _coverage(nearest, farthest, self.left, self.right)
