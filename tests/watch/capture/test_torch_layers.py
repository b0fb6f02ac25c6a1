"""Torch's own layers keep their fast path under a watch, to the bit, and are seen all the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.records import dense
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


def by_hand(model: nn.TransformerEncoder, x: Tensor, **masks: Tensor) -> list[Tensor]:
    """The weights of each layer, by torch's slow path."""
    found = []
    for layer in model.layers:
        assert isinstance(layer, nn.TransformerEncoderLayer)
        y = layer.norm1(x) if layer.norm_first else x
        mask, padding = masks.get("mask"), masks.get("src_key_padding_mask")
        found.append(layer.self_attn(y, y, y, padding, True, mask, False)[1])
        x = layer(x, mask, padding)
    return found


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
def test_encoder(norm_first: bool, masks: dict[str, Tensor], gradients: bool) -> None:
    """Without gradients it is one operator a layer, over nested tensors where there is padding."""
    model = encoder(norm_first).eval()
    with torch.set_grad_enabled(gradients):
        before = model(X, **masks)
        with regard.watch(model, top=7) as seen:
            watched = model(X, **masks)
    if gradients:  # torch's attention is answered by ours
        assert (watched - before).abs().max() <= 16 * EPS * before.abs().max()
    else:
        assert torch.equal(watched, before)
    assert [record.name for record in seen] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert {record.kind for record in seen} == {"decoder" if "mask" in masks else "self"}
    with torch.no_grad():
        truth = by_hand(model, X, **masks)
    for record, weights in zip(seen, truth, strict=True):
        assert (record.heads, record.queries, record.keys) == (4, 7, 7)
        there = ~PADDING if "src_key_padding_mask" in masks else torch.ones(3, 7, dtype=torch.bool)
        error = (dense(record) - weights).transpose(1, 2)[there].abs().max()
        assert error <= 16 * EPS


def test_padding_that_is_taken_out_attends_to_nothing() -> None:
    model = encoder().eval()
    with torch.no_grad(), regard.watch(model) as seen:
        out = model(X, src_key_padding_mask=PADDING)
    assert bool((out[PADDING] == 0).all()), "torch takes its fast path"
    assert bool((seen[1].max.transpose(1, 2)[PADDING] == 0).all())
    assert float(seen[1].max.transpose(1, 2)[~PADDING].min()) > 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_asked_for_weights(training: bool, averaged: bool, padded: bool, gradients: bool) -> None:
    """They are torch's own, dropped ones among them; a watch tells what they were before that."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, dropout=0.3, batch_first=True).train(training)
    padding = PADDING if padded else None
    with torch.set_grad_enabled(gradients):
        torch.manual_seed(1)
        before = layer(X, X, X, padding, average_attn_weights=averaged)
        torch.manual_seed(1)
        with regard.watch(layer, top=7, rows=[2]) as seen:
            watched = layer(X, X, X, padding, average_attn_weights=averaged)
        _, truth = layer.eval()(X, X, X, padding, average_attn_weights=False)
    assert torch.equal(watched[0], before[0])
    assert torch.equal(watched[1], before[1])
    (record,) = seen
    assert (dense(record) - truth).abs().max() <= 16 * EPS
    assert record.rows is not None
    assert (record.rows - truth[:, :, 2:3]).abs().max() <= 16 * EPS


@pytest.mark.parametrize("batch_first", [False, True])
def test_whole_transformer(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 1, 2, 32, batch_first=batch_first).eval()
    source, target = (torch.randn(2, n, 16).transpose(0, 0 if batch_first else 1) for n in (7, 5))
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    if not batch_first:
        source, target = source.contiguous(), target.contiguous()
    with torch.no_grad():
        before = model(source, target, tgt_mask=mask)
        with regard.watch(model) as seen:
            watched = model(source, target, tgt_mask=mask)
    assert (watched - before).abs().max() <= 16 * EPS * before.abs().max()
    assert [(record.kind, record.queries, record.keys) for record in seen] == [
        ("self", 7, 7), ("decoder", 5, 5), ("cross", 5, 7), ("decoder", 5, 5), ("cross", 5, 7),
    ]  # fmt: skip
    assert seen[2].name == "decoder.layers.0.multihead_attn"


def test_layer_of_ones_own_inside() -> None:
    """It is seen, and the rest with it: the fast path is torch's affair no more."""

    class Mine(nn.MultiheadAttention):
        pass

    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    layer.self_attn = Mine(16, 4, batch_first=True)
    assert not torch_layers.is_torch_own(layer)
    with torch.no_grad(), regard.watch(layer.eval(), top=7) as seen:
        layer(X)
    assert [record.name for record in seen] == ["self_attn"]


def test_functional_call_outside_of_any_module() -> None:
    """`F.multi_head_attention_forward` from a model's own code, with weights and without."""

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 4)

        def forward(self, x: Tensor, need: bool) -> Tensor:
            m = self.inner
            out, _ = F.multi_head_attention_forward(
                x, x, x, 16, 4, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0, m.out_proj.weight,
                m.out_proj.bias, need_weights=need,
            )  # fmt: skip
            return out

    model = Mine()
    with torch.no_grad(), regard.watch(model, top=3) as seen:
        first, second = model(X, False), model(X, True)
    assert torch.allclose(first, second, atol=1e-6)
    assert torch.allclose(dense(seen[0]), dense(seen[1]), atol=1e-6)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_watches_within_watches(fast: bool, need_weights: bool) -> None:
    layer = nn.MultiheadAttention(16, 4, batch_first=fast).eval()
    with torch.no_grad():
        before = layer(X, X, X, need_weights=need_weights)[0]
        with regard.watch(layer, top=7) as outer, regard.watch(layer, top=2) as inner:
            watched = layer(X, X, X, need_weights=need_weights)[0]
    assert torch.allclose(before, watched, atol=1e-6)
    assert len(outer) == len(inner) == 1
    assert torch.allclose(outer[0].top.weights[..., :2], inner[0].top.weights, atol=1e-6)


def test_nothing_stays_behind_a_failure_inside() -> None:
    model = encoder().eval()
    functions = {name: getattr(owner, attribute) for name, (owner, attribute) in torch_layers.FUNCTIONS.items()}
    with pytest.raises((RuntimeError, AssertionError)), torch.no_grad(), regard.watch(model):
        model(X[..., :5])  # of a width that it cannot take
    assert not _get_current_function_mode_stack()
    assert functions == {name: getattr(owner, attribute) for name, (owner, attribute) in torch_layers.FUNCTIONS.items()}
    with torch.no_grad(), regard.watch(model) as seen:
        with pytest.raises((RuntimeError, AssertionError)):
            model(X[..., :5])
        assert len(_get_current_function_mode_stack()) == 1
        model(X)
    assert len(seen) == 2
    copy.deepcopy(model)  # nothing hangs on its modules
