"""Texts of several lengths without padding: each is told as if it had been read alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.page import block
from support.records import dense
from torch import Tensor, nn

import regard
from regard.view.page import page
from regard.watch import Recording, flow, heads, rollout, share
from regard.watch.capture import nested

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
LENGTHS = (7, 4, 6)
TEXTS = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


class Layer(nn.Module):
    """Four heads of attention over whatever comes, as people write it; by hand, or to other texts."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.by_hand = by_hand

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = (by_heads(y) for y in (self.q(x), self.k(memory), self.v(memory)))
        if self.by_hand:
            return F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.0) @ v
        return F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)


def by_heads(x: Tensor) -> Tensor:
    """(B, L, 32) as (B, 4, L, 8), by what each layout has of it."""
    x = x.unflatten(-1, (4, 8)) if x.layout == torch.jagged else x.view(x.size(0), -1, 4, 8)
    return x.transpose(1, 2)


class Two(nn.Module):
    """Torch's own fast path, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


MODELS = {
    "sdpa": (Layer, torch.jagged),
    "by hand": (lambda: Layer(by_hand=True), torch.strided),
    "fast path": (Two, torch.strided),
}


def seen_together(kind: str) -> tuple[nn.Module, Recording]:
    """What a model attends to in all texts at once, with the same result to the bit as unwatched."""
    torch.manual_seed(0)
    make, layout = MODELS[kind]
    model = make().eval()
    x = torch.nested.nested_tensor(TEXTS, layout=layout)
    with torch.no_grad():
        before = model(x)
        with regard.watch(model, top=7, rows=[1]) as seen:
            after = model(x)
    assert all(torch.equal(a, b) for a, b in zip(before.unbind(), after.unbind(), strict=True))
    return model, seen


def seen_alone(model: nn.Module, text: Tensor) -> Recording:
    """What it attends to in one of the texts, which is no nested tensor then."""
    with torch.no_grad(), regard.watch(model, top=7, rows=[1]) as seen:
        model(text[None])
    return seen


@pytest.mark.parametrize("kind", MODELS)
def test_a_text_of_several_is_what_it_is_alone(kind: str) -> None:
    model, seen = seen_together(kind)
    assert len(seen) == (2 if kind == "fast path" else 1)
    assert {(record.kind, record.queries, record.keys, record.heads) for record in seen} == {("self", 7, 7, 4)}
    for n, text in enumerate(TEXTS):
        mine, alone = seen.text(n), seen_alone(model, text)
        for record, a, b in zip(seen, mine, alone, strict=True):
            assert record.lengths.tolist() == list(LENGTHS)
            assert (a.queries, a.keys) == (b.queries, b.keys) == (LENGTHS[n],) * 2
            torch.testing.assert_close(dense(a), dense(b))
            for name in ("max", "received", "entropy", "rows"):
                torch.testing.assert_close(getattr(a, name), getattr(b, name))
            # In the record of all, too, no head counts a query that no text has.
            for x, y in zip(heads(record), heads(b), strict=True):
                torch.testing.assert_close(x[n : n + 1], y, equal_nan=True)
            first = torch.arange(7) < 2
            torch.testing.assert_close(share(record, first).least[n : n + 1], share(b, first[: b.keys]).least)
        names = [f"w{i}" for i in range(LENGTHS[n])]
        pages = [block(page(some, names))["layers"][0]["heads"] for some in (mine, alone)]
        assert [head["meanEntropy"] for head in pages[0]] == [head["meanEntropy"] for head in pages[1]]


def test_rollout_begins_at_the_end_of_each_text() -> None:
    """And at no token that a text does not have."""
    model, seen = seen_together("fast path")
    last, sixth = rollout(seen, [-1]), rollout(seen, [5])
    for n, text in enumerate(TEXTS):
        truth = rollout(seen_alone(model, text), [-1]).shares
        torch.testing.assert_close(last.shares[n : n + 1, :, : len(text)], truth)
        assert float(sixth.shares[n].sum()) == pytest.approx(0.0 if len(text) < 6 else 1.0, abs=1e-5)
    assert bool((last.shares[1, :, 4:] == 0).all())
    flows = flow(seen, [-1, 5])
    torch.testing.assert_close(flows[1:2, :1, :4], flow(seen.text(1), [-1]))
    assert bool((flows[1, 1] == 0).all())


def test_cross_attention_keeps_the_keys_of_the_longest() -> None:
    sources = [torch.randn(n, 32) for n in (5, 9, 2)]
    x, memory = (torch.nested.nested_tensor(texts, layout=torch.jagged) for texts in (TEXTS, sources))
    model = Layer()
    with torch.no_grad(), regard.watch(model, top=9) as seen:
        model(x, memory)
    (record,) = seen
    assert (record.kind, record.queries, record.keys) == ("cross", 7, 9)
    for n, (text, source) in enumerate(zip(TEXTS, sources, strict=True)):
        one = record.text(n)
        assert (one.queries, one.keys) == (len(text), 9)
        q, k = by_heads(model.q(text[None])), by_heads(model.k(source[None]))
        truth = (0.3 * q @ k.transpose(-1, -2)).softmax(-1)
        torch.testing.assert_close(dense(one)[..., : len(source)], truth.detach())
        assert bool((dense(one)[..., len(source) :] == 0).all())


def test_a_mask_of_lengths_and_what_cannot_be_filled_up() -> None:
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 6, 8)
    mask = nested.within(torch.tensor([5, 2]), torch.tensor([4, 6]), 5, 6)
    full = regard.attention(q, k, k, mask=mask, summary=regard.Summary(full=True))[1].full
    assert full is not None
    may = (full > 0).any(1)
    assert bool(may[0, :, :4].all()) and not bool(may[0, :, 4:].any())
    assert bool(may[1, :2].all()) and not bool(may[1, 2:].any())
    rows = [torch.randn(n, 3, 8) for n in (2, 4)]
    assert nested.padded(torch.nested.nested_tensor(rows)) is None, "it is not their length that differs"


def test_a_dense_batch_is_cut_to_a_text_too() -> None:
    x = torch.randn(2, 4, 5, 8)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    with regard.watch(model := Model(), received=False, entropy=False) as seen:
        model(x)
    seen.tokens = list("abcde")
    second = seen.text(1)
    assert second.tokens == list("abcde")
    assert (second[0].kind, second[0].queries, second[0].received, second[0].rows) == ("decoder", 5, None, None)
    assert torch.equal(second[0].top.weights, seen[0].top.weights[1:])
    with pytest.raises(ValueError, match="n: 2; expected the number of a text, from 0 to 1"):
        seen.text(2)
