"""Merge attention over parts of the keys into attention over all keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from regard import check
from regard.components.statistic import Parts
from regard.components.summary import AttentionSummary, Summary


@overload
def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]: ...


@overload
def merge(
    outs: Sequence[Tensor], lses: Sequence[AttentionSummary], summary: Summary, starts: Sequence[int] | None = ...
) -> tuple[Tensor, AttentionSummary]: ...


def merge(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor] | Sequence[AttentionSummary],
    summary: Summary | None = None,
    starts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | AttentionSummary]:
    """Compute softmax attention over a union of disjoint sets of keys from the results over each set.

        lse = log sum_a exp(lse_a)        w_a = exp(lse_a - lse)        out = sum_a w_a out_a

    Use it for keys that are split, for example a cache in chunks, a prefix shared by many sequences, or a ring of
    devices. Each part is a call of `attention` with `Summary(lse=True)`. Pass a sink to one of the calls only.

    Args:
        outs: outputs (B, H, L, E) of the parts.
        lses: log-sum-exps (B, H, L) of the parts; -inf where a query may attend to no key of a part. With `summary`, the
            summaries of the parts.
        summary: which statistics to merge, as requested from each part; it includes `lse`. `received` cannot be merged:
            it is a sum over queries, whose weights change by different factors. `entropy` can be merged without a sink.
        starts: the index of the first key of each part, for `Summary(top=...)`.

    Returns:
        The output (B, H, L, E) in the dtype of the parts, and its log-sum-exp (B, H, L). With `summary`, the output and an
        `AttentionSummary`.

    Raises:
        ValueError, TypeError: the parts do not fit together, or a statistic that `summary` requests is missing.
        NotImplementedError: `summary` requests a statistic that cannot be merged.

    Source: Dao, Fu, Ermon, Rudra, Ré, "FlashAttention" (2022), section 3.1.

    >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
    >>> request = Summary(lse=True, entropy=True)
    >>> out_a, stats_a = regard.attention(q, k[:, :, :3], v[:, :, :3], summary=request)
    >>> out_b, stats_b = regard.attention(q, k[:, :, 3:], v[:, :, 3:], summary=request)
    >>> out, stats = regard.merge([out_a, out_b], [stats_a, stats_b], summary=request)
    >>> expected, expected_stats = regard.attention(q, k, v, summary=request)
    >>> torch.allclose(out, expected, atol=1e-6), torch.allclose(stats.entropy, expected_stats.entropy, atol=1e-6)
    (True, True)
    """
    outs = _parts("outs", outs)
    summaries = [] if summary is None else _summaries(lses, summary, len(outs), starts)
    lses = _parts("lses", [part["lse"] for part in summaries] if summaries else lses)
    if len(outs) != len(lses) or not outs:
        raise ValueError(f"merge: got {len(outs)} outs and {len(lses)} lses; expected as many, at least one")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"merge: an out has shape {tuple(out.shape)} and its lse {tuple(lse.shape)}; expected "
                f"{tuple(outs[0].shape)} and {tuple(outs[0].shape[:-1])}"
            )
        if out.dtype != outs[0].dtype or out.device != outs[0].device or lse.device != out.device:
            raise ValueError(
                f"merge: an out is {out.dtype} on {out.device} and its lse on {lse.device}; expected {outs[0].dtype} "
                f"on {outs[0].device}, as the first out"
            )
    stacked = torch.stack(lses)
    is_empty = (stacked == -torch.inf).all(0)
    total = torch.logsumexp(stacked.masked_fill(is_empty, 0.0), 0)
    shares = torch.exp(stacked - total).masked_fill(is_empty, 0.0)
    merged = torch.zeros_like(outs[0], dtype=shares.dtype)
    for share, out in zip(shares, outs, strict=True):
        merged = merged + share[..., None] * out.to(shares.dtype)
    merged, total = merged.to(outs[0].dtype), total.masked_fill(is_empty, -torch.inf)
    if summary is None:
        return merged, total
    parts = Parts(summaries, list(shares), total, starts)
    return merged, AttentionSummary.of(summary, [statistic.merge(parts) for statistic in summary.statistics])


def _summaries(given: Any, summary: Summary, count: int, starts: Any) -> list[dict[str, Tensor]]:
    """Return the statistics of each part by name."""
    if not isinstance(summary, Summary) or not summary.lse:
        expected = "the Summary that was requested from each part, with lse=True"
        raise check.error("merge: summary", summary, expected, isinstance(summary, Summary))
    parts = list(given) if isinstance(given, list | tuple) and not isinstance(given, AttentionSummary) else None
    if parts is None or not all(isinstance(part, AttentionSummary) for part in parts):
        raise check.error("merge: lses", given, "with summary, a list of the AttentionSummary of each part", False)
    if starts is not None and (len(starts) != count or not all(check.is_int(start) for start in starts)):
        raise ValueError(f"merge: starts is {starts!r}; expected the index of the first key of each of {count} parts")
    named = [part.named for part in parts]
    for statistic in summary.statistics:
        if not all(statistic.name in part for part in named):
            raise ValueError(f"merge: summary requests {statistic.name}, which a part lacks; expected it in all parts")
    return named


def _parts(name: str, parts: Any) -> list[Tensor]:
    """Return the parts as a list; a tensor is split along its first dimension."""
    tensors = list(parts) if isinstance(parts, list | tuple | Tensor) else None
    if tensors is None or not all(check.is_float_tensor(part) for part in tensors):
        raise check.error(f"merge: {name}", parts, "a list of float tensors", False)
    return tensors
