"""Scores, and weights, at the ends of the range of floats, on every instruction set of this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.budget import ErrorBudget, assert_within_budget
from torch import Tensor

import regard
from regard import Summary, mask, normalizer


def _qkv(L: int, S: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((2, 4, L, 24), (2, 2, S, 24), (2, 2, S, 16))]


@pytest.mark.parametrize("L", [1, 70])
@pytest.mark.parametrize("sink", [60.0, 80.0, 100.0])
def test_sink_far_above_all_scores(sink: float, L: int, instructions: str) -> None:
    """Weights are precise down to the subnormal range."""
    q, k, v = _qkv(L, 9)
    _check_relative_errors(q, k, v.abs(), normalizer.Softmax(sink=sink), sink)


@pytest.mark.parametrize("level", [-90.0, -700.0, 700.0])
def test_all_weights_where_first_keys_are_masked(level: float, instructions: str) -> None:
    """The exponential of the scores alone, without that of the row's maximum, is 0 or inf."""
    q, k, v = _qkv(70, 300)
    allowed = mask.dense(torch.arange(300) >= torch.arange(70)[:, None] * 47 % 290)
    words: dict[str, Any] = {"bias": torch.full((1, 1), level), "mask": allowed}
    summary = Summary(received=True, rows=(0, 33), full=True)
    exact, baseline = (
        regard.attention(*(x.to(dtype) for x in (q, k, v)), **words, summary=summary, backend="reference")[1]
        for dtype in (torch.float64, torch.float32)
    )
    _, got = regard.attention(q, k, v, **words, summary=summary, backend="cpu")
    for name, x in got.named.items():
        assert_within_budget(name, x, ErrorBudget(exact.named[name], baseline.named[name]))


def _check_relative_errors(q: Tensor, k: Tensor, v: Tensor, of: normalizer.Normalizer, far: float) -> None:
    """Check each element relative to its own size, for scores at distance `far` from the sink or bias."""
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        summary = Summary(top=2, received=True)
        tensors = (x.to(dtype) for x in (q, k, v))
        out, got = regard.attention(*tensors, normalizer=of, summary=summary, backend=backend)
        results.append([x.double() for x in (out, got.top.weights, got.received)])
    finfo = torch.finfo(torch.float32)
    for value, exact in zip(*results, strict=True):
        # The score and its distance are rounded once each, and subnormal results once per summand.
        allowed = 2 * finfo.eps * far * exact + finfo.tiny * finfo.eps * max(q.shape[2], k.shape[2])
        assert bool(((value - exact).abs() <= allowed).all())


@pytest.mark.parametrize("bias", [-60.0, -75.0, -90.0, -110.0])
def test_small_sigmoid_weights(bias: float, instructions: str) -> None:
    """A row of a sigmoid may have small weights only: they are precise down to the subnormal range."""
    q, k, v = _qkv(5, 7)
    _check_relative_errors(q, k, v.abs(), normalizer.Sigmoid(bias), -bias)  # v > 0 avoids cancellation
