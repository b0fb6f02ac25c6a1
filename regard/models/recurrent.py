"""Recurrent networks with attention: from one sequence to another, looking at the source words at each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from regard.components import mask
from regard.components.summary import Summary
from regard.nn.additive import AdditiveAttention
from regard.nn.cell import Kind, make_cell
from regard.nn.cell import State as Steps
from regard.nn.memory import Memory
from regard.nn.recurrent import RecurrentDecoder, RecurrentEncoder


@dataclass
class State:
    """What the decoder keeps between two tokens."""

    steps: Steps
    memory: Memory
    above: Steps | None  # of the layers above attention

    def reorder(self, rows: Tensor) -> State:
        """The state of these rows."""
        above = None if self.above is None else self.above.reorder(rows)
        return State(self.steps.reorder(rows), self.memory.reorder(rows), above)


class Recurrent(nn.Module):
    """Encoder and decoder, from tokens (B, S) to scores of tokens (B, L, V): a GRU or LSTM that reads the source in both
    directions, and one that writes the target and looks at the source by additive attention.

    The first layer of the decoder steps, and looks at the source after; the others stand above, and so know what was looked
    at. No layer waits for one above it: all steps of a known target are computed at once.

    Args:
        sources: how many source tokens there are. targets: how many target tokens, V.
        width: of a token's vector. hidden: of the decoder's state; half of it in each direction of the encoder.
        layers: on each side. dropout: of the vectors, between layers, and before the output. cell: "gru" or "lstm".
        shared: source and target have one vocabulary and one table of vectors; the output map is that of the targets.

    Source: Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2015), for the
    score; Luong, Pham, Manning, "Effective Approaches to Attention-based Neural Machine Translation" (2015), section 3, for
    the order; Wu et al., "Google's Neural Machine Translation System" (2016), section 3.1, for attention from the lowest
    layer; Press and Wolf, "Using the Output Embedding to Improve Language Models" (2017), for the tables.
    """

    def __init__(
        self, sources: int, targets: int, *, width: int = 256, hidden: int = 512, layers: int = 1, dropout: float = 0.2,
        cell: Kind = "gru", shared: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if shared and sources != targets:
            raise ValueError(f"Recurrent: shared, but sources is {sources} and targets is {targets}; expected the same")
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

    def encode(self, source: Tensor, lengths: Tensor) -> State:
        """The state before the first target token: what the source (B, S), of which each row has so many tokens (B,), is
        remembered as.
        """
        encoded = self.encoder.read(self.dropout(self.source(source)), lengths)
        memory = self.decoder.remember(self.dropout(encoded), mask.lengths(lengths))
        return State(self.decoder.initial(memory), memory, None)

    def hidden(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """What `output` makes scores of, (B, L, width): for each target token (B, L), all it tells of the next."""
        state = self.encode(source, lengths)
        out = self.decoder(self.dropout(self.target(target)), state.memory, state=state.steps)[0]
        return self._rise(out, state.above)[0]

    def output(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of the next token, before softmax."""
        return F.linear(hidden, self.target.weight)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Scores (B, L, V) of the token after each target token (B, L), given the source (B, S) of these lengths (B,)."""
        return self.output(self.hidden(source, lengths, target))

    def start(self, source: Tensor, lengths: Tensor) -> State:
        """The state before the first target token."""
        return self.encode(source, lengths)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Scores (B, V) of what follows these tokens (B,), and the state after them."""
        out, steps = self.decoder.step(self.dropout(self.target(tokens)), state.memory, state.steps)[:2]
        hidden, above = self._rise(out[:, None], state.above)
        return self.output(hidden[:, 0]), State(steps, state.memory, above)

    def align(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """How much each target token (B, L) looked at each source token: weights (B, L, S)."""
        state = self.encode(source, lengths)
        x = self.dropout(self.target(target))
        seen = self.decoder(x, state.memory, state=state.steps, summary=Summary(full=True))[2]
        weights: Tensor = seen.full
        return weights

    def _rise(self, out: Tensor, above: Steps | None) -> tuple[Tensor, Steps | None]:
        """From what attention gave (B, L, hidden) through the layers above to (B, L, width); and their state."""
        if self.above is not None:
            found, last = self.above(self.dropout(out), None if above is None else above.given)
            out, above = out + found, Steps.of(last)
        # Norms of the vectors in the table are about 1; so the scores begin small.
        return self.map(self.dropout(out)), above
