"""Alignment of queries and keys: of the whole, of each batch row and of each document; axes of masks and queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard import mask
from regard.components.mask import Mask


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------------------
# Alignment.

q, k, v = torch.randn(1, 2, 5, 3), torch.randn(1, 2, 8, 3), torch.randn(1, 2, 8, 4)


def full(built: Mask | None = None, q: Tensor = q, **more: Any) -> Tensor:
    """Return the weights (B, H, L, S)."""
    _, stats = regard.attention(q, k, v, mask=built, summary=regard.Summary(full=True), **more)
    return stats.full


@pytest.mark.parametrize(("align", "first"), [("start", 0), ("end", 3), (2, 2), (-1, -1), (0, 0), (7, 7)])
def test_align_sets_position_of_query_0(align: Any, first: int) -> None:
    expected = torch.tensor([[j <= i + first for j in range(8)] for i in range(5)])
    assert torch.equal(full(mask.causal(align)) > 0, expected.expand(1, 2, 5, 8))
    assert torch.equal(
        full(mask.window(1, 0, align) | ~mask.window(None, 0, align)) > 0,
        torch.tensor([[j - i - first in (-1, 0) or j > i + first for j in range(8)] for i in range(5)]).expand(
            1, 2, 5, 8
        ),
    )


@pytest.mark.parametrize("align", ["start", "end", 2])
def test_align_is_inherited_within_mask(align: Any) -> None:
    everywhere = full(mask.causal(align) & mask.window(2, align=align) | ~mask.causal(align) & mask.prefix(1))
    assert torch.equal(full(mask.causal(align) & mask.window(2) | ~mask.causal() & mask.prefix(1)), everywhere)
    assert torch.equal(full(mask.causal() & mask.window(2, align=align) | ~mask.causal() & mask.prefix(1)), everywhere)


@pytest.mark.parametrize("align", ["start", "end", 2])
def test_align_is_inherited_between_mask_and_bias(align: Any) -> None:
    learned = torch.randn(8, 2)
    for bias in (regard.position.ALiBi, lambda align=None: regard.position.T5(learned, max_distance=9, align=align)):
        everywhere = full(mask.causal(align), bias=bias(align=align))
        assert torch.equal(full(mask.causal(align), bias=bias()), everywhere)
        assert torch.equal(full(mask.causal(), bias=bias(align=align)), everywhere)
        assert torch.equal(full(bias=bias(align=align)), full(mask.prefix(8), bias=bias(align=align)))


def test_align_is_optional_for_equal_lengths() -> None:
    square = k[:, :, :, :3]
    for align in ("start", "end", 0):
        assert torch.equal(full(mask.causal(), square), full(mask.causal(align), square))
    # An int shifts the queries on every backend.
    moved = torch.tensor([[j <= i + 2 for j in range(8)] for i in range(8)])
    for backend in (None, "tiled", "reference"):
        assert torch.equal(full(mask.causal(2), square, backend=backend) > 0, moved.expand(1, 2, 8, 8))
    out = regard.attention(square, k, v[..., :3], mask=mask.causal(2))
    assert torch.allclose(out, full(mask.causal(2), square) @ v[..., :3], atol=1e-6)


def test_masks_with_different_align() -> None:
    got = full(mask.causal("start") | mask.window(0, 0, "end")) > 0
    expected = torch.tensor([[j <= i or j == i + 3 for j in range(8)] for i in range(5)])
    assert torch.equal(got, expected.expand(1, 2, 5, 8))


# ---------------------------------------------------------------------------------------------------------------------
# Alignment of each batch row and document.

_NATIVE_AND_PLAIN = ("cpu", "tiled", "reference", None)


def _random_qkv(L: int, S: int, batch: int = 1) -> list[Tensor]:
    torch.manual_seed(L + S)
    return [torch.randn(batch, heads, n, 8) for heads, n in ((4, L), (2, S), (2, S))]


@pytest.mark.parametrize("backend", _NATIVE_AND_PLAIN)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [([2, 3], [4, 5]), ([1, 1, 1], [70, 3, 130]), ([100, 5], [100, 90]), ([3, 2, 4], [3, 0, 9]), ([5, 4], [2, 9])],
)
def test_causal_aligned_with_documents_equals_one_call_per_document(
    queries: list[int], keys: list[int], backend: str | None
) -> None:
    q, k, v = _random_qkv(sum(queries), sum(keys))
    ids = [torch.arange(len(n)).repeat_interleave(torch.tensor(n))[None] for n in (queries, keys)]
    documents = mask.documents((ids[0], ids[1]))
    offsets = [torch.tensor([0, *n]).cumsum(0) for n in (queries, keys)]
    sequences = mask.packed(*offsets)
    expected = []
    for a, b, c in zip(q.split(queries, 2), k.split(keys, 2), v.split(keys, 2), strict=True):
        expected.append(regard.attention(a, b, c, mask=mask.causal("end"), backend="reference"))
    for of in (documents, sequences):
        out = regard.attention(q, k, v, mask=of & mask.causal(align=of), backend=backend)
        torch.testing.assert_close(out, torch.cat(expected, 2), rtol=1e-4, atol=1e-5)
        windows = of & mask.window(2, 0, align=of)
        narrow = [
            regard.attention(a, b, c, mask=mask.window(2, 0, "end"), backend="reference")
            for a, b, c in zip(q.split(queries, 2), k.split(keys, 2), v.split(keys, 2), strict=True)
        ]
        out = regard.attention(q, k, v, mask=windows, backend=backend)
        torch.testing.assert_close(out, torch.cat(narrow, 2), rtol=1e-4, atol=1e-5)


def test_causal_aligned_with_documents_out_of_order() -> None:
    """Positions of a document need not be adjacent."""
    q, k, v = _random_qkv(7, 9)
    ids_q, ids_k = torch.tensor([[5, 2, 5, 5, 2, 9, 2]]), torch.tensor([[2, 5, 2, 5, 5, 5, 2, 2, 7]])
    of = mask.documents((ids_q, ids_k))
    out = regard.attention(q, k, v, mask=of & mask.causal(align=mask.documents((ids_q, ids_k))), backend="reference")
    last = {2: 7, 5: 5}
    for i, n in enumerate(ids_q[0].tolist()):
        if n not in last:
            assert bool((out[0, :, i] == 0).all())
            continue
        position = last[n] - int((ids_q[0, i + 1 :] == n).sum())
        keys = [j for j in range(9) if ids_k[0, j] == n and j <= position]
        alone = regard.attention(q[:, :, i : i + 1], k[:, :, keys], v[:, :, keys])
        torch.testing.assert_close(out[:, :, i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", _NATIVE_AND_PLAIN)
@pytest.mark.parametrize("L", [1, 4, 70])
def test_causal_aligned_with_lengths_equals_one_call_per_row(L: int, backend: str | None) -> None:
    """As in decoding with a cache whose rows have different lengths."""
    n = torch.tensor([131, 70, 200])
    q, k, v = _random_qkv(L, 200, 3)
    out = regard.attention(q, k, v, mask=mask.lengths(n) & mask.causal(align=mask.lengths(n)), backend=backend)
    starts = regard.attention(q, k, v, mask=mask.causal(align=n - L), backend=backend)
    torch.testing.assert_close(starts, out)
    for b, end in enumerate(n.tolist()):
        one = regard.attention(
            q[b : b + 1], k[b : b + 1, :, :end], v[b : b + 1, :, :end], mask=mask.causal("end"), backend="reference"
        )
        torch.testing.assert_close(out[b : b + 1], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (mask.lengths([3, 9]), "lengths"),
        (mask.documents((torch.zeros(1, 5).long(), torch.zeros(1, 9).long())), "documents"),
    ],
)
def test_end_beside_lengths_or_documents_is_refused(of: mask.Mask, name: str) -> None:
    q, k, v = _random_qkv(5, 9, 2)
    for joined in (of & mask.causal("end"), mask.prefix(2) & (mask.window(3, None) & of) & mask.causal("end")):
        with pytest.raises(ValueError, match=rf"expected align=mask.{name}.* or align=4 to align the last query"):
            regard.attention(q, k, v, mask=joined)
    whole = regard.attention(q, k, v, mask=of & mask.causal(4))
    assert whole.shape == q.shape
    # Neither for as many queries as keys, nor beside OR, is there another meaning.
    regard.attention(k, k, v, mask=mask.lengths([3, 9]) & mask.causal("end"))
    regard.attention(q, k, v, mask=mask.lengths([3, 9]) | mask.causal("end"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mask.causal(align=torch.zeros(2, 2, 2).long()), "causal: align is an int64 tensor of shape"),
        (lambda: mask.causal(align=torch.zeros(2)), "causal: align is a float32 tensor"),
        (lambda: mask.window(1, 0, align=mask.causal()), "window: align is an object of class Band"),
        (lambda: mask.packed(torch.tensor([1, 2])), "packed: queries is .*expected 0, then cumulative lengths"),
        (lambda: mask.packed(torch.tensor([0, 3, 2])), "packed: queries is .*expected 0, then cumulative lengths"),
        (
            lambda: mask.packed(torch.tensor([0, 2]), torch.tensor([0, 1, 2])),
            "packed: keys has 3 offsets but queries has 2",
        ),
        (lambda: mask.packed([0, 2]), "packed: queries is .*expected offsets of N sequences"),
        (lambda: _attend(mask.causal(align=torch.zeros(3).long())), r"mask: align has shape \(3, 1\); expected"),
        (lambda: _attend(mask.packed(torch.tensor([0, 4]))), "mask: the documents of the queries have shape"),
    ],
)
def test_invalid_alignment_raises(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def _attend(of: mask.Mask) -> Tensor:
    q, k, v = _random_qkv(5, 9, 2)
    return regard.attention(q, k, v, mask=of)


# ---------------------------------------------------------------------------------------------------------------------
# Axes.


@pytest.mark.parametrize("is_cached", [False, True])
def test_table_of_three_axes_is_per_batch_row_without_heads(is_cached: bool) -> None:
    q, k = torch.randn(3, 5, 8), torch.randn(3, 7, 8)
    dense, blocks = torch.rand(3, 5, 7) > 0.4, torch.rand(3, 2, 3) > 0.3
    calls = {
        "dense": (mask.dense(dense), dense),
        "joined": (~mask.dense(dense) & mask.causal("start"), ~dense & torch.ones(5, 7, dtype=torch.bool).tril()),
        "blocks": (mask.blocks(blocks, 3), blocks.repeat_interleave(3, 1)[:, :5].repeat_interleave(3, 2)[:, :, :7]),
    }
    for of, table in calls.values():
        if is_cached:
            regard.attention(q, k, k, mask=of)
        out = regard.attention(q, k, k, mask=of)
        torch.testing.assert_close(
            out, regard.attention(q[:, None], k[:, None], k[:, None], mask=mask.dense(table[:, None]))[:, 0]
        )


def test_queries_of_one_row_broadcast() -> None:
    for lead_q, lead_k in (
        ((1, 4), (3, 2)),
        ((1,), (3,)),
        ((1, 3, 4), (2, 3, 2)),
        ((2, 1, 4), (2, 3, 2)),
        ((1, 3, 4), (2, 1, 2)),
    ):
        q, k = torch.randn(*lead_q, 5, 8, requires_grad=True), torch.randn(*lead_k, 7, 8)
        batch = (
            torch.broadcast_shapes(lead_q[:-1], lead_k[:-1])
            if len(lead_q) > 1
            else torch.broadcast_shapes(lead_q, lead_k)
        )
        heads = lead_q[-1:] if len(lead_q) > 1 else ()
        full_q = q.expand(*batch, *heads, 5, 8)
        full_k = k.expand(*batch, *(lead_k[-1:] if len(lead_k) > 1 else ()), 7, 8)
        out, stats = regard.attention(q, k, k, mask=mask.causal("end"), summary=regard.Summary(lse=True))
        expected = regard.attention(full_q, full_k, full_k, mask=mask.causal("end"))
        assert out.shape == full_q.shape
        assert stats.lse.shape == full_q.shape[:-1]
        torch.testing.assert_close(out, expected)
        got, exact = (torch.autograd.grad(x.square().sum(), q)[0] for x in (out, expected))
        torch.testing.assert_close(got, exact)
    with pytest.raises(ValueError, match="expected the batch dimensions of q"):
        regard.attention(torch.randn(2, 4, 5, 8), torch.randn(3, 4, 5, 8), torch.randn(3, 4, 5, 8))
