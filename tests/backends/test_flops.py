"""`FlopCounterMode` counts attention on every backend as it counts that of torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import regard
from regard import Summary, mask, position, score
from regard.backends.flops import backward_flops, forward_flops

_B, _H, _G, _L, _S, _D, _E = 2, 4, 2, 31, 47, 8, 5
_PAIRS = _B * _H * _L * _S


def _count(call: Any, backward: bool = False) -> int:
    q, k, v = (
        torch.randn(_B, h, n, width, requires_grad=backward)
        for h, n, width in ((_H, _L, _D), (_G, _S, _D), (_G, _S, _E))
    )
    with FlopCounterMode(display=False) as counter:
        out = call(q, k, v)
        if backward:
            out.sum().backward()
    return int(counter.get_total_flops())


_CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": mask.causal("end")},
    "bias": {"bias": position.ALiBi(align="end")},
    "dropout": {"dropout": 0.1, "seed": 1},
}


@pytest.mark.parametrize("name", _CALLS)
@pytest.mark.parametrize("backend", [None, "tiled", "reference"])
def test_flops_of_forward_and_backward(name: str, backend: str | None) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return regard.attention(q, k, v, backend=backend, **_CALLS[name])

    forward = 2 * _PAIRS * (_D + _E)
    assert _count(call) == forward
    # Reference does not compute the scores again.
    again = 0 if backend == "reference" else 2 * _PAIRS * _D
    assert _count(call, backward=True) == forward + again + 2 * _PAIRS * (2 * _D + 2 * _E)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_flops_of_triton_launches() -> None:
    """They are no operators of torch: one stands in for them while a mode counts."""
    pytest.importorskip("triton")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return regard.attention(q, k, v, backend="triton", mask=mask.causal("end"), bias=position.ALiBi(align="end"))

    forward = 2 * _PAIRS * (_D + _E)
    assert _count(call) == forward
    assert _count(call, backward=True) == forward + 2 * _PAIRS * (3 * _D + 2 * _E)


def test_flops_are_those_of_the_formulas_of_torch() -> None:
    shapes = (_B, _H, _L, _D), (_B, _G, _S, _D), (_B, _G, _S, _E)
    assert forward_flops(*shapes) == sdpa_flop_count(*shapes)
    assert backward_flops(*shapes) == sdpa_backward_flop_count((_B, _H, _L, _E), *shapes)


def test_flops_of_summaries_and_additive_scores_do_not_fail() -> None:
    w = torch.randn(_D)
    assert _count(lambda q, k, v: regard.attention(q, k, v, score=score.Additive(w))) > 0
    assert _count(lambda q, k, v: regard.attention(q, k, v, summary=Summary(entropy=True))[0]) == 2 * _PAIRS * (_D + _E)


def test_flops_of_compiled_graph() -> None:
    compiled = torch.compile(lambda q, k, v: regard.attention(q, k, v, mask=mask.causal("end")), backend="aot_eager")
    assert _count(compiled) == 2 * _PAIRS * (_D + _E)


@pytest.mark.parametrize("first", ["regard", pytest.param("torch.utils.flop_counter", marks=pytest.mark.slow)])
def test_counter_may_be_imported_before_or_after(first: str) -> None:
    code = f"""
import {first}, torch, regard
assert {first!r} != "regard" or "torch.utils.flop_counter" not in __import__("sys").modules
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(1, 2, 10, 4)
with FlopCounterMode(display=False) as counter:
    regard.attention(x, x, x)
assert counter.get_total_flops() == 2 * 2 * 100 * 8, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
