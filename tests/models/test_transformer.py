"""Sequence-to-sequence models against the layers of torch, and steps against full passes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard.components.position import sinusoidal
from regard.models.recurrent import Recurrent
from regard.models.transformer import Transformer, TransformerEncoder

_SIZES: dict[str, Any] = {"width": 24, "hidden": 34, "layers": 2, "dropout": 0.3}
MODELS: dict[str, Any] = {
    "transformer": Transformer,
    "recurrent": Recurrent,
    "recurrent, lstm": partial(Recurrent, cell="lstm"),
}


def _made(name: str, shared: bool = False) -> Any:
    torch.manual_seed(0)
    return MODELS[name](31, 31 if shared else 37, **_SIZES, shared=shared).double().eval()


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randint(4, 31, shape, generator=generator) for shape in ((3, 7), (3, 5)))
    return source, torch.tensor([7, 2, 5]), target


def test_transformer_matches_torch() -> None:
    """The same weights in pre-norm `nn.TransformerEncoderLayer` and `nn.TransformerDecoderLayer`."""
    model, (source, lengths, target) = _made("transformer"), _inputs()
    options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True, "dtype": torch.float64}
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(24, 4, 34, **options),
        2,
        nn.LayerNorm(24, dtype=torch.float64),
        enable_nested_tensor=False,
    )
    decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(24, 4, 34, **options), 2, nn.LayerNorm(24, dtype=torch.float64)
    )
    with torch.no_grad():
        for index, layer in enumerate(encoder.layers):
            attend, feed = model.encoder.attention[index], model.encoder.feed[index]
            _copy(
                layer,
                self_attn=attend.attention,
                norm1=attend.norm,
                linear1=feed.inner,
                linear2=feed.outer,
                norm2=feed.norm,
            )
        for index, layer in enumerate(decoder.layers):
            attend, cross, feed = model.attention[index], model.cross[index], model.feed[index]
            _copy(layer, self_attn=attend.attention, norm1=attend.norm, multihead_attn=cross.attention, norm2=cross.norm,
                  linear1=feed.inner, linear2=feed.outer, norm3=feed.norm)  # fmt: skip
        _copy(encoder, norm=model.encoder.norm)
        _copy(decoder, norm=model.norm)
    padding = torch.arange(7) >= lengths[:, None]
    x = model.source.weight[source] * 24**0.5 + sinusoidal(7, 24).double()
    y = model.target.weight[target] * 24**0.5 + sinusoidal(5, 24).double()
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    memory = encoder.train()(x, src_key_padding_mask=padding)  # no dropout; in training there is no other path
    out = decoder.train()(y, memory, tgt_mask=causal, memory_key_padding_mask=padding) @ model.target.weight.T
    got = model(source, lengths, target)
    torch.testing.assert_close(got, out, rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(out)
    for mine, theirs in (
        (model.encoder.attention[0].attention, encoder.layers[0].self_attn),
        (model.feed[1], decoder.layers[1]),
    ):
        name = "in_proj_weight" if hasattr(mine, "in_proj_weight") else "inner.weight"
        other = name if name != "inner.weight" else "linear1.weight"
        (a,) = torch.autograd.grad((got * weight).sum(), mine.get_parameter(name), retain_graph=True)
        (b,) = torch.autograd.grad((out * weight).sum(), theirs.get_parameter(other), retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def _copy(to: nn.Module, **parts: nn.Module) -> None:
    for name, part in parts.items():
        to.get_submodule(name).load_state_dict(part.state_dict())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_steps_match_forward(name: str, shared: bool) -> None:
    model, (source, lengths, target) = _made(name, shared), _inputs()
    with torch.no_grad():
        whole, state = model(source, lengths, target), model.start(source, lengths)
        for t in range(5):
            scores, state = model.step(target[:, t], state)
            torch.testing.assert_close(scores, whole[:, t], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_batch_rows_and_padding_are_independent(name: str) -> None:
    model, (source, lengths, target) = _made(name), _inputs()
    together, weights = model(source, lengths, target), model.align(source, lengths, target)
    noise = source.masked_fill(torch.arange(7) >= lengths[:, None], 9)
    torch.testing.assert_close(model(noise, lengths, target), together, rtol=0, atol=0)
    for row in range(3):
        n = int(lengths[row])
        alone = model(source[row : row + 1, :n], lengths[row : row + 1], target[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-12, atol=1e-12)
        assert bool((weights[row, :, n:] == 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5, dtype=torch.float64))
    # A later token does not affect earlier outputs.
    torch.testing.assert_close(model(source, lengths, target[:, :3]), together[:, :3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_state_reorder_selects_rows(name: str) -> None:
    model, (source, lengths, target) = _made(name), _inputs()
    rows = torch.tensor([2, 0, 0, 1, 2])
    with torch.no_grad():
        _, state = model.step(target[:, 0], model.start(source, lengths))
        scores, state = model.step(target[rows, 1], state.reorder(rows))
        whole = model(source[rows], lengths[rows], target[rows, :2])
    torch.testing.assert_close(scores, whole[:, 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_all_parameters_have_gradients(name: str) -> None:
    model = _made(name).train()
    model(*_inputs()).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


@pytest.mark.parametrize("name", MODELS)
def test_shared_embedding_is_counted_once(name: str) -> None:
    apart, shared = (sum(p.numel() for p in _made(name, s).parameters()) for s in (False, True))
    assert apart - shared == (31 + 37 - 31) * 24
    with pytest.raises(ValueError, match="shared is True but sources is 3 and targets is 4; expected the same"):
        MODELS[name](3, 4, shared=True)


def test_upper_layers_depend_on_context() -> None:
    """The state of the second layer affects the next logits, with the same tokens and memory."""
    model, (source, lengths, target) = _made("recurrent"), _inputs()
    with torch.no_grad():
        here, there = (model.step(target[:, 0], model.start(x, lengths))[1] for x in (source, source.flip(0)))
        assert here.above.hidden.shape == (1, 3, 34)
        assert not torch.allclose(here.above.hidden, there.above.hidden)
        first, second = (model.step(target[:, 1], replace(here, above=x.above))[0] for x in (here, there))
        assert not torch.allclose(first, second)


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ValueError, match="hidden is 33; expected an even number"):
        Recurrent(3, 4, hidden=33)
    model = _made("transformer")
    with pytest.raises(
        TypeError, match=r"Transformer: tokens is a float32 tensor of shape \(1, 2\); expected an integer"
    ):
        model(torch.ones(1, 2), torch.tensor([2]), torch.ones(1, 2))
    assert TransformerEncoder(8, 2, 8, 1)(torch.randn(2, 0, 8)).shape == (2, 0, 8)
