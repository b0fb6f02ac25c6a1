"""Join attention over parts of the keys into attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard import check


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of disjoint sets of keys, from the outputs and log-sum-exps over each set.

    For keys that come in pieces: a cache in chunks, a prefix shared by many, rings of devices. Each part is one call of
    `attention` with `Summary(lse=True)`; a sink belongs in one part alone.

    Args:
        outs: outputs (B, H, L, E) of each part.
        lses: log-sum-exps (B, H, L) of each part; -inf where a row attends to nothing there.

    Returns:
        The output (B, H, L, E) in the dtype of the parts, and its log-sum-exp (B, H, L).

    Source: Dao, Fu, Ermon, Rudra, Ré, "FlashAttention" (2022), section 3.1.
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
    nothing = (stacked == -torch.inf).all(0)
    total = torch.logsumexp(stacked.masked_fill(nothing, 0.0), 0)
    share = torch.exp(stacked - total).masked_fill(nothing, 0.0)
    joined = torch.zeros_like(outs[0], dtype=share.dtype)
    for weight, out in zip(share, outs, strict=True):
        joined = joined + weight[..., None] * out.to(share.dtype)
    return joined.to(outs[0].dtype), total.masked_fill(nothing, -torch.inf)


def _parts(name: str, parts: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in a list; a tensor of several is taken apart."""
    given = list(parts) if isinstance(parts, list | tuple | Tensor) else None
    if given is None or not all(check.is_floats(part) for part in given):
        raise check.wrong(f"merge: {name}", parts, "a list of tensors of floats", False)
    return given
