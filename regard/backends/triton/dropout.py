"""Dropout's hash of (seed, batch, head, query, key), as in regard/backends/dropout.py, on the GPU."""

from __future__ import annotations

import triton
import triton.language as tl

_A: tl.constexpr = tl.constexpr(0x7FEB352D)
_B: tl.constexpr = tl.constexpr(0x846CA68B)
_GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B9)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * tl.full([], _A, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], _B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _join(row, part):
    return _mix(row * tl.full([], _GOLDEN, tl.uint32) ^ part.to(tl.uint32))


@triton.jit
def streams(call, b, head, query):
    """The two numbers of each row from which those of its keys are drawn; where nothing is dropped, any two."""
    row = query
    factor = query
    if call.words.seed is not None:
        seed = tl.load(call.words.seed)
        golden = tl.full([], _GOLDEN, tl.uint32)
        row = _mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ golden)
        row = _join(row, (seed >> 32) & 0xFFFFFFFF)
        row = _join(_join(_join(row, b), head), query)
        factor = _mix(row ^ golden) | tl.full([], 1, tl.uint32)
    return row, factor


@triton.jit
def keep(call, row, factor, key):
    """Which weights survive: `row` and `factor` broadcast with `key`."""
    return _mix((key.to(tl.uint32) + row) * factor) >= call.words.dropped.to(tl.uint32)
