"""What a watch wants to know of a call of attention, and where it is told."""

from __future__ import annotations

from typing import Protocol

from regard.summary import Seen, Summary

Shape = tuple[int, int, int, int]


class Ask(Protocol):
    """What a watch wants to know."""

    def wanted(self, within: str = "") -> Summary | None:
        """What a call of attention is to tell, or None to leave it alone. within: what attends, inside of the module."""

    def tell(self, seen: Seen, shape: Shape, causal: bool) -> None:
        """The summaries of the call that was wanted last, its sizes (B, H, L, S), and whether it forbids later keys."""

    def heads(self) -> int | None:
        """How many heads the module says that it has."""
