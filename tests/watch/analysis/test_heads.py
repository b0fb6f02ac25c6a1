"""Statistics of heads from the largest weights of each row, against those of the full matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.records import make_record, random_weights
from torch import Tensor

from regard.watch import compare, differing, heads, share, similarity

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 1, 5, 3])
SIZE = len(IDS)


def full_weights(causal: bool = False, seed: int = 0, batch: int = 2, count: int = 3) -> Tensor:
    return random_weights(batch, count, SIZE, SIZE, seed=seed, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ids", [IDS, IDS.expand(2, -1), IDS.tolist(), [f"w{n}" for n in IDS.tolist()]])
def test_heads_exact_with_all_weights(causal: bool, ids: object) -> None:
    p = full_weights(causal)
    result = heads(make_record(p, causal=causal), ids)  # type: ignore[arg-type]
    i, j = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    torch.testing.assert_close(result.distance, (p * (i - j).abs()).sum((-1, -2)) / SIZE)
    torch.testing.assert_close(result.first, p[..., 0].mean(-1))
    torch.testing.assert_close(result.previous, (p * (j == i - 1)).sum((-1, -2)) / SIZE)
    torch.testing.assert_close(result.itself, p.diagonal(dim1=-2, dim2=-1).mean(-1))
    torch.testing.assert_close(result.entropy, torch.special.entr(p).sum(-1).mean(-1))
    copy = (IDS[:, None] == IDS) & (j < i)
    has = copy.any(-1)
    torch.testing.assert_close(result.same, (p * copy).sum(-1)[..., has].mean(-1))
    after = torch.zeros_like(copy)
    after[:, 1:] = copy[:, :-1]
    torch.testing.assert_close(result.induction, (p * after).sum(-1)[..., has].mean(-1))
    assert float(result.unknown.max()) < 1e-6


def test_heads_bounds_with_few_weights() -> None:
    p = full_weights()
    exact, partial = heads(make_record(p), IDS), heads(make_record(p, k=3), IDS)
    torch.testing.assert_close(partial.first, exact.first)  # from `received`
    for name in ("previous", "itself"):
        low, expected = getattr(partial, name), getattr(exact, name)
        assert bool((low <= expected + 1e-6).all())
        assert bool((expected <= low + partial.unknown + 1e-6).all())
    assert float(partial.unknown.min()) > 0.05
    assert bool(heads(make_record(p)).induction.isnan().all()), "no tokens given"
    assert bool(heads(make_record(p), list(range(SIZE))).induction.isnan().all()), "no token is repeated"


def test_heads_of_cross_attention() -> None:
    p = random_weights(1, 2, 5, 7)
    result = heads(make_record(p, kind="cross"))
    torch.testing.assert_close(result.first, p[..., 0].mean(-1))
    assert bool(result.distance.isnan().all())


def test_heads_ignore_rows_without_keys() -> None:
    p = full_weights()
    p[:, :, :4] = 0
    record = make_record(p)
    record.top.keys[record.top.weights == 0] = -1
    torch.testing.assert_close(heads(record).itself, p.diagonal(dim1=-2, dim2=-1)[..., 4:].mean(-1))


@pytest.mark.parametrize("received", [False, True])
def test_share(received: bool) -> None:
    p, keys = full_weights(), torch.rand(2, SIZE) > 0.5
    record = make_record(p, k=4)
    record = record if received else replace(record, received=None)
    expected = (p * keys[:, None, None]).sum(-1).mean(-1)
    result = share(record, keys)
    if received:
        torch.testing.assert_close(result.least, expected)
        torch.testing.assert_close(result.most, expected)
    assert bool((result.least <= expected + 1e-6).all())
    assert bool((expected <= result.most + 1e-6).all())
    queries = torch.arange(SIZE) > 5
    subset, expected = share(record, keys, queries), (p * keys[:, None, None]).sum(-1)[..., queries].mean(-1)
    assert bool((subset.least <= expected + 1e-6).all())
    assert bool((expected <= subset.most + 1e-6).all())
    torch.testing.assert_close(share(make_record(p), keys, queries).least, expected)
    with pytest.raises(ValueError, match=r"keys: torch.int64 \(11,\); expected bool of shape \(11,\) or \(2, 11\)"):
        share(record, IDS)
    with pytest.raises(ValueError, match=r"queries: list; expected bool"):
        share(record, keys, [True])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens: shape \(3,\); expected \(11,\) or \(2, 11\)"):
        heads(record, ["a", "b", "c"])


@pytest.mark.parametrize("k", [2, 5, SIZE])
@pytest.mark.parametrize("causal", [False, True])
def test_similarity(k: int, causal: bool) -> None:
    p, other = full_weights(causal), full_weights(causal, seed=1, count=4)
    result = similarity(make_record(p, k=k, causal=causal), make_record(other, k=k + (k < SIZE), causal=causal))
    expected = torch.minimum(p[:, :, None], other[:, None]).sum(-1).mean(-1)
    assert result.least.shape == (2, 3, 4)
    assert bool((result.least <= expected + 1e-6).all())
    assert bool((expected <= result.most + 1e-6).all())
    if k == SIZE:
        torch.testing.assert_close(result.least, expected)
        torch.testing.assert_close(result.most, expected)
    itself = similarity(make_record(p, k=k, causal=causal))
    torch.testing.assert_close(itself.most.diagonal(dim1=1, dim2=2), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"b: a record of B = 2, L = 5, S = 5; expected B = 2, L = 11, S = 11"):
        similarity(make_record(p), make_record(random_weights(2, 3, 5, 5)))


def test_compare() -> None:
    a, b = (
        [make_record(full_weights(seed=n), n) for n in (0, 1)],
        [make_record(full_weights(seed=n), n) for n in (0, 2)],
    )
    first, second = compare(a, b)
    assert first.same is not None
    assert second.same is not None
    assert first.change is not None
    torch.testing.assert_close(first.same.least, torch.ones(2, 3))
    assert first.alike is not None
    assert first.alike.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(first.change.distance, torch.zeros(2, 3))
    assert float(second.same.most.max()) < 0.9
    assert [n for n, _, _ in differing([first, second], 3)] == [1, 1, 1]
    other = compare(a[:1], [make_record(random_weights(2, 3, 5, 5))])[
        0
    ]  # other lengths: only the statistics of heads are compared
    assert other.same is None
    assert other.change is not None
    with pytest.raises(ValueError, match="b: 1 records; expected 2 as in a"):
        compare(a, b[:1])
