"""Nested tensors: each sequence is recorded as if it were alone in the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.page import block
from support.records import dense_weights
from torch import Tensor, nn

import regard
from regard.view.page import page
from regard.watch import Recording, flow, heads, rollout, share

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
LENGTHS = (7, 4, 6)
SEQUENCES = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


class Layer(nn.Module):
    """Self- or cross-attention with four heads, by SDPA or by a softmax and a matrix product."""

    def __init__(self, use_softmax: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.use_softmax = use_softmax

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = (split_heads(y) for y in (self.q(x), self.k(memory), self.v(memory)))
        if self.use_softmax:
            return F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.0) @ v
        return F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)


def split_heads(x: Tensor) -> Tensor:
    """Reshape (B, L, 32) to (B, 4, L, 8), with the operations that each layout supports."""
    x = x.unflatten(-1, (4, 8)) if x.layout == torch.jagged else x.view(x.size(0), -1, 4, 8)
    return x.transpose(1, 2)


class FastPath(nn.Module):
    """Two layers on torch's fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


MODELS = {
    "sdpa": (Layer, torch.jagged),
    "softmax": (lambda: Layer(use_softmax=True), torch.strided),
    "fast path": (FastPath, torch.strided),
}


def record_batch(kind: str) -> tuple[nn.Module, Recording]:
    """Record all sequences as one nested tensor, and check that the output is bit-identical."""
    torch.manual_seed(0)
    make, layout = MODELS[kind]
    model = make().eval()
    x = torch.nested.nested_tensor(SEQUENCES, layout=layout)
    with torch.no_grad():
        before = model(x)
        with regard.watch(model, top=7, rows=[1]) as recording:
            after = model(x)
    assert all(torch.equal(a, b) for a, b in zip(before.unbind(), after.unbind(), strict=True))
    return model, recording


def record_alone(model: nn.Module, sequence: Tensor) -> Recording:
    """Record one sequence as a dense tensor."""
    with torch.no_grad(), regard.watch(model, top=7, rows=[1]) as recording:
        model(sequence[None])
    return recording


@pytest.mark.parametrize("kind", MODELS)
def test_sequence_in_nested_batch_matches_sequence_alone(kind: str) -> None:
    model, recording = record_batch(kind)
    assert len(recording) == (2 if kind == "fast path" else 1)
    assert {(record.kind, record.queries, record.keys, record.heads) for record in recording} == {("self", 7, 7, 4)}
    for n, sequence in enumerate(SEQUENCES):
        own, alone = recording.text(n), record_alone(model, sequence)
        for record, a, b in zip(recording, own, alone, strict=True):
            assert record.lengths.tolist() == list(LENGTHS)
            assert (a.queries, a.keys) == (b.queries, b.keys) == (LENGTHS[n],) * 2
            torch.testing.assert_close(dense_weights(a), dense_weights(b))
            for name in ("max", "received", "entropy", "rows"):
                torch.testing.assert_close(getattr(a, name), getattr(b, name))
            # Statistics of the whole batch do not count padding queries either.
            for x, y in zip(heads(record), heads(b), strict=True):
                torch.testing.assert_close(x[n : n + 1], y, equal_nan=True)
            first = torch.arange(7) < 2
            torch.testing.assert_close(share(record, first).least[n : n + 1], share(b, first[: b.keys]).least)
        names = [f"w{i}" for i in range(LENGTHS[n])]
        pages = [block(page(records, names))["layers"][0]["heads"] for records in (own, alone)]
        assert [head["meanEntropy"] for head in pages[0]] == [head["meanEntropy"] for head in pages[1]]


def test_rollout_negative_index_is_last_token_of_each_sequence() -> None:
    """Tokens that a sequence does not have give zeros."""
    model, recording = record_batch("fast path")
    last, sixth = rollout(recording, [-1]), rollout(recording, [5])
    for n, sequence in enumerate(SEQUENCES):
        expected = rollout(record_alone(model, sequence), [-1]).shares
        torch.testing.assert_close(last.shares[n : n + 1, :, : len(sequence)], expected)
        assert float(sixth.shares[n].sum()) == pytest.approx(0.0 if len(sequence) < 6 else 1.0, abs=1e-5)
    assert bool((last.shares[1, :, 4:] == 0).all())
    flows = flow(recording, [-1, 5])
    torch.testing.assert_close(flows[1:2, :1, :4], flow(recording.text(1), [-1]))
    assert bool((flows[1, 1] == 0).all())


def test_cross_attention_keeps_keys_of_longest_sequence() -> None:
    sources = [torch.randn(n, 32) for n in (5, 9, 2)]
    x, memory = (torch.nested.nested_tensor(sequences, layout=torch.jagged) for sequences in (SEQUENCES, sources))
    model = Layer()
    with torch.no_grad(), regard.watch(model, top=9) as recording:
        model(x, memory)
    (record,) = recording
    assert (record.kind, record.queries, record.keys) == ("cross", 7, 9)
    for n, (sequence, source) in enumerate(zip(SEQUENCES, sources, strict=True)):
        one = record.text(n)
        assert (one.queries, one.keys) == (len(sequence), 9)
        q, k = split_heads(model.q(sequence[None])), split_heads(model.k(source[None]))
        expected = (0.3 * q @ k.transpose(-1, -2)).softmax(-1)
        torch.testing.assert_close(dense_weights(one)[..., : len(source)], expected.detach())
        assert bool((dense_weights(one)[..., len(source) :] == 0).all())


def test_text_of_dense_batch() -> None:
    x = torch.randn(2, 4, 5, 8)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    with regard.watch(model := Model(), received=False, entropy=False) as recording:
        model(x)
    recording.tokens = list("abcde")
    second = recording.text(1)
    assert second.tokens == list("abcde")
    assert (second[0].kind, second[0].queries, second[0].received, second[0].rows) == ("decoder", 5, None, None)
    assert torch.equal(second[0].top.weights, recording[0].top.weights[1:])
    with pytest.raises(ValueError, match="n: 2; expected the index of a sequence, from 0 to 1"):
        recording.text(2)
