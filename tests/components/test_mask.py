"""Masks match predicates in plain Python, and their coverage lets backends skip empty tiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_mask, noop_mask, or_masks

import regard
from regard import mask
from regard.components.mask import Mask
from regard.components.tile import Grid, Sizes, Tile

Predicate = Callable[[int, int, int, int], bool]
CPU = torch.device("cpu")
RUNS = settings(max_examples=150, deadline=None)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def offset(align: Any, L: int, S: int) -> int:
    """Return the key position of query 0."""
    return {"start": 0, "end": S - L}[align] if isinstance(align, str) else align


def table_of(predicate: Predicate, size: Sizes) -> Tensor:
    """Evaluate the predicate for all pairs, bool (B, H, L, S)."""
    table = torch.zeros(size.B, size.H, size.L, size.S, dtype=torch.bool)
    for b, h, i, j in itertools.product(range(size.B), range(size.H), range(size.L), range(size.S)):
        table[b, h, i, j] = predicate(b, h, i, j)
    return table


ALIGNS = st.sampled_from(["start", "end", 0, 3, -2])
EXACT = ("causal", "window", "lengths", "prefix", "sorted", "blocks", "dense")


@st.composite
def sizes(draw: st.DrawFn, least: int = 0) -> Sizes:
    heads, repeats = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    lengths = st.integers(least, 19)
    return Sizes(draw(st.integers(1, 3)), heads * repeats, heads, draw(lengths), draw(lengths))


@st.composite
def leaf(draw: st.DrawFn, size: Sizes, kinds: tuple[str, ...]) -> tuple[Mask, Predicate]:
    """A mask of one of the given kinds, and its predicate on one pair."""
    B, H, L, S = size.B, size.H, size.L, size.S
    kind = draw(st.sampled_from(kinds))
    if kind == "causal":
        align = draw(ALIGNS)
        at = offset(align, L, S)
        return mask.causal(align), lambda b, h, i, j: j <= i + at
    if kind == "window":
        align, left, right = draw(ALIGNS), *(draw(st.none() | st.integers(0, 9)) for _ in range(2))
        at = offset(align, L, S)

        def near(b: int, h: int, i: int, j: int) -> bool:
            behind = i + at - j
            return (left is None or behind <= left) and (right is None or -behind <= right)

        return mask.window(left, right, align), near
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    if kind in ("lengths", "prefix"):
        n = draw(st.lists(st.integers(-2, S + 2), min_size=B, max_size=B))
        if kind == "prefix" and draw(st.booleans()):
            return mask.prefix(abs(n[0])), lambda b, h, i, j: j < abs(n[0])
        constructor = mask.lengths if kind == "lengths" else mask.prefix
        return constructor(torch.tensor(n, dtype=dtype)), lambda b, h, i, j: j < n[b]
    seed = draw(st.integers(0, 1 << 32))
    generator = torch.Generator().manual_seed(seed)
    if kind in ("documents", "sorted"):
        rows = draw(st.sampled_from([1, B]))
        # If sorted, queries and keys have the same documents: `coverage` is exact only without gaps.
        docs = min(L, S, 4) if kind == "sorted" else 0
        each = torch.arange(docs).expand(rows, -1)
        random = [torch.randint(0, docs or 4, (rows, length - docs), generator=generator) for length in (L, S)]
        ids = [torch.cat([each, part], 1).to(dtype) for part in random]
        ids = [part.sort(-1).values for part in ids] if docs else ids
        arguments = [part[0] if rows == 1 and draw(st.booleans()) else part for part in ids]
        q, k = (part.expand(B, -1).tolist() for part in ids)
        return mask.documents(tuple(arguments)), lambda b, h, i, j: q[b][i] == k[b][j]
    if kind == "blocks":
        high, wide = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        shape = draw(st.sampled_from([(), (1,), (H,), (1, H), (B, 1), (B, H)]))
        table = torch.rand(*shape, max(-(-L // high), 1), max(-(-S // wide), 1), generator=generator) < 0.5
        if L and S:
            expanded = table.expand(B, H, *table.shape[-2:]).tolist()
            return mask.blocks(table, (high, wide)), lambda b, h, i, j: expanded[b][h][i // high][j // wide]
    shape = tuple(draw(st.sampled_from([1, n])) for n in (B, H, L, S))[draw(st.integers(0, 3)) :]
    table = torch.rand(*shape, generator=generator) < 0.6
    if kind == "where":
        view = table.expand(B, H, L, S)
        return mask.where(lambda b, h, i, j: view[b, h, i, j]), lambda b, h, i, j: bool(view[b, h, i, j])
    listed = table.expand(B, H, L, S).tolist()
    return mask.dense(table), lambda b, h, i, j: listed[b][h][i][j]


@st.composite
def tree(draw: st.DrawFn, size: Sizes, depth: int = 3) -> tuple[Mask, Predicate]:
    """A random composition."""
    joint = draw(st.sampled_from(["leaf", "&", "|", "~"])) if depth else "leaf"
    if joint == "leaf":
        return draw(leaf(size, (*EXACT, "documents", "where")))
    left, predicate = draw(tree(size, depth - 1))
    if joint == "~":
        return ~left, lambda *pair: not predicate(*pair)
    right, other_predicate = draw(tree(size, depth - 1))
    if joint == "&":
        return left & right, lambda *pair: predicate(*pair) and other_predicate(*pair)
    return left | right, lambda *pair: predicate(*pair) or other_predicate(*pair)


def some_range(draw: Callable[..., Any], length: int) -> tuple[int, int]:
    start = draw(st.integers(0, length - 1))
    return start, draw(st.integers(start + 1, length))


@RUNS
@given(st.data())
def test_allowed_matches_predicate_on_tiles(data: st.DataObject) -> None:
    size = data.draw(sizes(least=1))
    built, predicate = data.draw(tree(size))
    built.check(size, CPU)
    table = table_of(predicate, size)
    for _ in range(4):
        b, q, k = (some_range(data.draw, n) for n in (size.B, size.L, size.S))
        h = data.draw(st.sampled_from([(0, size.H), (0, size.H // size.G), (size.H - 1, size.H)]))
        got = built.allowed(Tile(b, h, q, k, size, CPU))
        expected = table[slice(*b), slice(*h), slice(*q), slice(*k)]
        assert got.dtype == torch.bool
        assert torch.equal(got.expand(expected.shape), expected)


def tiles(table: Tensor, rows: int, columns: int, reduce: str) -> Tensor:
    """`any` or `all` over the heads and pairs of each tile: bool (B, R, C)."""
    B, _, L, S = table.shape
    result = torch.zeros(B, -(-L // rows), -(-S // columns), dtype=torch.bool)
    for b, r, c in itertools.product(*map(range, result.shape)):
        part = table[b, :, r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
        result[b, r, c] = getattr(part, reduce)()
    return result


TILE = st.integers(1, 8)


@RUNS
@given(st.data(), TILE, TILE)
def test_coverage_of_compositions_is_sound(data: st.DataObject, rows: int, columns: int) -> None:
    size = data.draw(sizes())
    built, predicate = data.draw(tree(size))
    built.check(size, CPU)
    some, full = built.coverage(Grid.of(size, rows, columns, CPU))
    table = table_of(predicate, size)
    expected_some, expected_full = tiles(table, rows, columns, "any"), tiles(table, rows, columns, "all")
    assert not (expected_some & ~some.expand_as(expected_some)).any(), "a tile reported as empty contains a pair"
    assert not (full.expand_as(expected_full) & ~expected_full).any(), "a tile reported as full lacks a pair"


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=TILE, columns=TILE)
def test_coverage_of_single_masks_is_exact(kind: str, data: st.DataObject, rows: int, columns: int) -> None:
    size = data.draw(sizes())
    built, predicate = data.draw(leaf(size, (kind,)))
    if data.draw(st.booleans()):
        built, positive = ~built, predicate
        predicate = lambda *pair: not positive(*pair)  # noqa: E731
    some, full = built.coverage(Grid.of(size, rows, columns, CPU))
    table = table_of(predicate, size)
    assert torch.equal(some.expand(size.B, -1, -1), tiles(table, rows, columns, "any"))
    assert torch.equal(full.expand(size.B, -1, -1), tiles(table, rows, columns, "all"))


def test_coverage_with_one_unknown_operand() -> None:
    """One operand can decide that a tile is empty or full, even if the other one is unknown."""
    unknown = mask.where(lambda b, h, i, j: (i + j) % 2 == 0)
    grid = Grid.of(Sizes(1, 1, 1, 8, 8), 4, 4, CPU)
    some, full = (unknown & mask.prefix(4)).coverage(grid)
    assert some.tolist() == [[[True, False], [True, False]]]
    assert not full.any()
    some, full = (unknown | mask.prefix(4)).coverage(grid)
    assert some.all()
    assert full.tolist() == [[[True, False], [True, False]]]


# ---------------------------------------------------------------------------------------------------------------------
# Empty tiles.


def scored(built: Mask | None, B: int, L: int, S: int, backward: bool = False) -> tuple[float, float]:
    """Return the fraction of all pairs that `tiled` scores, forward and backward, counted in the score function."""
    q, k, v = (torch.randn(B, 1, n, 1, requires_grad=backward) for n in (L, S, S))
    pairs = 0

    def count(q: Tensor, k: Tensor) -> Tensor:
        nonlocal pairs
        s = q @ k.mT
        pairs += s.numel()
        return s

    out = regard.attention(q, k, v, score=count, mask=built, backend="tiled")
    forward, pairs = pairs, 0
    if backward:
        out.sum().backward()
    return forward / (B * L * S), pairs / (B * L * S)


ids = torch.arange(4096) // 250
table = torch.zeros(64, 64, dtype=torch.bool)
table[:, ::16] = True


@pytest.mark.parametrize(
    ("built", "B", "L", "S", "most"),
    [
        (mask.window(63, 0), 1, 4096, 4096, 0.047),
        (mask.window(63, 63), 1, 4096, 4096, 0.062),
        (mask.causal() & mask.window(63), 1, 4096, 4096, 0.047),
        (mask.window(63, 0) | mask.prefix(64), 1, 4096, 4096, 0.062),
        (mask.causal(), 1, 4096, 4096, 0.516),
        (~mask.causal(), 1, 4096, 4096, 0.516),
        (mask.causal("end"), 1, 64, 4096, 1.001),
        (mask.causal("start"), 1, 64, 4096, 0.016),
        (mask.lengths(torch.tensor([64, 100, 2048, 0])), 4, 256, 2048, (64 + 128 + 2048) / (4 * 2048) + 0.001),
        (mask.documents(ids), 1, 4096, 4096, 0.106),
        (mask.causal() & mask.documents(ids), 1, 4096, 4096, 0.067),
        (mask.blocks(table), 1, 4096, 4096, 0.063),
        (mask.dense(table.repeat_interleave(64, 0).repeat_interleave(64, 1)), 1, 4096, 4096, 0.063),
        (mask.prefix(0), 1, 4096, 4096, 0.001),
    ],
)
def test_empty_tiles_are_skipped(built: Mask, B: int, L: int, S: int, most: float) -> None:
    forward, _ = scored(built, B, L, S)
    assert forward < most


def test_empty_tiles_are_skipped_backward() -> None:
    """The backward pass scores the same tiles as the forward pass, at most twice."""
    forward, backward = scored(mask.window(63, 0), 1, 1024, 1024, backward=True)
    assert 0 < forward < 0.13
    assert 0 < backward < 2 * 0.13


# ---------------------------------------------------------------------------------------------------------------------
# Other arguments.


def banded(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i - j).abs() <= 3


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def one_head(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (h == 1) | (b == 0)


some_ids = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 3]])


def same_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return some_ids[b, i] == some_ids[b, j]


@pytest.mark.parametrize(
    "mask_mod",
    [banded, causal, one_head, same_document, noop_mask, and_masks(causal, same_document), or_masks(banded, one_head)],
)
def test_flex_attention_mask_functions(mask_mod: Any) -> None:
    q, k, v = (torch.randn(2, 3, 8, 4) for _ in range(3))
    table = create_mask(mask_mod, 2, 3, 8, 8, device="cpu")
    for backend in ("tiled", "reference"):
        out = regard.attention(q, k, v, mask=mask.where(mask_mod), backend=backend)
        assert torch.equal(out, regard.attention(q, k, v, mask=mask.dense(table), backend=backend))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 1, n, 4) for n in (8, 8, 8))
    n = torch.tensor([3, 7])
    for constructor, tensor in ((mask.lengths, n), (mask.prefix, n), (mask.documents, some_ids)):
        expected = regard.attention(q, k, v, mask=constructor(tensor))
        assert torch.equal(regard.attention(q, k, v, mask=constructor(tensor.to(dtype))), expected)
    mixed = mask.documents((some_ids.to(dtype), some_ids))
    assert torch.equal(regard.attention(q, k, v, mask=mixed), expected)
    assert torch.equal(full_of(mask.lengths([3, 7])), full_of(mask.lengths(n)))
    assert torch.equal(full_of(mask.prefix(torch.tensor(3, dtype=dtype))), full_of(mask.prefix(3)))


def full_of(built: Mask) -> Tensor:
    q = torch.ones(2, 1, 8, 4)
    return regard.attention(q, q, q, mask=built, summary=regard.Summary(full=True))[1].full
