"""Dropout's hash of (seed, batch, head, query, key) on the GPU, the same as in regard/backends/dropout.py."""

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
def _combine(hashed, part):
    return _mix(hashed * tl.full([], _GOLDEN, tl.uint32) ^ part.to(tl.uint32))


@triton.jit
def dropout_streams(args, b, head, query):
    """The two hashes per row that `keep_mask` needs. Without dropout, they are unused."""
    stream = query
    factor = query
    if args.score.seed is not None:
        seed = tl.load(args.score.seed)
        golden = tl.full([], _GOLDEN, tl.uint32)
        stream = _mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ golden)
        stream = _combine(stream, (seed >> 32) & 0xFFFFFFFF)
        score = args.score
        stream = _combine(_combine(stream, b + score.first_batch), head + score.first_head)
        stream = _combine(stream, query + score.first_query)
        factor = _mix(stream ^ golden) | tl.full([], 1, tl.uint32)
    return stream, factor


@triton.jit
def keep_mask(args, stream, factor, key):
    """Which weights are kept. `stream` and `factor` broadcast with `key`."""
    return _mix(((key + args.score.first_key).to(tl.uint32) + stream) * factor) >= args.score.dropout_threshold.to(
        tl.uint32
    )
