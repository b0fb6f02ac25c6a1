"""Recorded functions: calls of any size equal those of the function; text from elsewhere runs nothing but its operations."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.components.graph import Graph, IndexGraph, VectorGraph, encode

_ROWS, _COLUMNS = 8, 16
_IDS = torch.arange(200) // 7


def _recorded(function: Callable[..., Any], kind: type[Graph], *tensors: Tensor) -> Any:
    """Return a graph of a function, whose last parameters are the tensors that it closes over."""
    traced = torch.fx.symbolic_trace(function).graph
    *nodes, output = traced.nodes
    inputs = [node for node in nodes if node.op == "placeholder"]
    assert len(inputs) == len(inspect.signature(function).parameters)
    text = encode([node for node in nodes if node.op != "placeholder"], inputs, output.args[0])
    return kind(text, tensors, (), _ROWS, _COLUMNS)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 16), (9, 17), (31, 5), (23, 67)])
@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (lambda b, h, i, j: i >= j, ()),
        (lambda b, h, i, j: i, ()),
        (lambda b, h, i, j, ids: ids[i] == ids[j], (_IDS,)),
        (lambda b, h, i, j, ids: (ids[i] == ids[j]) | (j < b + 2), (_IDS,)),
        (lambda b, h, i, j: torch.where(h > 1, i - j, (j - i) * h).abs() <= 3, ()),
        (lambda b, h, i, j: -(i - j).abs().to(torch.float64) * (h + 1) / (b + 1), ()),
        (lambda b, h, i, j: torch.nn.functional.relu(i - j).float() / 3.0, ()),
    ],
)
def test_function_of_indices(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], rows: int, columns: int
) -> None:
    graph = _recorded(function, IndexGraph, *tensors)
    b, h = torch.tensor([0, 3]).view(-1, 1, 1, 1), torch.arange(3).view(1, -1, 1, 1)
    i, j = torch.arange(5, 5 + rows).view(1, 1, -1, 1), torch.arange(2, 2 + columns).view(1, 1, 1, -1)
    shape = (2, 3, rows, columns)
    assert torch.equal(graph(b, h, i, j).expand(shape), function(b, h, i, j, *tensors).expand(shape))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 16), (9, 17), (23, 67)])
def test_function_of_vectors(rows: int, columns: int) -> None:
    def function(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        # The square root has no derivative at 0, which rows of zeros would have.
        return -((q * w)[..., :, None, :] - k[..., None, :, :]).square().sum(dim=-1).sqrt()

    torch.manual_seed(0)
    w = torch.randn(3, 1, 5, dtype=torch.float64, requires_grad=True)
    q, k = (torch.randn(2, 3, n, 5, dtype=torch.float64, requires_grad=True) for n in (rows, columns))
    results = []
    for call in (_recorded(function, VectorGraph, w), lambda q, k: function(q, k, w)):
        out = call(q, k)
        results.append([out, *torch.autograd.grad(out.cos().sum(), [q, k, w])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "step",
    [
        ["builtins.eval", {"tuple": ["1"]}],
        ["builtins.getattr", {"tuple": [{"value": 0}, "__class__"]}],
        ["os.system", {"tuple": ["true"]}],
        ["torch.from_file", {"tuple": ["/dev/null"]}],
        ["torch.load", {"tuple": ["/dev/null"]}],
        ["sym.load", {"tuple": ["/dev/null"]}],
        ["functional.importlib", {"tuple": []}],
        ["functional.handle_torch_function", {"tuple": []}],
        ["operator.call", {"tuple": []}],
        ["operator.attrgetter", {"tuple": ["x"]}],
        ["method.apply_", {"tuple": [{"value": 0}]}],
        ["method.register_hook", {"tuple": [{"value": 0}]}],
        ["method.__reduce_ex__", {"tuple": [{"value": 0}, 2]}],
        ["method.numpy", {"tuple": [{"value": 0}]}],
    ],
)
def test_text_from_elsewhere_runs_only_operations_on_tensors(step: list[Any]) -> None:
    text = json.dumps({"uses": [True] * 4, "steps": [[*step, {"dict": {}}]], "result": 4})
    index = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"not an operation that a graph may hold|not an attribute that a graph may read"
    ):
        IndexGraph(text, (), (), 1, 1)(index, index, index, index)


@pytest.mark.parametrize(
    "function", [lambda b, h, i, j: torch.rand_like(i * 1.0) > 0.5, lambda b, h, i, j: i.bernoulli() > 0]
)
def test_random_function_is_refused(function: Callable[..., Tensor]) -> None:
    with pytest.raises(NotImplementedError, match="operation"):
        _recorded(function, IndexGraph)
