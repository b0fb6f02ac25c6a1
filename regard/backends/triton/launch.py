"""Host side of the forward and backward passes: allocate the results, and launch the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.backends.relative import through_table
from regard.backends.triton import additive_backward_kernels as additive_backward
from regard.backends.triton import tuning
from regard.backends.triton.args import RowSums
from regard.backends.triton.backward_kernels import Grads, Saved, bwd_dkv_kernel, bwd_dq_kernel
from regard.backends.triton.bias_grad import (
    OVER_DIAGONAL,
    OVER_HEADS,
    OVER_KEYS,
    OVER_QUERIES,
    BiasGrad,
    bias_grad_kernel,
    sum_by_distance,
)
from regard.backends.triton.call import (
    FEW_QUERIES,
    Call,
    as_constexpr,
    as_matrix,
    contiguous_rows,
    launch_kernel,
    padded_width,
    sink_or_bias,
)
from regard.backends.triton.forward_kernel import Outputs, fwd_kernel
from regard.backends.triton.weights import received_kernel, weights_kernel
from regard.components.component import Slot
from regard.components.normalizer import Sigmoid, Softmax
from regard.components.position import TensorBias
from regard.components.score import Additive, Product
from regard.merge import merge
from regard.plan.cache import derived
from regard.plan.problem import Plan

_MIN_TILES_PER_SPLIT = 2


def forward(plan: Plan, tensors: Sequence[Tensor], is_last: bool) -> dict[str, Tensor]:
    """Return the outputs of a problem by name, and the tensors saved for the backward pass.

    These are "row_sums", and "out_fp32" where the output is not float32 and the pass is not the last.
    """
    call = Call(plan, tensors, "forward", is_last)
    summary = plan.summary
    num_splits = _num_splits(call) if is_last else 1
    if num_splits > 1:
        return _forward_split(call, num_splits)
    results = {"out": call.empty_per_query(call.E).to(call.v.dtype)}
    results["row_sums"] = call.empty(2, call.size.B, call.size.H, call.size.L)
    results |= {name: call.empty_per_query() for name in ("lse", "max", "entropy") if getattr(summary, name)}
    if summary.top:
        results["top_weights"] = call.empty_per_query(summary.top)
        results["top_keys"] = torch.empty_like(results["top_weights"], dtype=torch.int64)
    if call.v.dtype != torch.float32 and not is_last:
        results["out_fp32"] = call.empty_per_query(call.E)
    out_fp32 = as_matrix(results["out_fp32"]) if "out_fp32" in results else None
    outputs = Outputs(as_matrix(results["out"]), out_fp32=out_fp32, row_sums=_row_sums(call, results["row_sums"]))
    names = ("lse", "max", "entropy", "top_weights", "top_keys")
    outputs = outputs._replace(**{name: results.get(name) for name in names})
    _launch_forward(call, outputs, 1)
    return results | _second_pass(call, outputs.row_sums)


def _row_sums(call: Call, saved: Tensor) -> RowSums:
    return RowSums(saved[0], saved[1] if call.q.dtype == torch.float32 else None)


def _launch_forward(call: Call, outputs: Outputs, num_splits: int) -> None:
    grid = (call.grid[0], call.size.B * call.size.H // call.heads_per_tile, num_splits)
    q, k, v = as_matrix(call.q), as_matrix(call.k), as_matrix(call.v)
    launch_kernel(fwd_kernel, grid, call.launch_config, q, k, v, outputs, call.kernel_args())


def _num_splits(call: Call) -> int:
    """Return the number of splits of the keys (split-K), with which few queries fill the GPU, too."""
    summary = call.plan.summary
    if call.size.L > FEW_QUERIES or not isinstance(call.plan.normalizer, Softmax) or set(summary.outputs) - {"lse"}:
        return 1
    programs = call.grid[0] * call.size.B * call.size.H // call.heads_per_tile
    return min(tuning.max_programs(call.device) // programs, -(-call.grid[1] // _MIN_TILES_PER_SPLIT))


def _forward_split(call: Call, num_splits: int) -> dict[str, Tensor]:
    """Attend to each split of the keys, and merge the results. There is no backward pass, and no row sums are saved."""
    size = call.size
    outs = call.empty(num_splits, size.B, size.H, size.L, call.E)
    lses = call.empty(num_splits, size.B, size.H, size.L)
    _launch_forward(call, Outputs(as_matrix(outs[0]), lse=lses, split_stride=lses[0].numel()), num_splits)
    out, lse = merge(list(outs), list(lses))
    return {"out": out.to(call.v.dtype), "lse": lse, "row_sums": lse.new_empty(0)}


def _second_pass(call: Call, row_sums: RowSums) -> dict[str, Tensor]:
    """Compute the summaries that need the row sums first."""
    size, summary, config = call.size, call.plan.summary, call.launch_config
    B, H, S = size.B, size.H, size.S
    q, k = as_matrix(call.q), as_matrix(call.k)
    results = {}
    if summary.received:
        received = results["received"] = call.empty(B, H, S)
        args = call.kernel_args(transposed=True)
        launch_kernel(received_kernel, (call.grid[1], B * H), config, q, k, received, row_sums, args)
    requests: list[tuple[str, Tensor | None, int]] = [("full", None, size.L)] if summary.full else []
    if summary.row_numbers:
        indices = _as_indices(tuple(row % size.L for row in summary.row_numbers), call.device)
        requests.append(("rows", indices, len(indices)))
    for name, query_indices, count in requests:
        out = results[name] = call.empty(B, H, count, S)
        grid = (call.grid[1], -(-count // config.queries), B * H)
        launch_kernel(weights_kernel, grid, config, q, k, out, query_indices, count, row_sums, call.kernel_args())
    if summary.mass is not None:
        # The weight of a group is an attention output whose values are 1 for the keys of the group, without dropout.
        member = call.value_of(summary.mass).float().mT
        N = member.shape[-1]
        member = member.contiguous().view(-1, 1, S, N).expand(B, size.G, S, N)
        results["mass"] = call.empty_per_query(N)
        args = call.kernel_args()
        args = args._replace(
            score=args.score._replace(seed=None),
            config=as_constexpr(call.config._replace(E=N, E_padded=padded_width(N), top=0)),
        )
        grid = (call.grid[0], B * H // call.heads_per_tile, 1)
        outputs = Outputs(as_matrix(results["mass"]))
        launch_kernel(fwd_kernel, grid, config, q, k, as_matrix(member), outputs, args)
    return results


@derived
def _as_indices(rows: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def backward(
    plan: Plan, tensors: Sequence[Tensor], dout: Tensor, out: Tensor, saved_sums: Tensor, dlse: Tensor | None,
    needs_grad: Sequence[bool],
) -> dict[int, Tensor]:  # fmt: skip
    """Return the needed gradients, by the index of the tensor, from those of the output and the log-sum-exp."""
    call = Call(plan, tensors, "backward")
    size, score, normalizer, config = call.size, plan.score, plan.normalizer, call.launch_config
    dout = contiguous_rows(dout)
    delta = (dout.float() * out.float()).sum(-1)
    saved = Saved(_row_sums(call, saved_sums), delta if dlse is None else delta - dlse)
    grads: dict[int, Tensor] = {}
    destinations: dict[str, Any] = dict.fromkeys(Grads._fields)

    def needed_index(field: Any) -> int | None:
        return field.index if isinstance(field, Slot) and needs_grad[field.index] else None

    if isinstance(score, Additive):
        grads |= additive_backward.backward(call, dout, saved, needs_grad)
    else:
        for index, (name, x) in enumerate((("q", call.q), ("k", call.k), ("v", call.v))):
            if needs_grad[index]:
                grads[index] = torch.empty_like(x, memory_format=torch.contiguous_format)
                destinations[name] = as_matrix(grads[index])
    if isinstance(score, Product):
        key_bias, query_bias = needed_index(score.key_bias), needed_index(score.query_bias)
        if key_bias is not None:
            destinations["key_bias"] = grads[key_bias] = call.empty(size.B, size.G, size.S)
        if query_bias is not None:
            destinations["query_bias"] = grads[query_bias] = call.empty_per_query()
    term = needed_index(sink_or_bias(normalizer))
    if term is not None and isinstance(normalizer, Sigmoid):
        destinations["sigmoid_bias"] = grads[term] = call.empty_per_query()

    q, k, v = as_matrix(call.q), as_matrix(call.k), as_matrix(call.v)
    arguments = (q, k, v, as_matrix(dout), Grads(**destinations), saved)
    if any(destinations[name] is not None for name in ("q", "query_bias", "sigmoid_bias")):
        launch_kernel(bwd_dq_kernel, (call.grid[0], size.B * size.H), config, *arguments, call.kernel_args())
    if any(destinations[name] is not None for name in ("k", "v", "key_bias")):
        args = call.kernel_args(transposed=True)
        launch_kernel(bwd_dkv_kernel, (call.grid[1], size.B * size.G), config, *arguments, args)
    if term is not None:
        if not isinstance(normalizer, Sigmoid):
            # A sink has no value, so its dp is 0 and ds = -p delta.
            p_sink = torch.exp2(call.score_args.sink_or_bias.view(-1, 1) - saved_sums[0])
            grads[term] = -(p_sink * saved.delta)
        grads[term] = grads[term].sum((0, 2))
    if plan.bias is not None:
        grads |= _bias_grads(call, dout, saved, needs_grad)
    return {index: x.sum_to_size(tensors[index].shape).to(tensors[index].dtype) for index, x in grads.items()}


def _bias_grads(call: Call, dout: Tensor, saved: Saved, needs_grad: Sequence[bool]) -> dict[int, Tensor]:
    """Return the gradients of the tensors of a bias."""
    bias, size = call.plan.bias, call.size
    indices = [x.index for x in vars(bias).values() if isinstance(x, Slot) and needs_grad[x.index]]
    if not indices:
        return {}
    call = Call(call.plan, call.tensors, "bias_grad")
    R, C = call.grid
    tile_kinds, batch_stride = call.tile_kinds()
    config = call.launch_config
    over, batch, heads, grid = OVER_DIAGONAL, size.B, 1, (R + C - 1, size.H)
    total = call.empty(size.H, R + C - 1, config.queries, config.keys)
    if isinstance(bias, TensorBias):
        b, h, L, S = call.tensors[indices[0]].shape
        if L == size.L and S == size.S:
            over, batch, heads, grid = OVER_HEADS, size.B // b, size.H // h, (R * C, b * h)
            total = call.empty(b, h, L, S)
        elif L == size.L:
            over, grid, total = OVER_KEYS, (R, size.B * size.H), call.empty(size.B, size.H, L, 1)
        else:
            over, grid, total = OVER_QUERIES, (C, size.B * size.H), call.empty(size.B, size.H, 1, size.S)
    matrices = (as_matrix(call.q), as_matrix(call.k), as_matrix(call.v), as_matrix(dout))
    destination = BiasGrad(total, tile_kinds, batch_stride, R, C, batch, heads)
    launch_kernel(bias_grad_kernel, grid, config, *matrices, destination, saved, call.kernel_args(), over.value)
    if isinstance(bias, TensorBias):
        return {indices[0]: total}
    table = sum_by_distance(total, size.S)
    width = size.L + size.S + 63
    table = torch.nn.functional.pad(table, (0, max(width - table.shape[1], 0)))[:, :width]
    return dict(through_table(call.plan, call.tensors, table, indices))
