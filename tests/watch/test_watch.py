"""Watching changes nothing, leaves nothing behind, and reports the weights that eager attention gives."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from support.hf_models import MODELS, bert, llama, t5
from support.records import dense
from torch import Tensor, nn

import regard


@pytest.mark.filterwarnings(
    "ignore:flex_attention called without:UserWarning", "ignore:_compile flag:DeprecationWarning"
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("family", MODELS)
def test_hugging_face(family: str, implementation: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[family]("sdpa")
    model.eval()
    if implementation == "flex_attention" and not model._supports_flex_attn:
        pytest.skip(f"transformers has no FlexAttention for {family}")
    if implementation == "flex_attention" and family == "t5":  # of a second text it reads the bias out of bounds
        inputs = {name: x[:1] for name, x in inputs.items()}
    with torch.no_grad():
        model.set_attn_implementation("sdpa" if implementation == "flex_attention" else implementation)
        before = model(**inputs).last_hidden_state
        model.set_attn_implementation(implementation)
        with regard.watch(model, top=17, rows=[0, 5]) as seen:
            watched = model(**inputs).last_hidden_state
        assert model.config._attn_implementation == implementation
        model.set_attn_implementation("eager")
        after = model(**inputs).last_hidden_state
        eager = model(**inputs, output_attentions=True)
    if implementation == "eager":  # it takes the weights itself, and keeps on doing so
        assert torch.equal(watched, before)
        assert torch.equal(after, before)
    # Rounding alone: the same sums in another order.
    scale = before.abs().max()
    assert (watched - before).abs().max() <= 64 * torch.finfo(torch.float32).eps * scale
    truth = _in_order_of_calls(eager)
    assert len(seen) == len(truth)
    for record, weights in zip(seen, truth, strict=True):
        _, H, L, S = weights.shape
        assert (record.heads, record.queries, record.keys) == (H, L, S)
        bound = 32 * torch.finfo(torch.float32).eps
        assert (dense(record) - weights).abs().max() <= bound
        assert record.received is not None
        assert (record.received - weights.sum(-2)).abs().max() <= bound * L
        assert record.entropy is not None
        assert (record.entropy - torch.special.entr(weights).sum(-1)).abs().max() <= 8 * bound
        assert record.rows is not None
        assert (record.rows - weights[:, :, [0, 5]]).abs().max() <= bound
        assert float(record.missing.max()) <= bound


def _in_order_of_calls(outputs: object) -> list[Tensor]:
    if hasattr(outputs, "cross_attentions") and hasattr(outputs, "encoder_attentions"):
        own, cross = outputs.decoder_attentions, outputs.cross_attentions
        decoder = [weights for pair in zip(own, cross, strict=True) for weights in pair]
        return [*outputs.encoder_attentions, *decoder]
    return list(outputs.attentions)  # type: ignore[attr-defined]


def test_kinds_and_names() -> None:
    model, inputs = t5("sdpa")
    with torch.no_grad(), regard.watch(model.eval()) as seen:
        model(**inputs)
        model(**inputs)
    assert [record.kind for record in seen][:6] == ["self", "self", "decoder", "cross", "decoder", "cross"]
    assert [record.causal for record in seen][:6] == [False, False, True, False, True, False]
    assert [record.layer for record in seen] == [*range(6), *range(6)]
    assert {record.call for record in seen[6:]} == {1}
    assert int((seen[2].top.keys[0, 0] >= 0).sum(-1)[1]) == 2, (
        "a later key is none, though it is in the list of T5's mask"
    )
    assert seen[3].name == "decoder.block.0.layer.1.EncDecAttention"
    assert repr(seen) == "Recording(12 calls in 6 layers; 4 heads, 9 queries x 17 keys at last)"


def test_left_out_weight_is_known() -> None:
    model, inputs = llama("sdpa")
    with torch.no_grad(), regard.watch(model.eval(), top=3, layers=[1]) as seen:
        model(**inputs)
    (record,) = seen
    assert record.layer == 1
    assert record.top.weights.shape == (2, 4, 17, 3)
    left = 1 - record.top.weights.sum(-1)
    assert torch.allclose(record.missing, left.clamp(min=0), atol=torch.finfo(torch.float32).eps)
    assert float(record.missing[..., 10:].min()) > 0


class Handmade(nn.Module):
    """Attention as people write it, with a name that was imported early."""

    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).chunk(3, -1)
        return type(self).attend(q, k, v, is_causal=True, scale=0.5)


def test_handmade_and_gradients() -> None:
    model, x = Handmade(), torch.randn(3, 7, 8)
    plain = torch.autograd.grad(model(x).square().sum(), model.inner.weight)[0]
    with regard.watch(model) as seen:
        watched = torch.autograd.grad(model(x).square().sum(), model.inner.weight)[0]
    assert torch.allclose(plain, watched, rtol=1e-5, atol=float(plain.abs().max()) * 1e-6)
    assert seen[0].causal
    assert seen[0].top.weights.shape == (3, 1, 7, 8)
    assert not seen[0].top.weights.requires_grad


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead(need_weights: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 6, 16)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    arguments = {"key_padding_mask": padding, "need_weights": need_weights}
    with torch.no_grad():
        before = layer(x, x, x, **arguments)
        with regard.watch(layer, top=6, rows=[1]) as seen:
            watched = layer(x, x, x, **arguments)
        _, weights = layer(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    assert torch.allclose(before[0], watched[0], atol=1e-6)
    assert (before[1] is None) == (watched[1] is None)
    if need_weights:
        assert torch.allclose(before[1], watched[1], atol=1e-6)
    assert torch.allclose(dense(seen[0]), weights, atol=1e-6)
    assert int(seen[0].top.keys[1, :, :, 4:].max()) == -1


def test_transformer_encoder_in_all_modes() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, dropout=0.1, batch_first=True), 2)
    x = torch.randn(2, 5, 16)
    for mode in (encoder.train, encoder.eval):
        mode()
        torch.manual_seed(1)
        before = encoder(x)
        torch.manual_seed(1)
        with regard.watch(encoder) as seen:
            watched = encoder(x)
        assert [record.name for record in seen] == ["layers.0.self_attn", "layers.1.self_attn"]
        assert torch.allclose(before, watched, atol=1e-5)


class Ours(nn.Module):
    """A layer that calls `attention` itself, asks for summaries, and drops weights when it is told to."""

    def __init__(self, **words: object) -> None:
        super().__init__()
        self.words = words

    def forward(self, x: Tensor) -> object:
        return regard.attention(
            x, x[..., :2, :, :] if x.dim() > 3 else x, x[..., :2, :, :] if x.dim() > 3 else x, **self.words
        )


@pytest.mark.parametrize("axes", [(5, 3), (2, 5, 3), (2, 4, 5, 3), (2, 3, 4, 5, 3)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("summary", [None, regard.Summary(lse=True, rows=[1])])
def test_our_own_attention(axes: tuple[int, ...], dropout: float, summary: regard.Summary | None) -> None:
    """Any score and normalizer, with the same bits as unwatched, and the weights of its own formula."""
    x = torch.randn(axes, generator=torch.Generator().manual_seed(0))
    words = {
        "score": regard.score.Additive(torch.ones(3)),
        "mask": regard.mask.causal() & regard.mask.window(3),
        "seed": 1,
    }
    words |= {"normalizer": regard.normalizer.Sparsemax(), "summary": summary, "dropout": dropout}
    model = Ours(**words)
    before = model(x)
    with regard.watch(model, top=5) as seen:
        watched = model(x)
    if summary is None:
        assert torch.equal(watched, before)
    else:
        assert torch.equal(watched[0], before[0])
        assert torch.equal(watched[1].lse, before[1].lse)
        assert torch.equal(watched[1].rows, before[1].rows)
    (record,) = seen
    full = Ours(**words | {"summary": regard.Summary(full=True), "dropout": 0.0, "seed": None})(x)[1].full
    assert record.causal
    assert torch.equal(dense(record), full.reshape(dense(record).shape))


def test_recurrent_decoders() -> None:
    """What looks at a memory is cross attention, step by step or all at once, and nothing else is told of."""
    x, memory = torch.randn(2, 3, 4), torch.randn(2, 7, 6)
    for order, calls in (("bahdanau", 3), ("luong", 1)):
        torch.manual_seed(0)
        model = regard.nn.recurrent.RecurrentDecoder(4, 5, 6, regard.nn.AdditiveAttention(5, 6, 8), order=order)
        with regard.watch(model, top=7) as seen:
            model(x, memory)
        assert [record.kind for record in seen] == ["cross"] * calls
        whole = model(x, memory, summary=regard.Summary(full=True))[2].full
        assert whole is not None
        told = torch.cat([dense(record)[:, 0] for record in seen], 1)
        torch.testing.assert_close(told, whole)


def test_nothing_stays_behind() -> None:
    model, inputs = bert("eager")
    hooks = [len(module._forward_hooks) for module in model.modules()]

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    handle = model.encoder.layer[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"), regard.watch(model):
        model(**inputs)
    handle.remove()
    assert model.config._attn_implementation == "eager"
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_nested_watches_and_other_models() -> None:
    model, other, x = Handmade(), Handmade(), torch.randn(2, 5, 8)
    with regard.watch(model) as outer:
        other(x)
        with regard.watch(other) as inner:
            other(x)
        model(x)
    assert len(outer) == 1
    assert len(inner) == 1


def test_threads_watch_their_own() -> None:
    counts: dict[int, int] = {}

    def work(number: int) -> None:
        layer, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 6, 16)
        with regard.watch(layer) as seen:
            for _ in range(number + 1):
                layer(x, x, x, need_weights=False)
        counts[number] = len(seen)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == {number: number + 1 for number in range(6)}
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_bad_calls() -> None:
    with pytest.raises(TypeError, match=r"model: str; expected a torch\.nn\.Module"), regard.watch("bert"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="top: 0; expected a whole number > 0"), regard.watch(nn.Linear(1, 1), top=0):
        pass
    linear = nn.Linear(1, 1)
    with pytest.warns(UserWarning, match="no attention was seen in Linear"), regard.watch(linear):
        linear(torch.ones(1))
