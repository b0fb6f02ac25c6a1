"""Recurrent sequence-to-sequence model with attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from regard.components import mask
from regard.components.summary import Summary
from regard.nn.additive import AdditiveAttention
from regard.nn.cell import CellKind, RecurrentState, make_cell
from regard.nn.memory import Memory
from regard.nn.recurrent import RecurrentDecoder, RecurrentEncoder


@dataclass
class RecurrentDecoderState:
    """State of the decoder of `Recurrent` between two tokens."""

    steps: RecurrentState
    memory: Memory
    above: RecurrentState | None  # state of the upper decoder layers

    def reorder(self, rows: Tensor) -> RecurrentDecoderState:
        """Return the state of the batch rows `rows`."""
        above = None if self.above is None else self.above.reorder(rows)
        return RecurrentDecoderState(self.steps.reorder(rows), self.memory.reorder(rows), above)


class Recurrent(nn.Module):
    """Encoder-decoder with recurrent layers, from tokens (B, S) to logits (B, L, V): a bidirectional GRU or LSTM
    encodes the source, and a GRU or LSTM with additive attention decodes the target.

    The first decoder layer attends to the source after each step. The upper layers take its output, which contains the
    context. No layer depends on a higher one, so all steps of a known target are computed at once.

    >>> model = Recurrent(9, 7, width=8, hidden=16, layers=2).eval()
    >>> source, lengths, target = torch.tensor([[2, 3, 4]]), torch.tensor([3]), torch.tensor([[1, 5]])
    >>> logits = model(source, lengths, target)
    >>> state = model.start(source, lengths)
    >>> for token in target.unbind(1):
    ...     step_logits, state = model.step(token, state)
    >>> logits.shape, torch.allclose(step_logits, logits[:, -1], atol=1e-6)
    (torch.Size([1, 2, 7]), True)

    Args:
        sources: size of the source vocabulary.
        targets: size V of the target vocabulary.
        width: width of the token embeddings.
        hidden: width of the decoder state; each direction of the encoder has half of it.
        layers: number of layers of the encoder and of the decoder.
        dropout: dropout probability of the embeddings, between layers, and before the output.
        cell: "gru" or "lstm".
        shared: whether source and target share one vocabulary and one embedding. The output layer always shares the
            target embedding.

    Source: Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2015), for
    the score; Luong, Pham, Manning, "Effective Approaches to Attention-based Neural Machine Translation" (2015), section 3,
    for the order; Wu et al., "Google's Neural Machine Translation System" (2016), section 3.1, for attention from the
    lowest layer; Press and Wolf, "Using the Output Embedding to Improve Language Models" (2017), for the tables.
    """

    def __init__(
        self, sources: int, targets: int, *, width: int = 256, hidden: int = 512, layers: int = 1, dropout: float = 0.2,
        cell: CellKind = "gru", shared: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if shared and sources != targets:
            raise ValueError(
                f"Recurrent: shared is True but sources is {sources} and targets is {targets}; expected the same"
            )
        if hidden % 2:
            raise ValueError(f"Recurrent: hidden is {hidden}; expected an even number, for two directions")
        self.target = nn.Embedding(targets, width)
        self.source = self.target if shared else nn.Embedding(sources, width)
        for table in dict.fromkeys((self.source, self.target)):
            nn.init.normal_(table.weight, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.encoder = RecurrentEncoder(width, hidden // 2, cell=cell, layers=layers, dropout=dropout)
        cross = AdditiveAttention(hidden, hidden, width)
        self.decoder = RecurrentDecoder(width, hidden, hidden, cross, cell=cell, order="luong")
        self.above = make_cell("Recurrent", hidden, hidden, cell, layers - 1, dropout) if layers > 1 else None
        self.map = nn.Linear(hidden, width)

    def encode(self, source: Tensor, lengths: Tensor) -> RecurrentDecoderState:
        """Encode a source (B, S) of lengths (B,). Return the state before the first target token."""
        encoded = self.encoder.read(self.dropout(self.source(source)), lengths)
        memory = self.decoder.remember(self.dropout(encoded), mask.lengths(lengths))
        return RecurrentDecoderState(self.decoder.initial(memory), memory, None)

    def hidden(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Return the hidden vectors (B, L, width) of target tokens (B, L), from which `output` computes logits."""
        state = self.encode(source, lengths)
        out = self.decoder(self.dropout(self.target(target)), state.memory, state=state.steps)[0]
        return self._run_upper_layers(out, state.above)[0]

    def output(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of the next token."""
        return F.linear(hidden, self.target.weight)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Return logits (B, L, V) of the token after each target token (B, L), for a source (B, S) of lengths (B,)."""
        return self.output(self.hidden(source, lengths, target))

    def start(self, source: Tensor, lengths: Tensor) -> RecurrentDecoderState:
        """Return the state before the first target token."""
        return self.encode(source, lengths)

    def step(self, tokens: Tensor, state: RecurrentDecoderState) -> tuple[Tensor, RecurrentDecoderState]:
        """Return logits (B, V) of the next tokens after tokens (B,), and the next state."""
        out, steps = self.decoder.step(self.dropout(self.target(tokens)), state.memory, state.steps)[:2]
        hidden, above = self._run_upper_layers(out[:, None], state.above)
        return self.output(hidden[:, 0]), RecurrentDecoderState(steps, state.memory, above)

    def align(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Return the attention weights (B, L, S) of target tokens (B, L) over source tokens (B, S)."""
        state = self.encode(source, lengths)
        x = self.dropout(self.target(target))
        statistics = self.decoder(x, state.memory, state=state.steps, summary=Summary(full=True))[2]
        weights: Tensor = statistics.full
        return weights

    def _run_upper_layers(self, out: Tensor, above: RecurrentState | None) -> tuple[Tensor, RecurrentState | None]:
        """Run the upper layers on the attention output (B, L, hidden). Return (B, L, width) and their state."""
        if self.above is not None:
            upper, last = self.above(self.dropout(out), None if above is None else above.to_torch())
            out, above = out + upper, RecurrentState.from_torch(last)
        # Target embeddings have norms of about 1, so the initial logits are small.
        return self.map(self.dropout(out)), above
