"""Helpers for the tests of the native CPU backend."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import HealthCheck
from support.problems import Problem
from torch import Tensor

import regard
from regard.backends.cpu import extension

# The instruction sets of this machine.
SETS = extension.instructions()
# The choices that the native backend supports, for random problems.
NATIVE = {
    "score": ("scaled_dot", "dot", "cosine", "bilinear", "gaussian", "distance", "additive"),
    "normalizer": ("softmax", "softmax", "sigmoid", "sparsemax", "entmax"),
    "dtype": (torch.float32, torch.float32, torch.bfloat16, torch.float16),
    "summary": (None, None, "lse", "all"),
}
# The settings of Hypothesis.
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def why_not(problem: Problem) -> str | None:
    """Return why the native backend does not support a problem, or None."""
    leaves = {name: x.detach() for name, x in problem.tensors.items()}
    return regard.explain(**problem.arguments(leaves)).reasons["cpu"]


# The statistics of each row that need no other argument.
ROWS = ("lse", "max", "entropy")


def requested(
    *names: str, top: int = 0, member: Tensor | None = None, rows: Sequence[int] = (), is_last: bool = False
) -> tuple[int, Tensor | None, list[int], int]:
    """Return the last arguments of the forward operator: those that request statistics."""
    given = {"top_weights": top, "top_keys": top, "mass": member is not None, "rows": rows}
    names = (*names, *[name for name, value in given.items() if value])
    return top, member, list(rows), extension.request(names, is_last)


def packed_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    bias: Tensor | None = None,
    relative: Tensor | None = None,
    sink: Tensor | None = None,
    mask_tensors: Sequence[Tensor] = (),
    mask: Sequence[int] = (),
    scale: float = 1.0,
    softcap: float = 0.0,
    normalizer: int = 0,
    alpha: float = 2.0,
    dropout: float = 0.0,
    seed: int = 0,
    origin: Sequence[int] = (0, 0, 0, 0),
    allow_bf16_dot: bool = True,
) -> tuple[Any, ...]:
    """Return the arguments of the native operators from q to seed, in order.

    Unlike `regard.backends.cpu.pack.pack`, it needs no plan, and also packs combinations and values that no plan has.
    """
    optional = (weight, key_bias, query_bias, bias, relative, sink)
    present_mask = sum(1 << i for i, x in enumerate(optional) if x is not None)
    floats = struct.unpack("4q", struct.pack("4d", scale, softcap, alpha, dropout))
    packed = torch.tensor([normalizer, int(allow_bf16_dot), *floats, *origin, *mask])
    return q, k, v, [*[x for x in optional if x is not None], *mask_tensors], present_mask, packed, seed
