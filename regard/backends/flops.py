"""Floating-point operations of the fused operators, as `torch.utils.flop_counter.FlopCounterMode` counts those of torch.

As for torch's fused attention, all pairs of queries and keys count, masked ones too: 2 (D + E) per pair forward, for the
products of queries with keys and of weights with values, and 2 (3 D + 2 E) backward, where the scores are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regard.backends.cpu import extension
from regard.on_import import on_import

Shape = Sequence[int]


def forward_flops(q: Shape, k: Shape, v: Shape) -> int:
    """Return the operations of the forward pass for shapes (..., H, L, D), (..., G, S, D), (..., G, S, E)."""
    return 2 * (q[-1] + v[-1]) * _pairs(q, k)


def backward_flops(q: Shape, k: Shape, v: Shape) -> int:
    """Return the operations of the backward pass."""
    return 2 * (3 * q[-1] + 2 * v[-1]) * _pairs(q, k)


def _pairs(q: Shape, k: Shape) -> int:
    pairs = k[-2]
    for n in q[:-1]:
        pairs *= n
    return pairs


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    regard, native = torch.ops.regard, torch.ops.regard_native
    formulas: dict[Any, Any] = {
        regard.forward: lambda tensors, *_, **__: forward_flops(*tensors[:3]),
        regard.backward: lambda gradients, tensors, *_, **__: backward_flops(*tensors[:3]),
    }
    if not extension.missing:
        formulas[native.plain] = lambda q, k, v, *_, **__: forward_flops(q, k, v)
        formulas[native.forward] = lambda q, k, v, *_, **__: forward_flops(q, k, v)
        formulas[native.backward] = lambda out, dout, stats, dlse, q, k, v, *_, **__: backward_flops(q, k, v)
    for operator, formula in formulas.items():
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)


def register_flops() -> None:
    """Register the counts as soon as the counter is imported."""
    on_import("torch.utils.flop_counter", _register)
