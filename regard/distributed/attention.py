"""Attention over a sequence that is divided among the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard import check
from regard.backends import choose
from regard.backends.registry import are_finite
from regard.components.component import map_leaves
from regard.components.normalizer import Normalizer
from regard.components.part import bias_of_part, mask_of_part
from regard.components.predicate import Mask
from regard.components.score import Score
from regard.components.summary import AttentionSummary, Summary
from regard.components.tile import Box, Sizes
from regard.distributed.needs import find_needs
from regard.distributed.results import Results
from regard.distributed.shards import SequenceShards
from regard.distributed.transfer import Route, fetch, sum_gradients
from regard.distributed.transport import Transport
from regard.plan.arguments import check_seed, check_tensors, four_axes, with_batch_tables
from regard.plan.assemble import AnyBias, check_components, check_positions, make_problem

AnyScore = Score | Callable[[Tensor, Tensor], Tensor]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shards: SequenceShards,
    key_shards: SequenceShards | None = None,
    score: AnyScore | None = None,
    normalizer: Normalizer | None = None,
    mask: Mask | None = None,
    bias: AnyBias | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    summary: Summary | None = None,
    backend: str | None = None,
    reduce: bool = False,
) -> Tensor | tuple[Tensor, AttentionSummary]:
    """Compute `regard.attention` over sequences of which each rank of a group holds some positions.

    Each rank receives the keys and values that the mask lets its queries attend to, and no others, and computes the rows of
    its queries. All ranks call it with equal arguments, except for q, k and v.

    Args:
        q: the queries of this rank (B, H, l, D), with l = `shards.length_of(rank)`; also with other leading dimensions, as
            in `regard.attention`.
        k, v: the keys and values of this rank, (B, G, s, D) and (B, G, s, E).
        shards: how the queries are divided; in self-attention, the keys and values, too.
        key_shards: how keys and values are divided, if not as the queries.
        score, normalizer, softcap, dropout: as in `regard.attention`.
        mask, bias: as in `regard.attention`, for the whole sequences: their positions, tables and alignments are those of
            all L queries and S keys.
        seed: as in `regard.attention`. The same weights are dropped as in one process. By default rank 0 draws it.
        summary: as in `regard.attention`; `rows` are positions in the whole sequence.
        backend: as in `regard.attention`.
        reduce: whether the gradients of tensors in score, normalizer and bias are summed over the ranks. Otherwise each rank
            has the part of its queries. For parameters under DDP, which takes means of gradients, scale the loss by the
            number of ranks. Tensors that a Python function closes over are not summed.

    Returns:
        The output of the queries of this rank (B, H, l, E). With `summary`, a pair of it and an `AttentionSummary` of these
        queries. `received` and other sums over the queries are those of all queries, for the keys of this rank (B, H, s).
        `rows` and `full` have all S keys, and `rows` is the same on all ranks.

    The losses of all ranks must depend on the same outputs, since backward passes exchange gradients in the same order.

    Raises:
        ValueError, TypeError: an argument is invalid.

    >>> from regard.distributed import SequenceShards, attention
    >>> from regard.distributed.transport import run_ranks
    >>> q, k, v = torch.randn(3, 1, 2, 10, 8)
    >>> def work(transport):
    ...     shards = SequenceShards(10, transport, mask=mask.causal())
    ...     local = [shards.shard(x, dim=2) for x in (q, k, v)]
    ...     out = attention(*local, shards=shards, mask=mask.causal(), dropout=0.1, seed=1)
    ...     return shards.gather(out, dim=2)
    >>> expected = regard.attention(q, k, v, mask=mask.causal(), dropout=0.1, seed=1)
    >>> [torch.allclose(out, expected, atol=1e-6) for out in run_ranks(3, work)]
    [True, True, True]
    """
    key_shards = _check_shards(q, k, v, shards, key_shards)
    if mask is not None and q.dim() == 3:
        mask = with_batch_tables(mask)
    lead = q.shape[:-2]
    x = four_axes(q, k, v)
    size = Sizes(x[0].shape[0], x[0].shape[1], x[1].shape[1], shards.length, key_shards.length)
    # What a function closes over is found from one pair, also on ranks without queries or keys.
    pair = [y if y.shape[2] else y.new_zeros((*y.shape[:2], 1, y.shape[3])) for y in x]
    checked_score, checked_normalizer, checked_summary = check_components(
        pair, size, score, normalizer, summary, softcap
    )
    # With the leading dimensions that the user's bias has, and the lengths of the whole.
    mask, checked_bias = check_positions(mask, bias, checked_score, q, size)
    if dropout != 0.0 or seed is not None:
        seed = _share_seed(check_seed(dropout, seed, q.device), shards.transport)
    if reduce:
        checked_score, checked_normalizer, checked_bias = (
            _reduced(part, shards.transport) for part in (checked_score, checked_normalizer, checked_bias)
        )
    needs = find_needs(mask, size, shards.ranges, q.device)
    route = Route(key_shards, needs)
    width, dtype = x[1].shape[-1], torch.promote_types(k.dtype, v.dtype)
    keys = fetch(torch.cat([x[1].to(dtype), x[2].to(dtype)], -1), route)

    results = Results(size, checked_summary, route, shards)
    start = 0
    for queries, span in zip(shards.ranges[shards.rank], needs.spans[shards.rank], strict=True):
        stop = start + queries[1] - queries[0]
        box = Box((0, size.B), (0, size.H), queries, span, size)
        within = keys[:, :, span[0] - route.span[0] : span[1] - route.span[0]]
        tensors = x[0][:, :, start:stop], within[..., :width].to(k.dtype), within[..., width:].to(v.dtype)
        part = make_problem(
            *tensors, checked_score, checked_normalizer,
            None if mask is None else mask_of_part(mask, box),
            None if checked_bias is None else bias_of_part(checked_bias, box),
            softcap, dropout, seed, results.summary_of(box), choose.masks_nonfinite(backend, q), are_finite,
            box.origin if dropout else None,
        )  # fmt: skip
        results.add(box, part.plan.outputs, choose.run(part, backend))
        start = stop
    out, stats = results.put_together(x[0], keys, v)

    def restore(y: Tensor) -> Tensor:
        return y.reshape(*lead, *y.shape[2:])

    return restore(out) if summary is None else (restore(out), stats.each(restore))


def _check_shards(
    q: Tensor, k: Tensor, v: Tensor, shards: SequenceShards, key_shards: SequenceShards | None
) -> SequenceShards:
    """Check the tensors of this rank, and return the shards of the keys."""
    check_tensors(q, k, v)
    for name, value in (("shards", shards), ("key_shards", key_shards)):
        if not isinstance(value, SequenceShards) and (name == "shards" or value is not None):
            raise check.error(f"attention: {name}", value, "a SequenceShards", False)
    key_shards = shards if key_shards is None else key_shards
    if (key_shards.rank, key_shards.ranks) != (shards.rank, shards.ranks):
        raise ValueError(f"attention: key_shards is {key_shards}; expected the group of shards, {shards}")
    for name, x, of in (("q", q, shards), ("k", k, key_shards)):
        expected = of.length_of(of.rank)
        if x.shape[-2] != expected:
            raise ValueError(
                f"attention: {name} has {x.shape[-2]} positions; expected {expected}, those of rank {of.rank} in {of}"
            )
    return key_shards


def _share_seed(seed: Tensor, transport: Transport) -> Tensor:
    """Return the seed of rank 0."""
    seed = seed.reshape(1)
    return transport.exchange([seed] * transport.ranks, [(1,)] * transport.ranks)[0].reshape(())


def _reduced(component: Any, transport: Transport) -> Any:
    """Return a component whose tensors get the gradients of all ranks."""
    if component is None:
        return None
    return map_leaves(
        component, lambda x: sum_gradients(x, transport) if isinstance(x, Tensor) and x.requires_grad else x
    )
