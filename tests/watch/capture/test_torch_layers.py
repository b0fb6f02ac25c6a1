"""Torch's own layers under a watch: they keep their fast path, with bit-identical outputs, and are recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.records import dense_weights
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import regard
from regard.watch.capture import torch_layers

EPS = torch.finfo(torch.float32).eps
LENGTHS = torch.tensor([7, 4, 6])
PADDING = torch.arange(7) >= LENGTHS[:, None]
X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)


def encoder(norm_first: bool = False, dropout: float = 0.1) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=dropout, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


def slow_path_weights(model: nn.TransformerEncoder, x: Tensor, **masks: Tensor) -> list[Tensor]:
    """Return the weights of each layer, from torch's slow path."""
    result = []
    for layer in model.layers:
        assert isinstance(layer, nn.TransformerEncoderLayer)
        y = layer.norm1(x) if layer.norm_first else x
        mask, padding = masks.get("mask"), masks.get("src_key_padding_mask")
        result.append(layer.self_attn(y, y, y, padding, True, mask, False)[1])
        x = layer(x, mask, padding)
    return result


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "masks",
    [
        {}, {"src_key_padding_mask": PADDING}, {"mask": CAUSAL}, {"mask": CAUSAL.isinf()},
        {"mask": CAUSAL.isinf(), "src_key_padding_mask": PADDING},
    ],
    ids=["none", "padding", "causal", "causal-bool", "both"],
)  # fmt: skip
@pytest.mark.parametrize("gradients", [False, True])
def test_encoder_records_weights(norm_first: bool, masks: dict[str, Tensor], gradients: bool) -> None:
    """Without gradients, each layer is one operator, on nested tensors if there is padding."""
    model = encoder(norm_first).eval()
    with torch.set_grad_enabled(gradients):
        before = model(X, **masks)
        with regard.watch(model, top=7) as recording:
            watched = model(X, **masks)
    if gradients:  # SDPA is replaced by `regard.attention`
        assert (watched - before).abs().max() <= 16 * EPS * before.abs().max()
    else:
        assert torch.equal(watched, before)
    assert [record.name for record in recording] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert {record.kind for record in recording} == {"decoder" if "mask" in masks else "self"}
    with torch.no_grad():
        expected = slow_path_weights(model, X, **masks)
    for record, weights in zip(recording, expected, strict=True):
        assert (record.heads, record.queries, record.keys) == (4, 7, 7)
        is_token = ~PADDING if "src_key_padding_mask" in masks else torch.ones(3, 7, dtype=torch.bool)
        error = (dense_weights(record) - weights).transpose(1, 2)[is_token].abs().max()
        assert error <= 16 * EPS


def test_encoder_padding_attends_to_nothing() -> None:
    model = encoder().eval()
    with torch.no_grad(), regard.watch(model) as recording:
        out = model(X, src_key_padding_mask=PADDING)
    assert bool((out[PADDING] == 0).all()), "the fast path is not taken"
    assert bool((recording[1].max.transpose(1, 2)[PADDING] == 0).all())
    assert float(recording[1].max.transpose(1, 2)[~PADDING].min()) > 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_multihead_returns_weights(training: bool, averaged: bool, padded: bool, gradients: bool) -> None:
    """The returned weights are torch's, after dropout. The recorded weights are those before dropout."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, dropout=0.3, batch_first=True).train(training)
    padding = PADDING if padded else None
    with torch.set_grad_enabled(gradients):
        torch.manual_seed(1)
        before = layer(X, X, X, padding, average_attn_weights=averaged)
        torch.manual_seed(1)
        with regard.watch(layer, top=7, rows=[2]) as recording:
            watched = layer(X, X, X, padding, average_attn_weights=averaged)
        _, expected = layer.eval()(X, X, X, padding, average_attn_weights=False)
    assert torch.equal(watched[0], before[0])
    assert torch.equal(watched[1], before[1])
    (record,) = recording
    assert (dense_weights(record) - expected).abs().max() <= 16 * EPS
    assert record.rows is not None
    assert (record.rows - expected[:, :, 2:3]).abs().max() <= 16 * EPS


@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_records_all_layers(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 1, 2, 32, batch_first=batch_first).eval()
    source, target = (torch.randn(2, n, 16).transpose(0, 0 if batch_first else 1) for n in (7, 5))
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    if not batch_first:
        source, target = source.contiguous(), target.contiguous()
    with torch.no_grad():
        before = model(source, target, tgt_mask=mask)
        with regard.watch(model) as recording:
            watched = model(source, target, tgt_mask=mask)
    assert (watched - before).abs().max() <= 16 * EPS * before.abs().max()
    assert [(record.kind, record.queries, record.keys) for record in recording] == [
        ("self", 7, 7), ("decoder", 5, 5), ("cross", 5, 7), ("decoder", 5, 5), ("cross", 5, 7),
    ]  # fmt: skip
    assert recording[2].name == "decoder.layers.0.multihead_attn"


def test_torch_layer_with_custom_submodule() -> None:
    """It is recorded as any other module: such a layer is not treated as torch's own."""

    class CustomAttention(nn.MultiheadAttention):
        pass

    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    layer.self_attn = CustomAttention(16, 4, batch_first=True)
    assert not torch_layers.is_torch_layer(layer)
    with torch.no_grad(), regard.watch(layer.eval(), top=7) as recording:
        layer(X)
    assert [record.name for record in recording] == ["self_attn"]


