"""What a watch keeps of one call of attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.summary import Top

KINDS = ("self", "decoder", "cross")


@dataclass(frozen=True)
class Record:
    """One call of attention in a model, in summaries of its weights. Tensors are detached.

    B batch rows, H heads, L queries, S keys.
    """

    name: str  # the path of the module that called it, "encoder.layer.0.attention.self"
    layer: int  # which attention of the model it is, in the order of calls, from 0
    call: int  # which run of the model it belongs to, from 0
    kind: str  # "self", "decoder" (self-attention in which no query may attend to a later key) or "cross"
    heads: int
    queries: int
    keys: int
    top: Top  # the largest weights (B, H, L, k) and their keys (B, H, L, k); weight 0 and key -1 where there are fewer
    max: Tensor  # the largest weight of each row (B, H, L)
    received: Tensor | None  # the sum of each key's weights (B, H, S)
    entropy: Tensor | None  # of each row, in nats (B, H, L)
    rows: Tensor | None  # the whole weights of the rows asked for (B, H, R, S)

    @property
    def causal(self) -> bool:
        """May no query attend to a later key?"""
        return self.kind == "decoder"

    @property
    def missing(self) -> Tensor:
        """The weight of each row that `top` leaves out (B, H, L): it went to other keys."""
        return (1 - self.top.weights.sum(-1)).clamp(min=0) * (self.max > 0)
