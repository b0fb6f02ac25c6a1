"""Attention that a layer computes in blocks is not recorded as fragments: the layer is named instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard

_SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 128,
}  # fmt: skip


def _watch(model: nn.Module, *args: Any, passes: int = 1, **kwargs: Any) -> tuple[regard.watch.Recording, list[str]]:
    """Return the recording, and the warnings of the watch."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad(), regard.watch(model.eval()) as recording:
            for _ in range(passes):
                model(*args, **kwargs)
    return recording, [str(warning.message) for warning in caught if "not recorded" in str(warning.message)]


def _bigbird(transformers: Any, kind: str) -> nn.Module:
    config = transformers.BigBirdConfig(**_SMALL, attention_type=kind, block_size=4, num_random_blocks=1)
    return transformers.BigBirdModel(config)  # type: ignore[no-any-return]


def _longt5(transformers: Any) -> nn.Module:
    config = transformers.LongT5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2, local_radius=3
    )
    return transformers.LongT5Model(config)  # type: ignore[no-any-return]


def test_block_sparse_layers_of_transformers_are_named() -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 50, (2, 64), generator=torch.Generator().manual_seed(0))
    recording, messages = _watch(_bigbird(transformers, "block_sparse"), ids)
    assert not recording
    assert len(messages) == 1
    assert "in encoder.layer.0.attention.self, encoder.layer.1.attention.self: it is computed in blocks" in messages[0]
    recording, messages = _watch(_bigbird(transformers, "original_full"), ids)
    assert [(record.layer, record.queries, record.keys) for record in recording] == [(0, 64, 64), (1, 64, 64)]
    assert not messages


def test_other_layers_keep_their_records_and_numbers() -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 50, (2, 64), generator=torch.Generator().manual_seed(0))
    recording, (message,) = _watch(_longt5(transformers), input_ids=ids, decoder_input_ids=ids[:, :5], passes=2)
    assert "LocalSelfAttention: it is computed in blocks" in message
    assert [(r.layer, r.call, r.kind, r.queries, r.keys) for r in recording] == [
        (0, 0, "decoder", 5, 5), (1, 0, "cross", 5, 64), (0, 1, "decoder", 5, 5), (1, 1, "cross", 5, 64)
    ]  # fmt: skip


class Attention(nn.Module):
    """Attention that a function of hidden states computes."""

    def __init__(self, function: Callable[[Tensor], Tensor], heads: int = 2) -> None:
        super().__init__()
        self.function, self.num_heads = function, heads

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _sdpa(q: Tensor, k: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, q if k is None else k, q if k is None else k)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(-3, -2)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)


# (B, L, D) = (3, 12, 8) unless another shape is given.
_COMPLETE: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "heads": (lambda x: _joined(_sdpa(_heads(x))), (3, 12, 8)),
    "length first": (lambda x: _joined(_sdpa(_heads(x.transpose(0, 1)))).transpose(0, 1), (12, 3, 8)),
    "no batch": (lambda x: _joined(_sdpa(_heads(x))), (12, 8)),
    "folded heads": (lambda x: _sdpa(_heads(x).flatten(0, 1)).unflatten(0, (3, 2)), (3, 12, 8)),
    "one head": (_sdpa, (3, 12, 8)),
    "split beforehand": (_sdpa, (3, 2, 12, 4)),
    "pooled": (lambda x: _joined(_sdpa(_heads(x[:, :1]), _heads(x)))[:, 0], (3, 12, 8)),
    "fewer queries": (lambda x: _joined(_sdpa(_heads(x[:, ::3]), _heads(x))), (3, 12, 8)),
    "image": (lambda x: _joined(_sdpa(_heads(x.flatten(2).mT))).mT.reshape(x.shape), (3, 8, 4, 5)),
    "image, channels last": (lambda x: _joined(_sdpa(_heads(x.flatten(1, 2)))).reshape(x.shape), (3, 4, 5, 8)),
    "axial": (lambda x: _joined(_sdpa(_heads(x.flatten(0, 1)))).reshape(x.shape), (3, 4, 5, 8)),
    "windows": (lambda x: _joined(_sdpa(_heads(x.reshape(12, 3, 8)))).reshape(x.shape), (3, 12, 8)),
    "packed texts": (
        lambda x: torch.cat([_joined(_sdpa(_heads(part))) for part in x.split([5, 4, 3], 1)], 1), (1, 12, 8)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _COMPLETE)
def test_calls_over_positions_of_the_layer_are_recorded(name: str) -> None:
    function, shape = _COMPLETE[name]
    recording, messages = _watch(Attention(function), torch.randn(shape))
    assert len(recording) == (3 if name == "packed texts" else 1)
    assert not messages


_FRAGMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "windows with neighbors": lambda x: _joined(
        _sdpa(_heads(x.reshape(9, 4, 8)), _heads(torch.cat([x.reshape(9, 4, 8)] * 3, 1)))
    ).reshape(x.shape),
    "landmarks": lambda x: _joined(
        _sdpa(_heads(x), _sdpa(_heads(x[:, ::4]), _heads(x)))
    ),
    "some of the queries": lambda x: torch.cat([_joined(_sdpa(_heads(x[:, :5]), _heads(x))), x[:, 5:]], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", _FRAGMENTS)
def test_fragments_are_dropped_and_named(name: str) -> None:
    model = nn.ModuleDict({"block": Attention(_FRAGMENTS[name]), "full": Attention(_COMPLETE["heads"][0])})
    model.forward = lambda x: model["full"](model["block"](x))  # type: ignore[method-assign, assignment]
    recording, messages = _watch(model, torch.randn(3, 12, 8))
    assert [(record.name, record.layer, record.queries) for record in recording] == [("full", 0, 12)]
    assert [message.split(":")[0] for message in messages] == ["attention was not recorded in block"]
