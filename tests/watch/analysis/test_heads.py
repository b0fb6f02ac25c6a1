"""What heads do, told from a few weights of each row, beside what the whole matrix says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.records import random, seen
from torch import Tensor

from regard.watch import compare, differing, heads, share, similarity

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 1, 5, 3])
SIZE = len(IDS)


def whole(causal: bool = False, seed: int = 0, batch: int = 2, count: int = 3) -> Tensor:
    return random(batch, count, SIZE, SIZE, seed=seed, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ids", [IDS, IDS.expand(2, -1), IDS.tolist(), [f"w{n}" for n in IDS.tolist()]])
def test_all_is_exact_where_all_weights_are_listed(causal: bool, ids: object) -> None:
    p = whole(causal)
    found = heads(seen(p, causal=causal), ids)  # type: ignore[arg-type]
    i, j = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    torch.testing.assert_close(found.distance, (p * (i - j).abs()).sum((-1, -2)) / SIZE)
    torch.testing.assert_close(found.first, p[..., 0].mean(-1))
    torch.testing.assert_close(found.previous, (p * (j == i - 1)).sum((-1, -2)) / SIZE)
    torch.testing.assert_close(found.itself, p.diagonal(dim1=-2, dim2=-1).mean(-1))
    torch.testing.assert_close(found.entropy, torch.special.entr(p).sum(-1).mean(-1))
    copy = (IDS[:, None] == IDS) & (j < i)
    has = copy.any(-1)
    torch.testing.assert_close(found.same, (p * copy).sum(-1)[..., has].mean(-1))
    after = torch.zeros_like(copy)
    after[:, 1:] = copy[:, :-1]
    torch.testing.assert_close(found.induction, (p * after).sum(-1)[..., has].mean(-1))
    assert float(found.unknown.max()) < 1e-6


def test_what_is_not_listed_is_unknown() -> None:
    p = whole()
    exact, few = heads(seen(p), IDS), heads(seen(p, k=3), IDS)
    torch.testing.assert_close(few.first, exact.first), "received tells it whole"
    for name in ("previous", "itself"):
        low, truth = getattr(few, name), getattr(exact, name)
        assert bool((low <= truth + 1e-6).all())
        assert bool((truth <= low + few.unknown + 1e-6).all())
    assert float(few.unknown.min()) > 0.05
    assert bool(heads(seen(p)).induction.isnan().all()), "nobody said which tokens there are"
    assert bool(heads(seen(p), list(range(SIZE))).induction.isnan().all()), "no token comes twice"


def test_cross_attention_has_no_distance() -> None:
    p = random(1, 2, 5, 7)
    found = heads(seen(p, kind="cross"))
    torch.testing.assert_close(found.first, p[..., 0].mean(-1))
    assert bool(found.distance.isnan().all())


def test_rows_that_attend_to_nothing_do_not_count() -> None:
    p = whole()
    p[:, :, :4] = 0
    record = seen(p)
    record.top.keys[record.top.weights == 0] = -1
    torch.testing.assert_close(heads(record).itself, p.diagonal(dim1=-2, dim2=-1)[..., 4:].mean(-1))


@pytest.mark.parametrize("received", [False, True])
def test_share(received: bool) -> None:
    p, keys = whole(), torch.rand(2, SIZE) > 0.5
    record = seen(p, k=4)
    record = record if received else replace(record, received=None)
    truth = (p * keys[:, None, None]).sum(-1).mean(-1)
    found = share(record, keys)
    if received:
        torch.testing.assert_close(found.least, truth)
        torch.testing.assert_close(found.most, truth)
    assert bool((found.least <= truth + 1e-6).all())
    assert bool((truth <= found.most + 1e-6).all())
    queries = torch.arange(SIZE) > 5
    some, truth = share(record, keys, queries), (p * keys[:, None, None]).sum(-1)[..., queries].mean(-1)
    assert bool((some.least <= truth + 1e-6).all())
    assert bool((truth <= some.most + 1e-6).all())
    torch.testing.assert_close(share(seen(p), keys, queries).least, truth)
    with pytest.raises(ValueError, match=r"keys: torch.int64 \(11,\); expected bool of shape \(11,\) or \(2, 11\)"):
        share(record, IDS)
    with pytest.raises(ValueError, match=r"queries: list; expected bool"):
        share(record, keys, [True])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens: of shape \(3,\); expected \(11,\) or \(2, 11\)"):
        heads(record, ["a", "b", "c"])


@pytest.mark.parametrize("k", [2, 5, SIZE])
@pytest.mark.parametrize("causal", [False, True])
def test_similarity(k: int, causal: bool) -> None:
    p, other = whole(causal), whole(causal, seed=1, count=4)
    found = similarity(seen(p, k=k, causal=causal), seen(other, k=k + (k < SIZE), causal=causal))
    truth = torch.minimum(p[:, :, None], other[:, None]).sum(-1).mean(-1)
    assert found.least.shape == (2, 3, 4)
    assert bool((found.least <= truth + 1e-6).all())
    assert bool((truth <= found.most + 1e-6).all())
    if k == SIZE:
        torch.testing.assert_close(found.least, truth)
        torch.testing.assert_close(found.most, truth)
    itself = similarity(seen(p, k=k, causal=causal))
    torch.testing.assert_close(itself.most.diagonal(dim1=1, dim2=2), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"b: a record of B = 2, L = 5, S = 5; expected B = 2, L = 11, S = 11"):
        similarity(seen(p), seen(random(2, 3, 5, 5)))


def test_compare() -> None:
    a, b = [seen(whole(seed=n), n) for n in (0, 1)], [seen(whole(seed=n), n) for n in (0, 2)]
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
    other = compare(a[:1], [seen(random(2, 3, 5, 5))])[0]  # another text: what heads do can be compared
    assert other.same is None
    assert other.change is not None
    with pytest.raises(ValueError, match="b: 1 records; expected 2 as in a"):
        compare(a, b[:1])
