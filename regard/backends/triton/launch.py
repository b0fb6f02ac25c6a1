"""Starts the Triton kernels of the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.backends.relative import through_table
from regard.backends.triton import additive_backward_kernels as additive_backward
from regard.backends.triton import tuning
from regard.backends.triton.args import RowSums
from regard.backends.triton.backward_kernels import Kept, Pulled, pull_keys, pull_queries
from regard.backends.triton.bias_grad import Over, Sums, gather, unfold
from regard.backends.triton.call import FEW, Call, constants, level_of, matrix, rows, start, wide
from regard.backends.triton.forward_kernel import Found
from regard.backends.triton.forward_kernel import forward as attend
from regard.backends.triton.weights import receive, write
from regard.components.component import Slot
from regard.components.normalizer import Sigmoid, Softmax
from regard.components.position import TensorBias
from regard.components.score import Additive, Product
from regard.merge import merge
from regard.plan.problem import Plan

LN2 = 0.6931471805599453
# Tiles of keys that a part has, at least.
_LEAST = 2


def forward(plan: Plan, tensors: Sequence[Tensor], last: bool) -> dict[str, Tensor]:
    """The outputs of a problem by name; with `sums` and `exact`, what its backward pass takes, unless it is the `last`."""
    call = Call(plan, tensors, "forward", last)
    summary = plan.summary
    parts = _parts(call) if last else 1
    if parts > 1:
        return _in_parts(call, parts)
    results = {"out": call.per_query(call.E).to(call.v.dtype)}
    results["sums"] = call.empty(2, call.size.B, call.size.H, call.size.L)
    results |= {name: call.per_query() for name in ("lse", "max", "entropy") if getattr(summary, name)}
    if summary.top:
        results["top_weights"] = call.per_query(summary.top)
        results["top_keys"] = torch.empty_like(results["top_weights"], dtype=torch.int64)
    if call.v.dtype != torch.float32 and not last:
        results["exact"] = call.per_query(call.E)
    exact = matrix(results["exact"]) if "exact" in results else None
    found = Found(matrix(results["out"]), exact=exact, sums=_row_sums(call, results["sums"]))
    found = found._replace(**{name: results.get(name) for name in ("lse", "max", "entropy", "top_weights", "top_keys")})
    _attend(call, found, 1)
    return results | _afterwards(call, found.sums)


def _row_sums(call: Call, sums: Tensor) -> RowSums:
    return RowSums(sums[0], sums[1] if call.q.dtype == torch.float32 else None)


def _attend(call: Call, found: Found, parts: int) -> None:
    grid = (call.grid[0], call.size.B * call.size.H // call.repeats, parts)
    start(attend, grid, call.shape, matrix(call.q), matrix(call.k), matrix(call.v), found, call.told())


def _parts(call: Call) -> int:
    """Into how many parts the keys are split, so that few queries fill the GPU, too."""
    summary = call.plan.summary
    if call.size.L > FEW or not isinstance(call.plan.normalizer, Softmax) or set(summary.outputs) - {"lse"}:
        return 1
    there = call.grid[0] * call.size.B * call.size.H // call.repeats
    return min(tuning.programs(call.device) // there, -(-call.grid[1] // _LEAST))


def _in_parts(call: Call, parts: int) -> dict[str, Tensor]:
    """The same, of keys that are split; no backward pass takes their sums."""
    size = call.size
    outs = call.empty(parts, size.B, size.H, size.L, call.E)
    sums = call.empty(parts, size.B, size.H, size.L)
    _attend(call, Found(matrix(outs[0]), lse=sums, part=sums[0].numel()), parts)
    out, lse = merge(list(outs), list(sums))
    return {"out": out.to(call.v.dtype), "lse": lse, "sums": lse.new_empty(0)}


def _afterwards(call: Call, sums: RowSums) -> dict[str, Tensor]:
    """The summaries that are told once the sums of the rows are known."""
    size, summary = call.size, call.plan.summary
    B, H, S = size.B, size.H, size.S
    q, k = matrix(call.q), matrix(call.k)
    results = {}
    if summary.received:
        results["received"] = call.empty(B, H, S)
        start(receive, (call.grid[1], B * H), call.shape, q, k, results["received"], sums, call.told(turned=True))
    wanted: list[tuple[str, Tensor | None, int]] = [("full", None, size.L)] if summary.full else []
    if summary.row_numbers:
        numbers = _numbers(tuple(row % size.L for row in summary.row_numbers), call.device)
        wanted.append(("rows", numbers, len(numbers)))
    for name, places, count in wanted:
        results[name] = call.empty(B, H, count, S)
        grid = (call.grid[1], -(-count // call.shape.queries), B * H)
        start(write, grid, call.shape, q, k, results[name], places, count, sums, call.told())
    if summary.mass is not None:
        # The weight of a group is a weighted sum, too: of values that are 1 for its keys.
        member = call.of(summary.mass).float().mT
        N = member.shape[-1]
        member = member.contiguous().view(-1, 1, S, N).expand(B, size.G, S, N)
        results["mass"] = call.per_query(N)
        found = Found(matrix(results["mass"]))
        told = call.told()
        told = told._replace(
            words=told.words._replace(seed=None), form=constants(call.form._replace(E=N, wide_e=wide(N), top=0))
        )
        start(attend, (call.grid[0], B * H // call.repeats, 1), call.shape, q, k, matrix(member), found, told)
    return results


@lru_cache(64)
def _numbers(rows: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def backward(
    plan: Plan, tensors: Sequence[Tensor], dout: Tensor, out: Tensor, sums: Tensor, dlse: Tensor | None,
    wanted: Sequence[bool],
) -> dict[int, Tensor]:  # fmt: skip
    """The gradients that are wanted, by the place of the tensor, from those of the output and of the log-sum-exp."""
    call = Call(plan, tensors, "backward")
    size, score, normalizer = call.size, plan.score, plan.normalizer
    dout = rows(dout)
    delta = (dout.float() * out.float()).sum(-1)
    kept = Kept(_row_sums(call, sums), delta if dlse is None else delta - dlse)
    found: dict[int, Tensor] = {}
    pulled: dict[str, Any] = dict.fromkeys(Pulled._fields)

    def index(slot: Any) -> int | None:
        return slot.index if isinstance(slot, Slot) and wanted[slot.index] else None

    if isinstance(score, Additive):
        found |= additive_backward.pull(call, dout, kept, wanted)
    else:
        for place, (name, x) in enumerate((("q", call.q), ("k", call.k), ("v", call.v))):
            if wanted[place]:
                found[place] = torch.empty_like(x, memory_format=torch.contiguous_format)
                pulled[name] = matrix(found[place])
    if isinstance(score, Product):
        key_bias, query_bias = index(score.key_bias), index(score.query_bias)
        if key_bias is not None:
            pulled["key_bias"] = found[key_bias] = call.empty(size.B, size.G, size.S)
        if query_bias is not None:
            pulled["query_bias"] = found[query_bias] = call.per_query()
    level = index(level_of(normalizer))
    if level is not None and isinstance(normalizer, Sigmoid):
        pulled["level"] = found[level] = call.per_query()

    arguments = (matrix(call.q), matrix(call.k), matrix(call.v), matrix(dout), Pulled(**pulled), kept)
    if any(pulled[name] is not None for name in ("q", "query_bias", "level")):
        start(pull_queries, (call.grid[0], size.B * size.H), call.shape, *arguments, call.told())
    if any(pulled[name] is not None for name in ("k", "v", "key_bias")):
        start(pull_keys, (call.grid[1], size.B * size.G), call.shape, *arguments, call.told(turned=True))
    if level is not None:
        if not isinstance(normalizer, Sigmoid):
            # A sink has no value: all that it does is to take from the other weights.
            found[level] = -(torch.exp2(call.words.level.view(-1, 1) - sums[0]) * kept.delta)
        found[level] = found[level].sum((0, 2))
    if plan.bias is not None:
        found |= _of_bias(call, dout, kept, wanted)
    return {place: x.sum_to_size(tensors[place].shape).to(tensors[place].dtype) for place, x in found.items()}


def _of_bias(call: Call, dout: Tensor, kept: Kept, wanted: Sequence[bool]) -> dict[int, Tensor]:
    """The gradients of what a bias holds."""
    bias, size = call.plan.bias, call.size
    places = [x.index for x in vars(bias).values() if isinstance(x, Slot) and wanted[x.index]]
    if not places:
        return {}
    call = Call(call.plan, call.tensors, "gather")
    R, C = call.grid
    kinds, own = call.kinds()
    over, batch, heads, grid = Over.DIAGONALS, size.B, 1, (R + C - 1, size.H)
    total = call.empty(size.H, R + C - 1, call.shape.queries, call.shape.keys)
    if isinstance(bias, TensorBias):
        b, h, L, S = call.tensors[places[0]].shape
        if L == size.L and S == size.S:
            over, batch, heads, grid = Over.HEADS, size.B // b, size.H // h, (R * C, b * h)
            total = call.empty(b, h, L, S)
        elif L == size.L:
            over, grid, total = Over.KEYS, (R, size.B * size.H), call.empty(size.B, size.H, L, 1)
        else:
            over, grid, total = Over.QUERIES, (C, size.B * size.H), call.empty(size.B, size.H, 1, size.S)
    matrices = (matrix(call.q), matrix(call.k), matrix(call.v), matrix(dout))
    start(
        gather, grid, call.shape, *matrices, Sums(total, kinds, own, R, C, batch, heads), kept, call.told(), int(over)
    )
    if isinstance(bias, TensorBias):
        return {places[0]: total}
    table = unfold(total, size.S)
    width = size.L + size.S + 63
    table = torch.nn.functional.pad(table, (0, max(width - table.shape[1], 0)))[:, :width]
    return dict(through_table(call.plan, call.tensors, table, places))
