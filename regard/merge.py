"""Merge attention over parts of the keys into attention over all keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard import check


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute softmax attention over a union of disjoint sets of keys from the outputs and log-sum-exps over each set.

    Use it for keys that are split, for example a cache in chunks, a prefix shared by many sequences, or a ring of
    devices. Each part is a call of `attention` with `Summary(lse=True)`. Pass a sink to one of the calls only.

    Args:
        outs: outputs (B, H, L, E) of the parts.
        lses: log-sum-exps (B, H, L) of the parts; -inf where a query may attend to no key of a part.

    Returns:
        The output (B, H, L, E) in the dtype of the parts, and its log-sum-exp (B, H, L).

    Source: Dao, Fu, Ermon, Rudra, Ré, "FlashAttention" (2022), section 3.1.

    >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
    >>> out_a, stats_a = regard.attention(q, k[:, :, :3], v[:, :, :3], summary=Summary(lse=True))
    >>> out_b, stats_b = regard.attention(q, k[:, :, 3:], v[:, :, 3:], summary=Summary(lse=True))
    >>> out, lse = regard.merge([out_a, out_b], [stats_a.lse, stats_b.lse])
    >>> torch.allclose(out, regard.attention(q, k, v), atol=1e-6)
    True
    """
    outs, lses = _parts("outs", outs), _parts("lses", lses)
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
    weights = torch.exp(stacked - total).masked_fill(is_empty, 0.0)
    merged = torch.zeros_like(outs[0], dtype=weights.dtype)
    for weight, out in zip(weights, outs, strict=True):
        merged = merged + weight[..., None] * out.to(weights.dtype)
    return merged.to(outs[0].dtype), total.masked_fill(is_empty, -torch.inf)


def _parts(name: str, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts as a list; a tensor is split along its first dimension."""
    tensors = list(parts) if isinstance(parts, list | tuple | Tensor) else None
    if tensors is None or not all(check.is_float_tensor(part) for part in tensors):
        raise check.error(f"merge: {name}", parts, "a list of float tensors", False)
    return tensors
