"""What a watch wants to know of a call of attention, and where it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from regard.components.summary import AttentionSummary, Summary

Shape = tuple[int, int, int, int]


class Ask(Protocol):
    """What a watch wants to know."""

    def wanted(self, within: str = "") -> Summary | None:
        """What a call of attention is to tell, or None to leave it alone. within: what attends, inside of the module."""

    def tell(self, seen: AttentionSummary, shape: Shape, causal: bool) -> None:
        """The summaries of the call that was wanted last, its sizes (B, H, L, S), and whether it forbids later keys."""

    def heads(self) -> int | None:
        """How many heads the module says that it has."""


@contextmanager
def aside() -> Iterator[None]:
    """What is computed in the block is for the summaries alone: it is in no graph, and no other watch sees it."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        yield


def is_kept_by_others() -> bool:
    """Does somebody else decide what is kept for the backward pass? A checkpoint keeps nothing, computes all again, and
    compares: each call must stay what it is without a watch.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
