"""Transformer sequence-to-sequence model."""

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
    """Position-wise feed-forward layer: x + W_2 relu(W_1 norm(x)), x (..., width).

    >>> layer = FeedForward(4, 8).eval()
    >>> x = torch.randn(2, 3, 4)
    >>> torch.allclose(layer(x), x + layer.outer(layer.inner(layer.norm(x)).relu()))
    True

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.3; pre-norm as in Xiong et al., "On Layer
    Normalization in the Transformer Architecture" (2020).
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, of the shape of x (..., width)."""
        out: Tensor = x + self.dropout(self.outer(self.dropout(F.relu(self.inner(self.norm(x))))))
        return out


class TransformerEncoder(nn.Module):
    """Pre-norm transformer encoder over x (B, S, width), to which positions have been added.

    >>> encoder = TransformerEncoder(8, 2, 16, layers=2).eval()
    >>> x = torch.randn(2, 5, 8)
    >>> out = encoder(x, mask.lengths(torch.tensor([5, 3])))
    >>> out.shape, torch.allclose(out[1:, :3], encoder(x[1:, :3]), atol=1e-6)  # padding does not matter
    (torch.Size([2, 5, 8]), True)
    """

    def __init__(self, width: int, heads: int, hidden: int, layers: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention = nn.ModuleList(AttentionBlock(width, heads, dropout, norm="pre") for _ in range(layers))
        self.feed = nn.ModuleList(FeedForward(width, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """Encode x (B, S, width). `mask`: which tokens may be attended to."""
        for attend, feed in zip(self.attention, self.feed, strict=True):
            x = feed(attend(x, mask=mask))
        out: Tensor = self.norm(x)
        return out


@dataclass
class TransformerState:
    """State of the decoder of `Transformer` between two tokens: the key/value caches of each layer."""

    own: list[KeyValueCache]
    memory: list[KeyValueCache]
    lengths: Tensor  # (B,), lengths of the source

    def reorder(self, rows: Tensor) -> TransformerState:
        """Return the state of the batch rows `rows`. The caches are changed in place."""
        for cache in (*self.own, *self.memory):
            cache.reorder(rows)
        return TransformerState(self.own, self.memory, self.lengths[rows])


class Transformer(nn.Module):
    """Pre-norm transformer encoder-decoder, from tokens (B, S) to logits (B, L, V).

    >>> model = Transformer(9, 7, width=8, heads=2, hidden=16, layers=2).eval()
    >>> source, lengths, target = torch.tensor([[2, 3, 4]]), torch.tensor([3]), torch.tensor([[1, 5]])
    >>> logits = model(source, lengths, target)
    >>> state = model.start(source, lengths)
    >>> for token in target.unbind(1):
    ...     step_logits, state = model.step(token, state)
    >>> logits.shape, torch.allclose(step_logits, logits[:, -1], atol=1e-5)
    (torch.Size([1, 2, 7]), True)

    Args:
        sources: size of the source vocabulary.
        targets: size V of the target vocabulary.
        width: width of the token embeddings.
        heads: number of attention heads.
        hidden: width of the hidden layer of the feed-forward layers.
        layers: number of layers of the encoder and of the decoder.
        dropout: dropout probability of the output of each layer, and of the attention weights.
        shared: whether source and target share one vocabulary and one embedding. The output layer always shares the
            target embedding.

    Source: Vaswani et al., "Attention Is All You Need" (2017); pre-norm as in Xiong et al. (2020); shared embeddings as
    in Press and Wolf, "Using the Output Embedding to Improve Language Models" (2017).
    """

    def __init__(
        self, sources: int, targets: int, *, width: int = 256, heads: int = 4, hidden: int = 512, layers: int = 3,
        dropout: float = 0.1, shared: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if shared and sources != targets:
            raise ValueError(
                f"Transformer: shared is True but sources is {sources} and targets is {targets}; expected the same"
            )
        self.width = width
        self.target = nn.Embedding(targets, width)
        self.source = self.target if shared else nn.Embedding(sources, width)
        for table in dict.fromkeys((self.source, self.target)):
            nn.init.normal_(table.weight, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.encoder = TransformerEncoder(width, heads, hidden, layers, dropout)
        self.attention = nn.ModuleList(AttentionBlock(width, heads, dropout, norm="pre") for _ in range(layers))
        self.cross = nn.ModuleList(AttentionBlock(width, heads, dropout, norm="pre") for _ in range(layers))
        self.feed = nn.ModuleList(FeedForward(width, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:
        """Encode a source (B, S) of lengths (B,) as vectors (B, S, width)."""
        out: Tensor = self.encoder(self._embed(self.source, source), mask.lengths(lengths))
        return out

    def hidden(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Return the hidden vectors (B, L, width) of target tokens (B, L), from which `output` computes logits."""
        memory, padding = self.encode(source, lengths), mask.lengths(lengths)
        x = self._embed(self.target, target)
        for attend, cross, feed in zip(self.attention, self.cross, self.feed, strict=True):
            x = feed(cross(attend(x, mask=mask.causal()), memory, mask=padding))
        out: Tensor = self.norm(x)
        return out

    def output(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of the next token."""
        return F.linear(hidden, self.target.weight)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Return logits (B, L, V) of the token after each target token (B, L), for a source (B, S) of lengths (B,)."""
        return self.output(self.hidden(source, lengths, target))

    def start(self, source: Tensor, lengths: Tensor) -> TransformerState:
        """Return the state before the first target token."""
        encoded = self.encode(source, lengths)
        memory = [block.attention.remember(encoded) for block in self.cross if isinstance(block, AttentionBlock)]
        return TransformerState([KeyValueCache() for _ in memory], memory, lengths)

    def step(self, tokens: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        """Return logits (B, V) of the next tokens after tokens (B,), and the next state."""
        x, padding = self._embed(self.target, tokens[:, None], state.own[0].length), mask.lengths(state.lengths)
        layers = zip(self.attention, self.cross, self.feed, state.own, state.memory, strict=True)
        for attend, cross, feed, own, memory in layers:
            x = feed(cross(attend(x, cache=own), mask=padding, cache=memory))
        return self.output(self.norm(x))[:, 0], state

    def align(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Return attention weights (B, L, S) of target tokens (B, L) over source tokens: the mean over the heads of the
        second to last layer, whose weights match word alignments best.

        Source: Garg et al., "Jointly Learning to Align and Translate with Transformer Models" (2019), section 3.
        """
        memory, padding = self.encode(source, lengths), mask.lengths(lengths)
        x = self._embed(self.target, target)
        selected = max(len(self.cross) - 2, 0)
        for index, (attend, cross, feed) in enumerate(zip(self.attention, self.cross, self.feed, strict=True)):
            x = attend(x, mask=mask.causal())
            if index == selected:
                _, statistics = cross(x, memory, mask=padding, summary=Summary(full=True))
                weights: Tensor = statistics.full.mean(1)
                return weights
            x = feed(cross(x, memory, mask=padding))
        raise AssertionError("there is at least one layer")

    def _embed(self, table: nn.Embedding, tokens: Tensor, start: int = 0) -> Tensor:
        if not check.is_integer_tensor(tokens) or tokens.dim() != 2:
            raise check.error(
                "Transformer: tokens", tokens, "an integer tensor of shape (B, L)", check.is_integer_tensor(tokens)
            )
        vectors = table(tokens) * self.width**0.5
        positions = sinusoidal(tokens.shape[1], self.width, start=start).to(vectors)
        out: Tensor = self.dropout(vectors + positions)
        return out
