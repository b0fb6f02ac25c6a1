"""What a watch keeps of one call of attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.components.summary import Top

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

    @property
    def lengths(self) -> Tensor:
        """How many queries each text has (B,), without those at its end that attend to nothing: so stands what is shorter
        than the longest text of a batch without padding.
        """
        places = torch.arange(1, self.queries + 1, device=self.max.device)
        return (places * (self.max > 0).any(1)).amax(-1) if self.queries else places.new_zeros(len(self.max))

    def text(self, n: int) -> Record:
        """The record of text n of the batch alone, with its own queries and, but in cross attention, its own keys."""
        if not isinstance(n, int) or not 0 <= n < len(self.max):
            raise ValueError(f"n: {n!r}; expected the number of a text, from 0 to {len(self.max) - 1}")
        L, one = int(self.lengths[n]), slice(n, n + 1)
        S = self.keys if self.kind == "cross" else self.keys - self.queries + L
        return replace(
            self,
            queries=L,
            keys=S,
            top=Top(*(x[one, :, :L] for x in self.top)),
            max=self.max[one, :, :L],
            received=None if self.received is None else self.received[one, :, :S],
            entropy=None if self.entropy is None else self.entropy[one, :, :L],
            rows=None if self.rows is None else self.rows[one, ..., :S],
        )
