"""The transformer: from one sequence to another by attention alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from regard import check
from regard.components import mask
from regard.components.mask import Mask
from regard.components.position import sinusoidal
from regard.components.summary import Summary
from regard.nn.block import AttentionBlock
from regard.nn.cache import KeyValueCache


class FeedForward(nn.Module):
    """x + W_2 relu(W_1 norm(x)) for every token by itself, x (..., width).

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.3; the norm first, as in Xiong et al., "On Layer
    Normalization in the Transformer Architecture" (2020).
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Give x (..., width), changed."""
        out: Tensor = x + self.dropout(self.outer(self.dropout(F.relu(self.inner(self.norm(x))))))
        return out


class Encoder(nn.Module):
    """Layers of self-attention and feed-forward over x (B, S, width), which positions were added to."""

    def __init__(self, width: int, heads: int, hidden: int, layers: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention = nn.ModuleList(AttentionBlock(width, heads, dropout, norm="pre") for _ in range(layers))
        self.feed = nn.ModuleList(FeedForward(width, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """Encode x (B, S, width); `mask` tells which tokens may be attended to."""
        for attend, feed in zip(self.attention, self.feed, strict=True):
            x = feed(attend(x, mask=mask))
        out: Tensor = self.norm(x)
        return out


@dataclass
class State:
    """What the decoder keeps between two tokens: the keys and values of each layer."""

    own: list[KeyValueCache]
    memory: list[KeyValueCache]
    lengths: Tensor  # (B,) of the source

    def reorder(self, rows: Tensor) -> State:
        """The state of these rows."""
        for cache in (*self.own, *self.memory):
            cache.reorder(rows)
        return State(self.own, self.memory, self.lengths[rows])


class Transformer(nn.Module):
    """Encoder and decoder, from tokens (B, S) to scores of tokens (B, L, V).

    Args:
        sources: how many source tokens there are. targets: how many target tokens, V.
        width: of a token's vector. heads: of attention. hidden: of the feed-forward layers. layers: on each side.
        dropout: of each layer's output, and of the weights of attention.
        shared: source and target have one vocabulary and one table of vectors; the output map is that of the targets.

    Source: Vaswani et al., "Attention Is All You Need" (2017); layer norm first, as in Xiong et al. (2020); shared tables of
    Press and Wolf, "Using the Output Embedding to Improve Language Models" (2017).
    """

    def __init__(
        self, sources: int, targets: int, *, width: int = 256, heads: int = 4, hidden: int = 512, layers: int = 3,
        dropout: float = 0.1, shared: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if shared and sources != targets:
            raise ValueError(
                f"Transformer: shared, but sources is {sources} and targets is {targets}; expected the same"
            )
        self.width = width
        self.target = nn.Embedding(targets, width)
        self.source = self.target if shared else nn.Embedding(sources, width)
        for table in dict.fromkeys((self.source, self.target)):
            nn.init.normal_(table.weight, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.encoder = Encoder(width, heads, hidden, layers, dropout)
        self.attention = nn.ModuleList(AttentionBlock(width, heads, dropout, norm="pre") for _ in range(layers))
        self.cross = nn.ModuleList(AttentionBlock(width, heads, dropout, norm="pre") for _ in range(layers))
        self.feed = nn.ModuleList(FeedForward(width, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:
        """The source (B, S), of which each row has so many tokens (B,), as vectors (B, S, width)."""
        out: Tensor = self.encoder(self._embed(self.source, source), mask.lengths(lengths))
        return out

    def hidden(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """What `output` makes scores of, (B, L, width): for each target token (B, L), all it tells of the next."""
        memory, known = self.encode(source, lengths), mask.lengths(lengths)
        x = self._embed(self.target, target)
        for attend, cross, feed in zip(self.attention, self.cross, self.feed, strict=True):
            x = feed(cross(attend(x, mask=mask.causal()), memory, mask=known))
        out: Tensor = self.norm(x)
        return out

    def output(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of the next token, before softmax."""
        return F.linear(hidden, self.target.weight)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Scores (B, L, V) of the token after each target token (B, L), given the source (B, S) of these lengths (B,)."""
        return self.output(self.hidden(source, lengths, target))

    def start(self, source: Tensor, lengths: Tensor) -> State:
        """The state before the first target token."""
        encoded = self.encode(source, lengths)
        memory = [block.attention.remember(encoded) for block in self.cross if isinstance(block, AttentionBlock)]
        return State([KeyValueCache() for _ in memory], memory, lengths)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Scores (B, V) of what follows these tokens (B,), and the state after them."""
        x, known = self._embed(self.target, tokens[:, None], state.own[0].length), mask.lengths(state.lengths)
        layers = zip(self.attention, self.cross, self.feed, state.own, state.memory, strict=True)
        for attend, cross, feed, own, memory in layers:
            x = feed(cross(attend(x, cache=own), mask=known, cache=memory))
        return self.output(self.norm(x))[:, 0], state

    def align(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """How much each target token (B, L) looked at each source token: weights (B, L, S), the mean of the heads of the
        last layer but one, where they follow the words most closely.

        Source: Garg et al., "Jointly Learning to Align and Translate with Transformer Models" (2019), section 3.
        """
        memory, known = self.encode(source, lengths), mask.lengths(lengths)
        x = self._embed(self.target, target)
        asked = max(len(self.cross) - 2, 0)
        for index, (attend, cross, feed) in enumerate(zip(self.attention, self.cross, self.feed, strict=True)):
            x = attend(x, mask=mask.causal())
            if index == asked:
                _, seen = cross(x, memory, mask=known, summary=Summary(full=True))
                weights: Tensor = seen.full.mean(1)
                return weights
            x = feed(cross(x, memory, mask=known))
        raise AssertionError("there is at least one layer")

    def _embed(self, table: nn.Embedding, tokens: Tensor, start: int = 0) -> Tensor:
        if not check.is_ints(tokens) or tokens.dim() != 2:
            raise check.wrong("Transformer: tokens", tokens, "integers of shape (B, L)", check.is_ints(tokens))
        vectors = table(tokens) * self.width**0.5
        where = sinusoidal(tokens.shape[1], self.width, start=start).to(vectors)
        out: Tensor = self.dropout(vectors + where)
        return out
