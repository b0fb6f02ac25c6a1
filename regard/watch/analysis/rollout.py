"""Attention through all layers: how much each input token contributes to a token of the last layer.

Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020), equations 1 and 2, and section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.watch.recording.record import Record

# scipy takes integer capacities: a capacity of 1 is this integer.
_CAPACITY_UNIT = 10_000_000


class Rollout(NamedTuple):
    """The result of `rollout`.

    shares: of each input token in each selected token (B, N, S). unknown: share of the weights that were not recorded
    (B, N).
    """

    shares: Tensor
    unknown: Tensor


def rollout(records: Sequence[Record], tokens: Sequence[int] | None = None, residual: float = 0.5) -> Rollout:
    """Compute attention rollout: the product of the layers' mean weights, each with its residual connection.

        A_l = residual I + (1 - residual) mean over heads of P_l;   shares = A_n ... A_1, the rows of `tokens`

    Memory is N x S per sequence. Weights that are not in `top` are left out, and their share is returned as `unknown`.

    Args:
        records: the self-attention of one stack of layers, from the first to the last, over the same sequences.
        tokens: N tokens of the last layer; negative indices count from the end of each sequence. All by default. Shares
            are 0 for a token that a shorter sequence does not have.
        residual: the share of the residual connection.

    >>> model = nn.MultiheadAttention(16, 4, batch_first=True)
    >>> with regard.watch(model, top=3) as recording:
    ...     _, weights = model(x := torch.randn(1, 3, 16), x, x)
    >>> result = rollout(recording, [-1])
    >>> bool(torch.allclose(result.shares[:, 0], 0.5 * torch.eye(3)[-1] + 0.5 * weights[:, -1]))
    True
    """
    size, batch = _stack(records)
    selected = _select_tokens(tokens, records, size)
    first = records[0].top.weights
    rows = torch.zeros(batch, selected.shape[1], size, dtype=first.dtype, device=first.device)
    rows.scatter_(2, selected.clamp(min=0)[..., None], (selected >= 0)[..., None].to(rows))
    unknown = rows.new_zeros(selected.shape)
    for record in reversed(records):
        below = residual * rows
        for head in range(record.heads):
            weights, keys = record.top.weights[:, head], record.top.keys[:, head]
            part = (1 - residual) / record.heads
            for n in range(keys.shape[-1]):  # one listed key at a time, in the memory of the rows
                moved = part * rows * (weights[..., n] * (keys[..., n] >= 0))[:, None]
                below.scatter_add_(2, keys[:, None, :, n].clamp(min=0).expand_as(moved), moved)
        missing = (1 - residual) * record.missing.mean(1)  # (B, L)
        unknown += (rows * missing[:, None]).sum(-1)
        rows = below
    return Rollout(rows, unknown)


def flow(records: Sequence[Record], tokens: Sequence[int] | None = None, residual: float = 0.5) -> Tensor:
    """Compute attention flow (B, N, S): the maximum flow from each input token to selected tokens of the last layer.

    The capacities are the mean weights of the layers with their residual connections, A_l of `rollout`. Weights that
    are not in `top` have capacity 0, so each flow is a lower bound. One maximum flow is solved per pair of tokens,
    which takes seconds for a sentence. Requires scipy.

    The arguments are those of `rollout`. With one layer, the flow is the rollout:

    >>> model = nn.MultiheadAttention(16, 4, batch_first=True)
    >>> with regard.watch(model, top=3) as recording:
    ...     _ = model(x := torch.randn(1, 3, 16), x, x)
    >>> bool(torch.allclose(flow(recording), rollout(recording).shares, atol=1e-6))
    True
    """
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import maximum_flow
    except ImportError as error:
        raise ImportError("attention flow requires scipy: pip install 'regard[watch]'") from error
    size, batch = _stack(records)
    selected = _select_tokens(tokens, records, size)
    result = torch.zeros(batch, selected.shape[1], size)
    for b in range(batch):
        capacity, top = _graph(coo_array, records, b, residual, size), len(records) * size
        for n, token in enumerate(selected[b].tolist()):
            for j in range(size if token >= 0 else 0):
                result[b, n, j] = maximum_flow(capacity, top + token, j).flow_value / _CAPACITY_UNIT
    return result


def _graph(coo_array: Any, records: Sequence[Record], b: int, residual: float, size: int) -> Any:
    """Return the capacities from queries to keys as a sparse matrix: node l * size + i is token i after l layers."""
    sources, targets, parts = [], [], []
    positions = torch.arange(size)
    for layer, record in enumerate(records):
        weights, keys = record.top.weights[b].cpu().double(), record.top.keys[b].cpu()
        listed = keys >= 0
        queries = positions[:, None].expand(keys.shape)
        sources += [(layer + 1) * size + queries[listed], (layer + 1) * size + positions]
        targets += [layer * size + keys[listed], layer * size + positions]
        parts += [(1 - residual) / record.heads * weights[listed], torch.full((size,), residual, dtype=torch.float64)]
    nodes = (len(records) + 1) * size
    shares = coo_array(
        (torch.cat(parts).numpy(), (torch.cat(sources).numpy(), torch.cat(targets).numpy())), (nodes, nodes)
    )
    capacity = shares.tocsr()  # sums duplicate entries
    capacity.data = (capacity.data * _CAPACITY_UNIT).round().astype("int32")
    return capacity


def _stack(records: Sequence[Record]) -> tuple[int, int]:
    """Check that records are one stack of self-attention layers, and return their length and batch size."""
    if not records:
        raise ValueError("records is empty; expected the self-attention of one stack of layers")
    size, batch = records[0].keys, records[0].max.shape[0]
    for record in records:
        if (
            record.kind == "cross"
            or record.queries != record.keys
            or (record.keys, record.max.shape[0]) != (size, batch)
        ):
            raise ValueError(
                f"records: {record.name!r} is {record.kind} attention of {record.queries} queries to {record.keys} keys; "
                f"expected self-attention of {size} tokens to themselves in each layer: select one stack "
                "(and use `joined()` for generated text)"
            )
    return size, batch


def _select_tokens(tokens: Sequence[int] | None, records: Sequence[Record], size: int) -> Tensor:
    """Return the positions of the tokens in each sequence (B, N); -1 where the sequence is too short."""
    tokens = range(size) if tokens is None else tokens
    for token in tokens:
        if not isinstance(token, int) or not -size <= token < size:
            raise ValueError(f"tokens: {token!r}; expected indices of tokens, from {-size} to {size - 1}")
    ends = torch.stack([record.lengths for record in records]).amax(0)[:, None]
    positions = torch.tensor(list(tokens), dtype=torch.int64, device=ends.device)
    positions = torch.where(positions < 0, positions + ends, positions)
    return positions.masked_fill((positions < 0) | (positions >= ends), -1)
