"""Attention that a model writes by hand: softmax, then a product with the values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.records import dense
from torch import Tensor, nn

import regard

EPS = torch.finfo(torch.float32).eps
X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


class ByHand(nn.Module):
    """Four heads of width 4, as `write` has it; the weights (2, 4, 7, 7) are left in `told`."""

    def __init__(self, write: Callable[[ByHand, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.drop, self.write = nn.Linear(16, 48), nn.Dropout(0.0), write
        self.num_heads = 4
        self.told = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return self.write(self, q, k, v)


def timm(self: ByHand, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    self.told = attn = (q @ k.transpose(-2, -1) * 0.5).softmax(dim=-1)
    return self.drop(attn) @ v


def eager(self: ByHand, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT) / 2
    self.told = F.softmax(scores, dim=-1, dtype=torch.float32)
    return torch.matmul(F.dropout(self.told.to(q.dtype), p=0.1, training=self.training), v)


def einsum(self: ByHand, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    self.told = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / 2, -1)
    return torch.einsum("bhij, bhjd -> bhid", self.told, v)


def einsum_with_weights_last(self: ByHand, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    self.told = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / 2, -1)
    return torch.einsum("bhjd,bhij->bhid", v, self.told)


def fairseq(self: ByHand, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads in one axis."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    p = nn.Softmax(dim=2)(torch.bmm(q, k.transpose(1, 2)) / 2)
    self.told = p.unflatten(0, (2, 4))
    return torch.bmm(p, v)


def bloom(self: ByHand, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax in four axes, a product in three."""
    self.told = F.softmax(q @ k.mT / 2, dim=-1)
    return torch.bmm(self.told.view(8, 7, 7), v.flatten(0, 1))


def causal(self: ByHand, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(7, 7).triu(1).bool()
    self.told = (q @ k.mT).masked_fill(mask, -torch.inf).softmax(-1)
    return self.told.matmul(v)


WRITTEN = [timm, eager, einsum, einsum_with_weights_last, fairseq, bloom, causal]


@pytest.mark.parametrize("write", WRITTEN, ids=lambda write: write.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_written_by_hand(write: Callable[[ByHand, Tensor, Tensor, Tensor], Tensor], training: bool) -> None:
    model = ByHand(write).train(training)
    torch.manual_seed(3)
    before = model(X)
    truth = model.told.detach()
    torch.manual_seed(3)
    with regard.watch(model, top=7, rows=[1]) as seen:
        watched = model(X)
    assert torch.equal(watched, before), "nothing is computed another way"
    (record,) = seen
    assert (record.heads, record.queries, record.keys) == (4, 7, 7)
    assert record.kind == ("decoder" if write is causal else "self")
    assert torch.equal(dense(record), truth)
    assert record.received is not None
    assert record.entropy is not None
    assert record.rows is not None
    assert (record.received - truth.sum(-2)).abs().max() <= 16 * EPS
    assert (record.entropy - torch.special.entr(truth).sum(-1)).abs().max() <= 16 * EPS
    assert torch.equal(record.rows, truth[:, :, 1:2])
    assert not record.top.weights.requires_grad


def test_recurrent_attention() -> None:
    """One query a text, without an axis of its own: as recurrent decoders are often written."""

    class Step(nn.Module):
        def forward(self, state: Tensor, memory: Tensor) -> Tensor:
            weights = F.softmax((memory @ state[..., None]).squeeze(-1), dim=1)
            return torch.bmm(weights.unsqueeze(1), memory).squeeze(1)

    state, memory = torch.randn(3, 5), torch.randn(3, 6, 5)
    model = Step()
    with regard.watch(model, top=6) as seen:
        model(state, memory)
    (record,) = seen
    assert (record.heads, record.queries, record.keys, record.kind) == (1, 1, 6, "cross")
    assert torch.equal(dense(record)[:, 0, 0], F.softmax((memory @ state[..., None]).squeeze(-1), dim=1))


def test_what_is_no_attention_is_not_told() -> None:
    """A softmax that multiplies nothing, over another axis, or from the other side."""

    class Classifier(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x @ x.mT.softmax(-1)
            return F.softmax(x.softmax(1) @ y.mT, -1)

    model = Classifier()
    with pytest.warns(UserWarning, match="no attention was seen"), regard.watch(model) as seen:
        model(torch.randn(2, 4, 4))
    assert not seen.records


def test_weights_are_not_kept() -> None:
    """Once a product took them, nobody holds them."""
    import gc
    import weakref

    left: list[weakref.ref[Tensor]] = []

    def write(self: ByHand, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT).softmax(-1)
        left.append(weakref.ref(p))
        return p @ v

    model = ByHand(write)
    with torch.no_grad(), regard.watch(model):
        model(X)
        gc.collect()
        assert left[0]() is None
