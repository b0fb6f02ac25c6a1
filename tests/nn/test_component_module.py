"""`ComponentModule` registers the tensors of a component."""

from __future__ import annotations

import copy

import torch
from torch import nn

import regard
from regard import mask, normalizer, position, score
from regard.nn import ComponentModule


def test_parameters_and_buffers_are_registered() -> None:
    v, bias = nn.Parameter(torch.randn(3)), torch.randn(3)
    word = ComponentModule(score.Additive(v, bias=bias))
    assert [name for name, _ in word.named_parameters()] == ["v"]
    assert list(word.state_dict()) == ["v", "bias"]
    assert word().v is v
    q = torch.randn(1, 1, 5, 3)
    regard.attention(q, q, q, score=word()).square().sum().backward()
    assert v.grad is not None and bool(v.grad.any())


def test_component_module_moves_copies_and_loads() -> None:
    word = ComponentModule(position.T5(nn.Parameter(torch.randn(8, 2)), max_distance=16))
    other = copy.deepcopy(word).double()
    assert other().table.dtype == torch.float64
    assert other().table is other.table
    assert word().table.dtype == torch.float32
    other.load_state_dict({"table": torch.ones(8, 2)})
    assert bool((other().table == 1).all())
    assert bool((word().table != 1).any())
    found = torch.func.functional_call(word, {"table": torch.zeros(8, 2)}, ())
    assert not bool(found.table.any())


def test_components_without_tensors_and_nested_components() -> None:
    plain = normalizer.Entmax(1.5)
    assert ComponentModule(plain)() is plain
    both = ComponentModule(mask.lengths(torch.tensor([2, 3])) & mask.documents(torch.tensor([[0, 0, 1], [0, 1, 1]])))
    kept = both.state_dict()
    assert list(kept) == both.names == ["left_n", "right_queries", "right_keys"]
    assert kept["left_n"].tolist() == [2, 3]

    def own(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.mT

    assert ComponentModule(own)() is own
