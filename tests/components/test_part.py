"""Parts of problems: the mask and the bias of a part equal those of the whole at its pairs, on every backend."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from support.problems import Problem, problems
from torch import Tensor

import regard
from regard import Summary, normalizer
from regard.backends import choose
from regard.backends.dropout import keep
from regard.components.function import FunctionBias
from regard.components.part import bias_of_part, mask_of_part
from regard.components.position import Bias, TensorBias
from regard.components.predicate import Mask
from regard.components.tile import Box, Range, Sizes, Tile
from regard.plan.arguments import four_axis_bias, resolve_alignment
from regard.plan.assemble import make_problem


@st.composite
def ranges(draw: st.DrawFn, size: int) -> Range:
    first = draw(st.integers(0, size - 1))
    return first, draw(st.integers(first + 1, size))


@st.composite
def boxes(draw: st.DrawFn, problem: Problem) -> Box:
    q, k = problem.tensors["q"], problem.tensors["k"]
    sizes = Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
    return Box(draw(ranges(sizes.B)), (0, sizes.H), draw(ranges(sizes.L)), draw(ranges(sizes.S)), sizes)


def as_components(arguments: dict[str, Any], lead: tuple[int, ...], sizes: Sizes) -> tuple[Mask | None, Bias | None]:
    """Return mask and bias as components with an alignment."""
    bias = arguments["bias"]
    if callable(bias) and not isinstance(bias, Bias | Tensor):
        bias = FunctionBias(bias)
    elif isinstance(bias, Tensor):
        bias = TensorBias(four_axis_bias(bias, lead, sizes))
    return resolve_alignment(arguments["mask"], bias, sizes)


def run_part(backend: str | None, tensors: tuple[Tensor, ...], origin: tuple[int, ...], **arguments: Any) -> Tensor:
    """Return the output of a part of a problem."""
    names = ("score", "normalizer", "mask", "bias", "softcap", "dropout", "seed", "summary")
    problem = make_problem(*tensors, *[arguments.get(name) for name in names], origin=origin)
    return choose.run(problem, backend)[0]


# The weights of sigmoid depend on one pair each, so that those of a part are weights of the whole.
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_parts_have_the_weights_of_the_whole(data: st.DataObject) -> None:
    problem = data.draw(problems(normalizer="sigmoid", dropout=0.0, summary=None, dtype=torch.float64))
    box = data.draw(boxes(problem))
    arguments = problem.arguments(problem.clean)
    q, k, v = (problem.clean[name] for name in "qkv")
    arguments = {name: arguments.get(name) for name in ("score", "normalizer", "mask", "bias", "softcap")}
    whole = regard.attention(q, k, v, **arguments, summary=Summary(full=True), backend="tiled")[1].full
    mask_, bias = as_components(arguments, q.shape[:-2], box.sizes)
    arguments["mask"] = None if mask_ is None else mask_of_part(mask_, box)
    arguments["bias"] = None if bias is None else bias_of_part(bias, box)
    rows, queries, keys = slice(*box.b), slice(*box.q), slice(*box.k)
    part = (q[rows, :, queries], k[rows, :, keys], v[rows, :, keys])
    full = regard.attention(*part, **arguments, summary=Summary(full=True))[1].full
    torch.testing.assert_close(full, whole[rows, :, queries, keys], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "tiled", "reference", "triton"])
@pytest.mark.parametrize("weigh", [normalizer.Softmax(), normalizer.Sigmoid()], ids=["softmax", "sigmoid"])
def test_dropout_of_parts_is_that_of_the_whole(backend: str, weigh: normalizer.Normalizer) -> None:
    """Forward and backward. Each key is a part of the softmax of one key, whose weight is 1."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 4, n, 8, requires_grad=True) for n in (13, 17, 17))
    arguments = {"normalizer": weigh, "dropout": 0.4, "seed": torch.tensor(2**40 + 7)}
    softmax = isinstance(weigh, normalizer.Softmax)
    box = Box((1, 3), (1, 3), (5, 12), (6, 7) if softmax else (6, 16), Sizes(3, 4, 4, 13, 17))
    cut = [x[1:3, 1:3, slice(*part)] for x, part in ((q, box.q), (k, box.k), (v, box.k))]
    out = run_part(backend, tuple(cut), box.origin, **arguments)
    gradient = torch.autograd.grad(out.square().sum(), v)[0]
    where = keep(Tile(box.b, box.h, box.q, box.k, box.sizes, q.device), arguments["seed"], 0.4)
    weights = torch.ones(2, 2, 7, 1) if softmax else torch.sigmoid(cut[0] @ cut[1].mT / 8**0.5)
    expected = (weights * where / 0.6) @ cut[2]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), v)[0], rtol=1e-4, atol=1e-5)