def test_functional_multihead_attention() -> None:
    """A model calls `F.multi_head_attention_forward` itself, with and without `need_weights`."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 4)

        def forward(self, x: Tensor, need_weights: bool) -> Tensor:
            m = self.inner
            out, _ = F.multi_head_attention_forward(
                x, x, x, 16, 4, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0, m.out_proj.weight,
                m.out_proj.bias, need_weights=need_weights,
            )  # fmt: skip
            return out

    model = Model()
    with torch.no_grad(), regard.watch(model, top=3) as recording:
        first, second = model(X, False), model(X, True)
    assert torch.allclose(first, second, atol=1e-6)
    assert torch.allclose(dense_weights(recording[0]), dense_weights(recording[1]), atol=1e-6)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_nested_watches_both_record(fast: bool, need_weights: bool) -> None:
    layer = nn.MultiheadAttention(16, 4, batch_first=fast).eval()
    with torch.no_grad():
        before = layer(X, X, X, need_weights=need_weights)[0]
        with regard.watch(layer, top=7) as outer, regard.watch(layer, top=2) as inner:
            watched = layer(X, X, X, need_weights=need_weights)[0]
    assert torch.allclose(before, watched, atol=1e-6)
    assert len(outer) == len(inner) == 1
    assert torch.allclose(outer[0].top.weights[..., :2], inner[0].top.weights, atol=1e-6)


def test_exception_in_layer_restores_state() -> None:
    model = encoder().eval()
    functions = {name: getattr(owner, attribute) for name, (owner, attribute) in torch_layers.FUNCTIONS.items()}
    with pytest.raises((RuntimeError, AssertionError)), torch.no_grad(), regard.watch(model):
        model(X[..., :5])  # wrong width
    assert not _get_current_function_mode_stack()
    assert functions == {name: getattr(owner, attribute) for name, (owner, attribute) in torch_layers.FUNCTIONS.items()}
    with torch.no_grad(), regard.watch(model) as recording:
        with pytest.raises((RuntimeError, AssertionError)):
            model(X[..., :5])
        assert len(_get_current_function_mode_stack()) == 1
        model(X)
    assert len(recording) == 2
    copy.deepcopy(model)  # the modules hold no hooks


@pytest.mark.parametrize("fast", [True, False])
def test_foreign_patch_set_inside_watch_survives(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """The patch of another library, set inside a watch on top of ours, stays, and later watches still record once."""
    layer = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    calls: list[str] = []

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def patch(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return patch

    for owner, attribute in torch_layers.FUNCTIONS.values():
        monkeypatch.setattr(owner, attribute, getattr(owner, attribute))  # restored at the end of the test
    foreign: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as other_library:
        with regard.watch(layer):
            for name, (owner, attribute) in torch_layers.FUNCTIONS.items():
                foreign[name] = count(name, getattr(owner, attribute))
                other_library.setattr(owner, attribute, foreign[name])
        for name, (owner, attribute) in torch_layers.FUNCTIONS.items():
            assert getattr(owner, attribute) is foreign[name]
        with torch.set_grad_enabled(not fast), regard.watch(layer) as recording:
            layer(X, X, X)
        assert calls == (["fast_mha"] if fast else ["mha", "softmax"])
        assert len(recording) == 1
    # Now the inactive patches of the first watch are set.
    with torch.set_grad_enabled(not fast), regard.watch(layer) as recording:
        layer(X, X, X)
    assert len(recording) == 1


def test_ref_counted_patch_is_undone_once() -> None:
    events: list[str] = []

    def apply() -> ExitStack:
        events.append("applied")
        stack = ExitStack()
        stack.callback(events.append, "undone")
        return stack

    patch = torch_layers.RefCountedPatch(apply)
    with patch():
        with pytest.raises(KeyError), patch():
            raise KeyError
        assert events == ["applied"]
    assert events == ["applied", "undone"]
    with patch():
        pass
    assert events == ["applied", "undone"] * 2
