"""The record of one attention call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.components.summary import Top

KINDS = ("self", "decoder", "cross")


@dataclass(frozen=True)
class Record:
    """One attention call of a model: where it happened, and statistics of its weights. Tensors are detached.

    B is the batch size, H the number of heads, L the number of queries, S the number of keys.

    >>> model = nn.MultiheadAttention(16, 4, batch_first=True)
    >>> with regard.watch(model, top=2) as recording:
    ...     _ = model(x := torch.randn(1, 3, 16), x, x)
    >>> record = recording[0]
    >>> record.kind, record.heads, record.queries, record.keys
    ('self', 4, 3, 3)
    >>> record
    Record('', layer 0, call 0, self: 4 heads, 3 queries x 3 keys, top 2)
    >>> bool(torch.allclose(record.top.weights.sum(-1) + record.missing, torch.ones(1, 4, 3)))
    True
    """

    name: str  # the path of the calling module, "encoder.layer.0.attention.self"
    layer: int  # the index of the attention layer in the model, in the order of calls
    call: int  # the index of the forward pass of the model
    kind: str  # "self", "decoder" (self-attention in which no query may attend to a later key) or "cross"
    heads: int
    queries: int
    keys: int
    top: Top  # the largest weights (B, H, L, k) and their keys (B, H, L, k); weight 0 and key -1 where there are fewer
    max: Tensor  # the largest weight of each row (B, H, L)
    received: Tensor | None  # the sum of the weights that each key receives (B, H, S)
    entropy: Tensor | None  # of each row, in nats (B, H, L)
    rows: Tensor | None  # the full weights of the rows asked for (B, H, R, S)

    def __repr__(self) -> str:
        shape = f"{self.heads} heads, {self.queries} queries x {self.keys} keys, top {self.top.keys.shape[-1]}"
        return f"Record({self.name!r}, layer {self.layer}, call {self.call}, {self.kind}: {shape})"

    @property
    def causal(self) -> bool:
        """Whether no query may attend to a later key."""
        return self.kind == "decoder"

    @property
    def missing(self) -> Tensor:
        """The weight of each row that is not in `top` (B, H, L)."""
        return (1 - self.top.weights.sum(-1)).clamp(min=0) * (self.max > 0)

    @property
    def lengths(self) -> Tensor:
        """The number of queries of each sequence (B,), without queries at its end that attend to nothing.

        Nested tensors are recorded padded to the longest sequence, with such queries as padding.
        """
        ends = torch.arange(1, self.queries + 1, device=self.max.device)
        return (ends * (self.max > 0).any(1)).amax(-1) if self.queries else ends.new_zeros(len(self.max))

    def text(self, n: int) -> Record:
        """Return the record of sequence n of the batch, cut to its own length.

        Cross-attention keeps the keys of the longest sequence.
        """
        if not isinstance(n, int) or not 0 <= n < len(self.max):
            raise ValueError(f"n: {n!r}; expected the index of a sequence, from 0 to {len(self.max) - 1}")
        L, batch = int(self.lengths[n]), slice(n, n + 1)
        S = self.keys if self.kind == "cross" else self.keys - self.queries + L
        return replace(
            self,
            queries=L,
            keys=S,
            top=Top(*(x[batch, :, :L] for x in self.top)),
            max=self.max[batch, :, :L],
            received=None if self.received is None else self.received[batch, :, :S],
            entropy=None if self.entropy is None else self.entropy[batch, :, :L],
            rows=None if self.rows is None else self.rows[batch, ..., :S],
        )
