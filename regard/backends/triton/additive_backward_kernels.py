"""The backward kernels of additive scores.

    d/dx tanh(x) = 4 f (1 - f), f = 1 / (1 + e^2x)        dq_d = w_d sum_j ds_j tanh'        dw_d = sum_ij ds tanh

The gradients ds of the scores are written for a chunk of queries at a time: memory linear in length. Each program then
keeps the rows whose gradients it computes in registers, and iterates over the rows of the other side: no sum crosses
threads. Two fractions share one division.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.backends.triton.additive_score import TWO_LOG2E, additive_scores, max_exponents
from regard.backends.triton.backward_kernels import Saved, score_grads
from regard.backends.triton.call import Call, as_matrix, launch_kernel
from regard.backends.triton.dropout import dropout_streams
from regard.backends.triton.mask import EMPTY
from regard.backends.triton.score import load_rows, matmul, nth_tile, reciprocal, tanh, tile_range


class QueryChunk(NamedTuple):
    """The gradients of the scores and the weights of a chunk of queries."""

    ds: Any  # (B, H, rows, S)
    ds_transposed: Any  # (B, H, S, rows)
    p_dropped: Any  # (B, H, rows, S): the weights after dropout
    tile_kinds: Any  # of all tiles (B|1, R, C), from `classify_tiles`; None without a mask
    batch_stride: Any  # 1 if each batch row has tile kinds of its own, else 0
    first_tile: Any
    rows: Any


class Side(NamedTuple):
    """x = queries or keys (B, heads, rows, D), e^2x, and the largest exponent of each tile (B, heads, tiles)."""

    exp: Any
    x: Any
    max_exponent: Any
    heads: Any
    rows: Any
    tiles: Any


@triton.jit
def score_grad_kernel(v, dout, chunk, saved, args):
    """Write the gradients of the scores of a chunk."""
    tile_k = tl.program_id(0)
    tile_in_chunk = tl.program_id(1)
    tile_q = chunk.first_tile + tile_in_chunk
    b = tl.program_id(2) // args.sizes.H
    head = tl.program_id(2) % args.sizes.H
    g = head // (args.sizes.H // args.sizes.G)
    is_visited = tile_q * args.config.queries < args.sizes.L
    if chunk.tile_kinds is not None:
        tile_row = b * chunk.batch_stride * tl.cdiv(args.sizes.L, args.config.queries) + tile_q
        kind_at = tile_row * tl.num_programs(0) + tile_k
        is_visited = is_visited & (tl.load(chunk.tile_kinds + kind_at, mask=is_visited, other=EMPTY) < EMPTY)
    if is_visited:
        query = tile_q * args.config.queries + tl.arange(0, args.config.queries)
        key = tile_k * args.config.keys + tl.arange(0, args.config.keys)
        dout_tile = load_rows(dout, b, head + 0 * query, query, args.sizes.L, args.config.E, args.config.E_padded, True)
        v_tile = load_rows(v, b, g + 0 * key, key, args.sizes.S, args.config.E, args.config.E_padded, True)
        stream, factor = dropout_streams(args, b, head, query[:, None])
        raw = additive_scores(args, b, head, query, key)
        dp = matmul(dout_tile, tl.trans(v_tile), args)
        p_dropped, _, ds = score_grads(
            raw, dp, saved, args, b, g, head, query[:, None], key[None, :], stream, factor, True, True
        )
        row = (tile_in_chunk * args.config.queries + tl.arange(0, args.config.queries))[:, None]
        column = key[None, :]
        inside = (query < args.sizes.L)[:, None] & (column < args.sizes.S)
        base = tl.program_id(2).to(tl.int64) * chunk.rows * args.sizes.S
        at = base + row.to(tl.int64) * args.sizes.S + column
        tl.store(chunk.ds + at, ds, mask=inside)
        tl.store(chunk.p_dropped + at, p_dropped.to(chunk.p_dropped.dtype.element_ty), mask=inside)
        tl.store(chunk.ds_transposed + base + column.to(tl.int64) * chunk.rows + row, ds, mask=inside)


@triton.jit
def additive_grad_kernel(own, other, ds, dx, dweight, chunk, args, is_keys: tl.constexpr):
    """Add to the gradients of rows of queries of one head, or of keys over the heads that share them.

    Args:
        own: the side whose gradients are computed.
        other: the side that is summed over.
        ds: the gradients of the scores of the chunk, with the rows of `own` innermost.
        dx: the gradients of `own`.
        dweight: the sums of ds tanh (B, H, tiles, D); None where they are not needed.
        is_keys: whether `own` is the keys.
    """
    own_tile_size: tl.constexpr = args.config.keys if is_keys else args.config.queries
    other_tile_size: tl.constexpr = args.config.queries if is_keys else args.config.keys
    tile = tl.program_id(0)
    if not is_keys:
        tile += chunk.first_tile
    b = tl.program_id(1) // own.heads
    h = tl.program_id(1) % own.heads
    row = tile * own_tile_size + tl.arange(0, own_tile_size)
    column = tl.arange(0, args.config.D_padded)
    at = ((b * own.heads + h).to(tl.int64) * own.rows + row[:, None]) * args.config.D + column[None, :]
    inside = (row < own.rows)[:, None] & (column < args.config.D)[None, :]
    own_exp = tl.load(own.exp + at, mask=inside, other=0.0)
    own_x = tl.load(own.x + at, mask=inside, other=0.0)
    own_max_exponent = tl.load(own.max_exponent + (b * own.heads + h) * own.tiles + tile)
    total = tl.zeros([own_tile_size, args.config.D_padded], tl.float32)
    start, _, end = tile_range(args, b, tile, other_tile_size, is_keys)
    repeats = args.sizes.H // own.heads
    chunk_tiles = chunk.rows // args.config.queries
    for r in range(repeats):
        head = h * repeats + r
        other_head = head // (args.sizes.H // other.heads)
        weight = tl.load(
            args.score.additive.weight + head * args.score.additive.head_stride * args.config.D + column,
            mask=column < args.config.D,
            other=0.0,
        )
        # sum_j ds_j tanh' / 4 and sum_j ds_j tanh / 2
        grad_sum = tl.zeros([own_tile_size, args.config.D_padded], tl.float32)
        tanh_sum = tl.zeros([own_tile_size, args.config.D_padded], tl.float32)
        ds_head = (b * args.sizes.H + head).to(tl.int64) * chunk.rows * args.sizes.S
        for n in range(end):
            other_tile = nth_tile(args, start, n)
            if is_keys:
                is_visited = (other_tile >= chunk.first_tile) & (other_tile < chunk.first_tile + chunk_tiles)
                first = other_tile * other_tile_size - chunk.first_tile * args.config.queries
                stride = own.rows
                ds_column = row
                length = args.sizes.L
            else:
                is_visited = True
                first = other_tile * other_tile_size
                stride = chunk.rows
                ds_column = row - chunk.first_tile * args.config.queries
                length = args.sizes.S
            if is_visited:
                other_row = b * other.heads + other_head
                max_exponent = own_max_exponent + tl.load(other.max_exponent + other_row * other.tiles + other_tile)
                base = other_row.to(tl.int64) * other.rows
                for m in range(0, other_tile_size, 2):
                    i = other_tile * other_tile_size + m
                    j = i + 1
                    ds_at = ds + ds_head + (first + m).to(tl.int64) * stride + ds_column
                    ds_i = tl.load(ds_at, mask=(row < own.rows) & (i + 0 * row < length), other=0.0)[:, None]
                    ds_j = tl.load(ds_at + stride, mask=(row < own.rows) & (j + 0 * row < length), other=0.0)[:, None]
                    x_at = (base + i) * args.config.D + column
                    mask_i = (column < args.config.D) & (i + 0 * column < length)
                    mask_j = (column < args.config.D) & (j + 0 * column < length)
                    if max_exponent == float("inf"):
                        x_i = tl.load(other.x + x_at, mask=mask_i, other=0.0)[None, :]
                        x_j = tl.load(other.x + x_at + args.config.D, mask=mask_j, other=0.0)[None, :]
                        tanh_i, grad_i = tanh(own_x + x_i, args)
                        tanh_j, grad_j = tanh(own_x + x_j, args)
                        grad_sum += 0.25 * (ds_i * grad_i + ds_j * grad_j)
                        tanh_sum += 0.5 * (ds_i * tanh_i + ds_j * tanh_j)
                    else:
                        t = 1.0 + own_exp * tl.load(other.exp + x_at, mask=mask_i, other=0.0)[None, :]
                        u = 1.0 + own_exp * tl.load(other.exp + x_at + args.config.D, mask=mask_j, other=0.0)[None, :]
                        if max_exponent < 60.0:
                            inverse = reciprocal(t * u, args)
                            f_i = inverse * u
                            f_j = inverse * t
                        else:
                            f_i = 1.0 / t
                            f_j = 1.0 / u
                        grad_sum += ds_i * (f_i - f_i * f_i) + ds_j * (f_j - f_j * f_j)
                        tanh_sum += ds_i * (0.5 - f_i) + ds_j * (0.5 - f_j)
        total += grad_sum * (4.0 * weight)[None, :]
        if dweight is not None:
            weight_at = ((b * args.sizes.H + head).to(tl.int64) * own.tiles + tile) * args.config.D + column
            tl.store(dweight + weight_at, tl.sum(tanh_sum, 0) * 2.0, mask=column < args.config.D)
    tl.store(dx + at, tl.load(dx + at, mask=inside, other=0.0) + total, mask=inside)


# Elements per chunk of ds: enough rows to fill a GPU, in about the memory of a few tensors.
_CHUNK_ELEMENTS = 1 << 25


def backward(call: Call, dout: Tensor, saved: Saved, needs_grad: Sequence[bool]) -> dict[int, Tensor]:
    """Return the gradients of q, k, v and the weights of an additive score, by the index of the tensor."""
    size, config, tensors = call.size, call.launch_config, call.tensors
    B, H, G, S = size.B, size.H, size.G, size.S
    weight_index = call.plan.score.v.index  # type: ignore[attr-defined]
    tiles_q, tiles_k = call.grid
    chunk_tiles = min(max(_CHUNK_ELEMENTS // (B * H * S * config.queries), 1), tiles_q)
    rows = chunk_tiles * config.queries
    ds = call.empty(2, B, H, rows * S)
    p_dropped = call.v.new_empty((B, G, H // G, rows, S))
    tile_kinds, batch_stride = call.tile_kinds()
    sides = []
    for tensor, heads, tile_size, tiles in ((call.q, H, config.queries, tiles_q), (call.k, G, config.keys, tiles_k)):
        x = tensor.float().contiguous()
        padded = torch.nn.functional.pad(x.mT, (0, -tensor.shape[2] % tile_size))
        max_exponent = max_exponents(padded, tile_size)
        sides.append(Side(torch.exp2(x * TWO_LOG2E), x, max_exponent, heads, tensor.shape[2], tiles))
    queries, keys = sides
    dq, dk = (torch.zeros_like(side.x) for side in sides)
    dv = dq.new_zeros(B, G, S, call.E)
    dweight = dq.new_zeros(B, H, tiles_q, call.D) if needs_grad[weight_index] else None
    row_args, column_args = call.kernel_args(), call.kernel_args(transposed=True)
    for first in range(0, tiles_q, chunk_tiles):
        chunk = QueryChunk(ds[0], ds[1], p_dropped, tile_kinds, batch_stride, first, rows)
        p_dropped.zero_()  # empty tiles are not visited
        grid: tuple[int, ...] = (tiles_k, chunk_tiles, B * H)
        launch_kernel(score_grad_kernel, grid, config, as_matrix(call.v), as_matrix(dout), chunk, saved, row_args)
        if needs_grad[0] or dweight is not None:
            grid = (min(chunk_tiles, tiles_q - first), B * H)
            launch_kernel(additive_grad_kernel, grid, config, queries, keys, ds[1], dq, dweight, chunk, row_args, False)
        if needs_grad[1]:
            grid = (tiles_k, B * G)
            launch_kernel(additive_grad_kernel, grid, config, keys, queries, ds[0], dk, None, chunk, column_args, True)
        if needs_grad[2]:
            part = dout[:, :, first * config.queries : first * config.queries + rows].unflatten(1, (G, -1))
            dv += torch.einsum("bgrls,bgrle->bgse", p_dropped[:, :, :, : part.shape[3]].float(), part.float())
    grads = {index: x for index, x in enumerate((dq, dk, dv)) if needs_grad[index]}
    if dweight is not None:
        grads[weight_index] = dweight.sum((0, 2)) if tensors[weight_index].dim() == 2 else dweight.sum((0, 1, 2))
    return grads
