"""Attention that a model writes out: a softmax, then a matrix product with the values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.records import dense_weights
from torch import Tensor, nn

import regard

EPS = torch.finfo(torch.float32).eps
X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


class HandWritten(nn.Module):
    """Four heads of width 4, computed by `attend`, which stores the weights (2, 4, 7, 7)."""

    def __init__(self, attend: Callable[[HandWritten, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.drop, self.attend = nn.Linear(16, 48), nn.Dropout(0.0), attend
        self.num_heads = 4
        self.weights = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return self.attend(self, q, k, v)


def timm(self: HandWritten, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    self.weights = attn = (q @ k.transpose(-2, -1) * 0.5).softmax(dim=-1)
    return self.drop(attn) @ v


def eager(self: HandWritten, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT) / 2
    self.weights = F.softmax(scores, dim=-1, dtype=torch.float32)
    return torch.matmul(F.dropout(self.weights.to(q.dtype), p=0.1, training=self.training), v)


def einsum(self: HandWritten, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    self.weights = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / 2, -1)
    return torch.einsum("bhij, bhjd -> bhid", self.weights, v)


def einsum_with_weights_last(self: HandWritten, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    self.weights = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / 2, -1)
    return torch.einsum("bhjd,bhij->bhid", v, self.weights)


def fairseq(self: HandWritten, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads in one dimension."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    p = nn.Softmax(dim=2)(torch.bmm(q, k.transpose(1, 2)) / 2)
    self.weights = p.unflatten(0, (2, 4))
    return torch.bmm(p, v)


def bloom(self: HandWritten, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax over four dimensions, a product over three."""
    self.weights = F.softmax(q @ k.mT / 2, dim=-1)
    return torch.bmm(self.weights.view(8, 7, 7), v.flatten(0, 1))


