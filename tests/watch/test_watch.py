"""A watch keeps outputs and process state, and records the weights that eager attention computes."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.hf_models import MODELS, bert, llama, t5
from support.records import dense_weights
from torch import Tensor, nn

import regard


@pytest.mark.filterwarnings(
    "ignore:flex_attention called without:UserWarning", "ignore:_compile flag:DeprecationWarning"
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("family", MODELS)
def test_hugging_face_models_record_eager_weights(family: str, implementation: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[family]("sdpa")
    model.eval()
    if implementation == "flex_attention" and not model._supports_flex_attn:
        pytest.skip(f"transformers has no FlexAttention for {family}")
    if implementation == "flex_attention" and family == "t5":  # transformers reads its bias out of bounds for batches
        inputs = {name: x[:1] for name, x in inputs.items()}
    with torch.no_grad():
        model.set_attn_implementation("sdpa" if implementation == "flex_attention" else implementation)
        before = model(**inputs).last_hidden_state
        model.set_attn_implementation(implementation)
        with regard.watch(model, top=17, rows=[0, 5]) as recording:
            watched = model(**inputs).last_hidden_state
        assert model.config._attn_implementation == implementation
        model.set_attn_implementation("eager")
        after = model(**inputs).last_hidden_state
        eager = model(**inputs, output_attentions=True)
    if implementation == "eager":  # computes the weights itself, also under a watch
        assert torch.equal(watched, before)
        assert torch.equal(after, before)
    # Rounding only: the same sums in another order.
    scale = before.abs().max()
    assert (watched - before).abs().max() <= 64 * torch.finfo(torch.float32).eps * scale
    expected = _in_order_of_calls(eager)
    assert len(recording) == len(expected)
    for record, weights in zip(recording, expected, strict=True):
        _, H, L, S = weights.shape
        assert (record.heads, record.queries, record.keys) == (H, L, S)
        bound = 32 * torch.finfo(torch.float32).eps
        assert (dense_weights(record) - weights).abs().max() <= bound
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


def test_kinds_names_and_layers() -> None:
    model, inputs = t5("sdpa")
    with torch.no_grad(), regard.watch(model.eval()) as recording:
        model(**inputs)
        model(**inputs)
    assert [record.kind for record in recording][:6] == ["self", "self", "decoder", "cross", "decoder", "cross"]
    assert [record.causal for record in recording][:6] == [False, False, True, False, True, False]
    assert [record.layer for record in recording] == [*range(6), *range(6)]
    assert {record.call for record in recording[6:]} == {1}
    assert int((recording[2].top.keys[0, 0] >= 0).sum(-1)[1]) == 2, (
        "later keys of T5's additive mask must not be listed"
    )
    assert recording[3].name == "decoder.block.0.layer.1.EncDecAttention"
    assert repr(recording) == "Recording(12 calls in 6 layers; 4 heads, 9 queries x 17 keys in the last call)"


def test_missing_weight() -> None:
    model, inputs = llama("sdpa")
    with torch.no_grad(), regard.watch(model.eval(), top=3, layers=[1]) as recording:
        model(**inputs)
    (record,) = recording
    assert record.layer == 1
    assert record.top.weights.shape == (2, 4, 17, 3)
    left = 1 - record.top.weights.sum(-1)
    assert torch.allclose(record.missing, left.clamp(min=0), atol=torch.finfo(torch.float32).eps)
    assert float(record.missing[..., 10:].min()) > 0


class CustomAttention(nn.Module):
    """A custom module that calls SDPA by a name bound at import."""

    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).chunk(3, -1)
        return type(self).attend(q, k, v, is_causal=True, scale=0.5)


def test_custom_attention_gradients() -> None:
    model, x = CustomAttention(), torch.randn(3, 7, 8)
    expected = torch.autograd.grad(model(x).square().sum(), model.inner.weight)[0]
    with regard.watch(model) as recording:
        watched = torch.autograd.grad(model(x).square().sum(), model.inner.weight)[0]
    assert torch.allclose(expected, watched, rtol=1e-5, atol=float(expected.abs().max()) * 1e-6)
    assert recording[0].causal
    assert recording[0].top.weights.shape == (3, 1, 7, 8)
    assert not recording[0].top.weights.requires_grad


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 6, 16)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    arguments = {"key_padding_mask": padding, "need_weights": need_weights}
    with torch.no_grad():
        before = layer(x, x, x, **arguments)
        with regard.watch(layer, top=6, rows=[1]) as recording:
            watched = layer(x, x, x, **arguments)
        _, weights = layer(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    assert torch.allclose(before[0], watched[0], atol=1e-6)
    assert (before[1] is None) == (watched[1] is None)
    if need_weights:
        assert torch.allclose(before[1], watched[1], atol=1e-6)
    assert torch.allclose(dense_weights(recording[0]), weights, atol=1e-6)
    assert int(recording[0].top.keys[1, :, :, 4:].max()) == -1


def test_transformer_encoder_in_train_and_eval_mode() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, dropout=0.1, batch_first=True), 2)
    x = torch.randn(2, 5, 16)
    for mode in (encoder.train, encoder.eval):
        mode()
        torch.manual_seed(1)
        before = encoder(x)
        torch.manual_seed(1)
        with regard.watch(encoder) as recording:
            watched = encoder(x)
        assert [record.name for record in recording] == ["layers.0.self_attn", "layers.1.self_attn"]
        assert torch.allclose(before, watched, atol=1e-5)


class RegardAttention(nn.Module):
    """A layer that calls `regard.attention`, with any arguments."""

    def __init__(self, **arguments: object) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, x: Tensor) -> object:
        return regard.attention(
            x, x[..., :2, :, :] if x.dim() > 3 else x, x[..., :2, :, :] if x.dim() > 3 else x, **self.arguments
        )


@pytest.mark.parametrize("axes", [(5, 3), (2, 5, 3), (2, 4, 5, 3), (2, 3, 4, 5, 3)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("summary", [None, regard.Summary(lse=True, rows=[1])])
def test_regard_attention(axes: tuple[int, ...], dropout: float, summary: regard.Summary | None) -> None:
    """Any score and normalizer, with bit-identical outputs and the weights of their formulas."""
    x = torch.randn(axes, generator=torch.Generator().manual_seed(0))
    arguments = {
        "score": regard.score.Additive(torch.ones(3)),
        "mask": regard.mask.causal() & regard.mask.window(3),
        "seed": 1,
    }
    arguments |= {"normalizer": regard.normalizer.Sparsemax(), "summary": summary, "dropout": dropout}
    model = RegardAttention(**arguments)
    before = model(x)
    with regard.watch(model, top=5) as recording:
        watched = model(x)
    if summary is None:
        assert torch.equal(watched, before)
    else:
        assert torch.equal(watched[0], before[0])
        assert torch.equal(watched[1].lse, before[1].lse)
        assert torch.equal(watched[1].rows, before[1].rows)
    (record,) = recording
    arguments |= {"summary": regard.Summary(full=True), "dropout": 0.0, "seed": None}
    full = RegardAttention(**arguments)(x)[1].full
    assert record.causal
    assert torch.equal(dense_weights(record), full.reshape(dense_weights(record).shape))


def test_recurrent_decoders_record_cross_attention() -> None:
    """Attention to the memory is recorded per step or in one call, and nothing else is."""
    x, memory = torch.randn(2, 3, 4), torch.randn(2, 7, 6)
    for order, calls in (("bahdanau", 3), ("luong", 1)):
        torch.manual_seed(0)
        model = regard.nn.recurrent.RecurrentDecoder(4, 5, 6, regard.nn.AdditiveAttention(5, 6, 8), order=order)
        with regard.watch(model, top=7) as recording:
            model(x, memory)
        assert [record.kind for record in recording] == ["cross"] * calls
        full = model(x, memory, summary=regard.Summary(full=True))[2].full
        assert full is not None
        weights = torch.cat([dense_weights(record)[:, 0] for record in recording], 1)
        torch.testing.assert_close(weights, full)


def test_exception_restores_state() -> None:
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


def test_watch_records_only_its_model() -> None:
    model, other, x = CustomAttention(), CustomAttention(), torch.randn(2, 5, 8)
    with regard.watch(model) as outer:
        other(x)
        with regard.watch(other) as inner:
            other(x)
        model(x)
    assert len(outer) == 1
    assert len(inner) == 1


def test_threads_record_their_own_model() -> None:
    counts: dict[int, int] = {}

    def run(number: int) -> None:
        layer, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 6, 16)
        with regard.watch(layer) as recording:
            for _ in range(number + 1):
                layer(x, x, x, need_weights=False)
        counts[number] = len(recording)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == {number: number + 1 for number in range(6)}
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_invalid_arguments_raise() -> None:
    with pytest.raises(TypeError, match=r"model: str; expected a torch\.nn\.Module"), regard.watch("bert"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="top: 0; expected an integer > 0"), regard.watch(nn.Linear(1, 1), top=0):
        pass
    linear = nn.Linear(1, 1)
    with pytest.warns(UserWarning, match="no attention was recorded in Linear"), regard.watch(linear):
        linear(torch.ones(1))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_heads_while_generating_match_eager(groups: int) -> None:
    """For one query with a mask, transformers pack the heads of a group into the axis of queries."""
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=groups,
        intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids, pad = torch.randint(5, 90, (2, 6)), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    recordings = []
    for implementation in ("eager", "sdpa", "regard"):
        if implementation == "regard":
            regard.nn.replace_attention(model)
        else:
            model.set_attn_implementation(implementation)
        with torch.no_grad(), regard.watch(model, top=9) as recording:
            model.generate(ids, attention_mask=pad, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        recordings.append(recording)
    for eager, *others in zip(*recordings, strict=True):
        for other in others:
            assert (other.heads, other.queries, other.keys, other.kind) == (4, eager.queries, eager.keys, "decoder")
            real = slice(2, None) if eager.queries > 1 else slice(None)  # rows of padding are unspecified
            torch.testing.assert_close(other.max[1, :, real], eager.max[1, :, real], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(other.max[0], eager.max[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(other.received[0], eager.received[0], rtol=1e-4, atol=1e-5)
    assert [(record.queries, record.keys) for record in recordings[1].joined()] == [(8, 8), (8, 8)]


@pytest.mark.parametrize("function", ["sdpa", "regard"])
def test_heads_folded_into_the_batch_are_split(function: str) -> None:
    class Attention(nn.Module):
        num_heads = 4

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            B, L, _ = x.shape
            q, k, v = self.qkv(x).view(B, L, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(3, B * 4, L, 4)
            attend = F.scaled_dot_product_attention if function == "sdpa" else regard.attention
            self.weights = (q @ k.mT / 2).softmax(-1).view(B, 4, L, L)
            return attend(q, k, v).view(B, 4, L, 4).transpose(1, 2).flatten(2)

    model = Attention().eval()
    with torch.no_grad(), regard.watch(model) as recording:
        model(torch.randn(2, 5, 16))
    record = recording[-1]
    assert (record.heads, record.queries, record.keys) == (4, 5, 5)
    torch.testing.assert_close(record.max, model.weights.amax(-1))
    torch.testing.assert_close(record.received, model.weights.sum(-2))


def test_self_attention_over_a_memory_is_not_cross_attention() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=16, mem_len=8)
    model, ids = transformers.XLNetModel(config).eval(), torch.randint(0, 50, (1, 6))
    with torch.no_grad(), regard.watch(model) as recording:
        model(ids, mems=model(ids).mems)
    assert [(record.kind, record.queries, record.keys) for record in recording] == [("self", 6, 6)] * 2 + [
        ("self", 6, 12)
    ] * 2
