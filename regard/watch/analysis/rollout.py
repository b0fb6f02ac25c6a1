"""From layer to layer: how much of each input token reaches a token of the last layer.

Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020), equations 1 and 2, and section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.watch.recording.record import Record

# Capacities are whole numbers to scipy; a share is known to so many parts.
_PARTS = 10_000_000


class Rollout(NamedTuple):
    """Where chosen tokens come from. `shares` (B, N, S): of each input token; `unknown` (B, N): what the lists leave out."""

    shares: Tensor
    unknown: Tensor


def rollout(records: Sequence[Record], tokens: Sequence[int] | None = None, residual: float = 0.5) -> Rollout:
    """Attention rollout: the product of the layers' mean weights, each with its residual connection.

        A_l = residual I + (1 - residual) mean over heads of P_l;   shares = A_n ... A_1, the rows of `tokens`

    Memory is that of the rows asked for: weights that `top` leaves out stay out, and their part is told as unknown.

    Args:
        records: the self-attention of one stack of layers, from the first to the last, over one text.
        tokens: which tokens of the last layer (negative numbers count from the end, which is each text's own); all by
            default. What a text is too short to have gives 0.
        residual: the part of a token that goes by the residual connection.

    >>> rollout(seen, [-1]).shares[0, 0]  # what the last token is made of
    """
    size, batch = _stack(records)
    chosen = _tokens(tokens, records, size)
    first = records[0].top.weights
    rows = torch.zeros(batch, chosen.shape[1], size, dtype=first.dtype, device=first.device)
    rows.scatter_(2, chosen.clamp(min=0)[..., None], (chosen >= 0)[..., None].to(rows))
    unknown = rows.new_zeros(chosen.shape)
    for record in reversed(records):
        below = residual * rows
        for head in range(record.heads):
            weights, keys = record.top.weights[:, head], record.top.keys[:, head]
            part = (1 - residual) / record.heads
            for n in range(keys.shape[-1]):  # one listed key at a time: memory stays that of the rows
                moved = part * rows * (weights[..., n] * (keys[..., n] >= 0))[:, None]
                below.scatter_add_(2, keys[:, None, :, n].clamp(min=0).expand_as(moved), moved)
        lost = (1 - residual) * record.missing.mean(1)  # (B, L)
        unknown += (rows * lost[:, None]).sum(-1)
        rows = below
    return Rollout(rows, unknown)


def flow(records: Sequence[Record], tokens: Sequence[int] | None = None, residual: float = 0.5) -> Tensor:
    """Attention flow (B, N, S): the largest flow from each input token to a token of the last layer, where the weights of
    the layers, with their residual connections, are the capacities.

    Of what `top` leaves out nothing flows, so that each is a lower bound. It takes a maximum flow for each pair: seconds
    for a sentence. Needs scipy.

    Args: as of `rollout`.
    """
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import maximum_flow
    except ImportError as error:
        raise ImportError("attention flow needs scipy: pip install 'regard[watch]'") from error
    size, batch = _stack(records)
    chosen = _tokens(tokens, records, size)
    result = torch.zeros(batch, chosen.shape[1], size)
    for b in range(batch):
        capacity, top = _graph(coo_array, records, b, residual, size), len(records) * size
        for n, token in enumerate(chosen[b].tolist()):
            for j in range(size if token >= 0 else 0):
                result[b, n, j] = maximum_flow(capacity, top + token, j).flow_value / _PARTS
    return result


def _graph(coo_array: Any, records: Sequence[Record], b: int, residual: float, size: int) -> Any:
    """The capacities from queries to keys, as a sparse matrix: node l * size + i is token i above l layers."""
    sources, targets, parts = [], [], []
    place = torch.arange(size)
    for layer, record in enumerate(records):
        weights, keys = record.top.weights[b].cpu().double(), record.top.keys[b].cpu()
        listed = keys >= 0
        queries = place[:, None].expand(keys.shape)
        sources += [(layer + 1) * size + queries[listed], (layer + 1) * size + place]
        targets += [layer * size + keys[listed], layer * size + place]
        parts += [(1 - residual) / record.heads * weights[listed], torch.full((size,), residual, dtype=torch.float64)]
    nodes = (len(records) + 1) * size
    shares = coo_array(
        (torch.cat(parts).numpy(), (torch.cat(sources).numpy(), torch.cat(targets).numpy())), (nodes, nodes)
    )
    capacity = shares.tocsr()  # what stands in one place twice is summed
    capacity.data = (capacity.data * _PARTS).round().astype("int32")
    return capacity


def _stack(records: Sequence[Record]) -> tuple[int, int]:
    """The length and the batch of a stack of layers over one text."""
    if not records:
        raise ValueError("records: is empty; expected the self-attention of one stack of layers")
    size, batch = records[0].keys, records[0].max.shape[0]
    for record in records:
        if (
            record.kind == "cross"
            or record.queries != record.keys
            or (record.keys, record.max.shape[0]) != (size, batch)
        ):
            raise ValueError(
                f"records: {record.name!r} is {record.kind} attention of {record.queries} queries to {record.keys} keys; "
                f"expected self-attention of {size} tokens to themselves in each layer: choose one stack "
                "(and `joined()` for a generated text)"
            )
    return size, batch


def _tokens(tokens: Sequence[int] | None, records: Sequence[Record], size: int) -> Tensor:
    """The places of the tokens in each text (B, N); -1 where it is too short to have one."""
    tokens = range(size) if tokens is None else tokens
    for token in tokens:
        if not isinstance(token, int) or not -size <= token < size:
            raise ValueError(f"tokens: {token!r}; expected numbers of tokens, from {-size} to {size - 1}")
    ends = torch.stack([record.lengths for record in records]).amax(0)[:, None]
    places = torch.tensor(list(tokens), dtype=torch.int64, device=ends.device)
    places = torch.where(places < 0, places + ends, places)
    return places.masked_fill((places < 0) | (places >= ends), -1)