def causal(self: HandWritten, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(7, 7).triu(1).bool()
    self.weights = (q @ k.mT).masked_fill(mask, -torch.inf).softmax(-1)
    return self.weights.matmul(v)


VARIANTS = [timm, eager, einsum, einsum_with_weights_last, fairseq, bloom, causal]


@pytest.mark.parametrize("attend", VARIANTS, ids=lambda attend: attend.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_hand_written_attention(
    attend: Callable[[HandWritten, Tensor, Tensor, Tensor], Tensor], training: bool
) -> None:
    model = HandWritten(attend).train(training)
    torch.manual_seed(3)
    before = model(X)
    expected = model.weights.detach()
    torch.manual_seed(3)
    with regard.watch(model, top=7, rows=[1]) as recording:
        watched = model(X)
    assert torch.equal(watched, before), "the output must be bit-identical"
    (record,) = recording
    assert (record.heads, record.queries, record.keys) == (4, 7, 7)
    assert record.kind == ("decoder" if attend is causal else "self")
    assert torch.equal(dense_weights(record), expected)
    assert record.received is not None
    assert record.entropy is not None
    assert record.rows is not None
    assert (record.received - expected.sum(-2)).abs().max() <= 16 * EPS
    assert (record.entropy - torch.special.entr(expected).sum(-1)).abs().max() <= 16 * EPS
    assert torch.equal(record.rows, expected[:, :, 1:2])
    assert not record.top.weights.requires_grad


def test_recurrent_attention_without_query_dimension() -> None:
    """One query per sequence without a query dimension, as recurrent decoders are often written."""

    class Step(nn.Module):
        def forward(self, state: Tensor, memory: Tensor) -> Tensor:
            weights = F.softmax((memory @ state[..., None]).squeeze(-1), dim=1)
            return torch.bmm(weights.unsqueeze(1), memory).squeeze(1)

    state, memory = torch.randn(3, 5), torch.randn(3, 6, 5)
    model = Step()
    with regard.watch(model, top=6) as recording:
        model(state, memory)
    (record,) = recording
    assert (record.heads, record.queries, record.keys, record.kind) == (1, 1, 6, "cross")
    assert torch.equal(dense_weights(record)[:, 0, 0], F.softmax((memory @ state[..., None]).squeeze(-1), dim=1))


def test_other_softmax_is_not_recorded() -> None:
    """A softmax that multiplies nothing, is over another dimension, or is the right operand."""

    class Classifier(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x @ x.mT.softmax(-1)
            return F.softmax(x.softmax(1) @ y.mT, -1)

    model = Classifier()
    with pytest.warns(UserWarning, match="no attention was recorded"), regard.watch(model) as recording:
        model(torch.randn(2, 4, 4))
    assert not recording.records


def test_weights_are_released() -> None:
    """The weights are freed after the product."""
    import gc
    import weakref

    references: list[weakref.ref[Tensor]] = []

    def attend(self: HandWritten, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT).softmax(-1)
        references.append(weakref.ref(p))
        return p @ v

    model = HandWritten(attend)
    with torch.no_grad(), regard.watch(model):
        model(X)
        gc.collect()
        assert references[0]() is None


# ---------------------------------------------------------------------------------------------------------------------
# Operations between the softmax and the product: each returns the output, and the weights that multiply the values.

_KEEP = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) > 0.4
Product = tuple[Tensor, Tensor]


def _sink(p: Tensor, v: Tensor) -> Product:
    with_sink = torch.cat([p.log(), torch.zeros_like(p[..., :1])], -1).softmax(-1)
    return with_sink[..., :-1] @ v, with_sink[..., :-1]


def _in_place(p: Tensor, v: Tensor) -> Product:
    p = (2 * p.log()).softmax(-1)
    p.masked_fill_(~_KEEP, 0.0)
    p *= 0.5
    p[..., 0] = 0.25
    return p @ v, p


def _dropped_then_masked(p: Tensor, v: Tensor) -> Product:
    p = p.log().softmax(-1)
    masked = F.dropout(p, 0.5).masked_fill(~_KEEP, 0.0)
    return masked @ v, p.masked_fill(~_KEEP, 0.0)


def _through(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Product]:
    def follow(p: Tensor, v: Tensor) -> Product:
        changed = change(p.log().softmax(-1))
        return changed @ v, changed

    return follow


def _product(
    product: Callable[[Tensor, Tensor], Tensor], reshape: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable[[Tensor, Tensor], Product]:
    def follow(p: Tensor, v: Tensor) -> Product:
        p = p.log().softmax(-1)
        return product(reshape(p), reshape(v)), reshape(p)

    return follow


def _fold(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _one(x: Tensor) -> Tensor:
    return x[0, 0]


_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Product]] = {
    "sink": _sink,
    "in place": _in_place,
    "dropped, then masked": _dropped_then_masked,
    "masked_fill": _through(lambda p: p.masked_fill(~_KEEP, 0.0)),
    "times a mask": _through(lambda p: p * _KEEP),
    "mask first": _through(lambda p: torch.mul(_KEEP.float(), p)),
    "nan_to_num": _through(lambda p: torch.nan_to_num(p, 0.0)),
    "where": _through(lambda p: torch.where(_KEEP, p, 0.0)),
    "own dropout": _through(lambda p: p * (_KEEP.float() / 0.6)),
    "renormalized": _through(lambda p: p / (p.sum(-1, keepdim=True) + 1)),
    "half and back": _through(lambda p: (p.double() * 2).float()),
    "permuted": _through(lambda p: p.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)),
    "transposed twice": _through(lambda p: (p.mT * 2).transpose(-1, -2)),
    "window of keys": lambda p, v: _through(lambda p: p[..., 2:6])(p, v[..., 2:6, :]),
    "bmm": _product(torch.bmm, _fold),
    "keywords": _product(lambda p, v: torch.bmm(input=p, mat2=v), _fold),
    "keywords of matmul": _product(lambda p, v: torch.matmul(input=p, other=v)),
    "mm": _product(torch.mm, _one),
    "addmm": _product(lambda p, v: torch.addmm(torch.zeros(7, 4), p, v), _one),
    "addmm with keywords": _product(lambda p, v: torch.addmm(torch.zeros(7, 4), mat1=p, mat2=v), _one),
    "baddbmm": _product(lambda p, v: torch.baddbmm(torch.zeros(8, 7, 4), p, v), _fold),
    "on the right": _product(lambda p, v: (v.mT @ p.mT).mT),
    "bmm on the right": _product(lambda p, v: torch.bmm(v.mT, p.transpose(1, 2)).mT, _fold),
    "einsum, transposed": _product(lambda p, v: torch.einsum("bhji,bhjd->bhid", p.mT, v)),
}


class _Multiplies(nn.Module):
    num_heads = 4

    def __init__(self, follow: Callable[[Tensor, Tensor], Product]) -> None:
        super().__init__()
        self.follow = follow

    def forward(self, p: Tensor, v: Tensor) -> Tensor:
        out, self.weights = self.follow(p, v)
        return out


@pytest.mark.parametrize("name", _PRODUCTS)
def test_weights_are_followed_to_the_product(name: str) -> None:
    torch.manual_seed(0)
    p, v = torch.rand(2, 4, 7, 7) + 0.1, torch.randn(2, 4, 7, 4)
    module = _Multiplies(_PRODUCTS[name])
    with torch.no_grad(), regard.watch(module, top=7) as recording:
        module(p, v)
    (record,) = recording
    weights = module.weights.float()
    torch.testing.assert_close(record.max.float(), weights.amax(-1).view_as(record.max))
    torch.testing.assert_close(record.received.float(), weights.sum(-2).view_as(record.received))


class UnfollowedAttention(nn.Module):
    def forward(self, p: Tensor, v: Tensor) -> Tensor:
        return p.softmax(-1).mean(1) @ v[:, 0]


class Mixture(nn.Module):
    """A softmax that is no attention, in a module that does not speak of it."""

    def forward(self, p: Tensor, v: Tensor) -> Tensor:
        return p.softmax(-1).sum() * v


def test_attention_that_is_not_recorded_is_named() -> None:
    """Also if other modules are recorded."""
    torch.manual_seed(0)
    p, v = torch.rand(2, 4, 7, 7), torch.randn(2, 4, 7, 4)
    model = nn.ModuleDict(
        {"seen": _Multiplies(_PRODUCTS["masked_fill"]), "lost": UnfollowedAttention(), "gate": Mixture()}
    )
    recordings = []

    def run() -> None:
        with torch.no_grad(), regard.watch(model) as recording:
            for module in model.values():
                module(p, v)
        recordings.append(recording)

    with pytest.warns(UserWarning, match=r"attention was not recorded in lost: weights of a softmax"):
        run()
    assert [record.name for record in recordings[0]] == ["seen"]
    nested = nn.ModuleDict({"self_attn": nn.ModuleDict({"inner": Mixture()}), "gate": Mixture()})
    nested_inner = nested["self_attn"]["inner"]
    with torch.no_grad(), pytest.warns(UserWarning, match=r"not recorded in self_attn.inner: "), regard.watch(nested):
        nested_inner(p, v)
