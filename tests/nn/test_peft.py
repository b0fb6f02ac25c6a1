"""Adapters of PEFT on our layers: the same outputs, gradients, merged weights and files as on torch's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard

peft = pytest.importorskip("peft", reason="pip install 'regard[dev]'")


def _encoder() -> nn.Module:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _adapted(model: nn.Module) -> Any:
    torch.manual_seed(2)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["self_attn"], r=2))
    with torch.no_grad():
        for name, x in adapted.named_parameters():
            if "lora_B" in name:
                x.copy_(0.1 * torch.randn_like(x))
    return adapted


@pytest.fixture
def _forward_of_torch() -> Iterator[None]:
    """The fused kernel of torch ignores adapters."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("_forward_of_torch")
@pytest.mark.parametrize("train", [False, True])
def test_lora_on_replaced_layers_equals_lora_on_torch(train: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    theirs = _encoder().train(train)
    ours = regard.nn.replace_attention(copy.deepcopy(theirs))
    plain = theirs(x, src_key_padding_mask=padding).detach()
    results: list[list[Tensor]] = []
    for name, base in (("theirs", theirs), ("ours", ours)):
        model = _adapted(copy.deepcopy(base)).train(train)
        out = model(x, src_key_padding_mask=padding)
        assert float((out - plain)[0].abs().max()) > 1e-3  # the adapter has an effect
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(out[0].square().sum(), [p for p in model.parameters() if p.requires_grad])
        assert all(float(g.abs().sum()) > 0 for g in gradients) and any("lora_A" in n for n in names)
        model.save_pretrained(tmp_path / name)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).train(train)
        torch.testing.assert_close(loaded(x, src_key_padding_mask=padding), out)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x, src_key_padding_mask=padding), out, rtol=1e-4, atol=1e-5)
        results.append([out[0], out[1, :3], *gradients])
    for got, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_lora_on_grouped_heads_is_refused_by_peft() -> None:
    model = nn.Sequential()
    model.attn = regard.nn.MultiheadAttention(16, 4, kv_heads=2, batch_first=True)
    with pytest.raises(ValueError, match="Only same embed for query/key/value"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["attn"], r=2))


def test_encoder_layers_of_torch_call_our_forward() -> None:
    """Their fused kernel, which knows neither scores nor positions, is not used in evaluation."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    layer.self_attn = regard.nn.MultiheadAttention(16, 4, batch_first=True, normalizer=regard.normalizer.Sparsemax())
    layer.eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), regard.record_backends() as ran:
        out = layer(x)
    assert len(ran) == 1
    torch.testing.assert_close(out, layer(x))
