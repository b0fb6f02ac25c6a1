"""A recurrent encoder: the memory that a decoder attends to."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from regard import check
from regard.nn.cell import Kind, State, make_cell
from regard.nn.memory import check_axes
from regard.nn.precision import run_recurrent


class RecurrentEncoder(nn.Module):
    """A GRU or LSTM that reads a sequence, in both directions or in one. Padding changes nothing of what is before it.

    >>> encoder = RecurrentEncoder(128, 256)
    >>> memory, state = encoder(x, n)  # (B, S, 128), of lengths (B,) -> (B, S, 512)

    Args:
        input_width: of the sequence (B, S, input_width).
        hidden_width: of each direction.
        cell: "gru" or "lstm".
        layers: how many, one upon the other.
        bidirectional: read backwards too.
        dropout: the chance that a number between two layers is dropped in training.

    Source: Schuster, Paliwal, "Bidirectional Recurrent Neural Networks" (1997).
    """

    def __init__(
        self,
        input_width: int,
        hidden_width: int,
        *,
        cell: Kind = "gru",
        layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.cell = make_cell(
            "RecurrentEncoder", input_width, hidden_width, cell, layers, dropout, bidirectional=bidirectional
        )
        self.input_width, self.width = input_width, hidden_width * (2 if bidirectional else 1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Read a sequence.

        Args:
            x: (B, S, input_width).
            lengths: how much of each row is real, integers (B,); None for all.

        Returns:
            The memory (B, S, width), 0 beyond the lengths, where width is hidden_width times the directions; and the state
            after the last step, (layers, B, width).
        """
        self._check(x, lengths)
        if lengths is None:
            memory, last = run_recurrent(self.cell, self.cell, x)
        else:
            # A packed sequence has at least one step. What it makes of none is taken out again.
            packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
            packed, last = self.cell(packed)
            memory = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]
            empty = (lengths == 0)[:, None]
            memory = memory.masked_fill(empty[..., None], 0.0)
        parts = last if isinstance(last, tuple) else (last,)
        if lengths is not None:
            parts = tuple(part.masked_fill(empty, 0.0) for part in parts)
        states = [self._joined(part) for part in parts]
        return memory, State(states[0], states[1] if len(states) > 1 else None)

    def read(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The memory alone, (B, S, width), as `forward` gives it. On the CPU this is faster, twice with an LSTM in bfloat16:
        torch steps through packed sequences by slices. Here the padding is read as well, but after all that is real: whoever
        reads backwards begins at the last real step.
        """
        if lengths is None or not isinstance(x, Tensor) or not x.is_cpu:
            memory: Tensor = self(x, lengths)[0]
            return memory
        self._check(x, lengths)
        steps = torch.arange(x.shape[1])
        real = steps < lengths[:, None]
        turned = torch.where(real, lengths[:, None] - 1 - steps, steps)[..., None]  # its own inverse
        memory = run_recurrent(self.cell, self._run_padded, x, turned)
        return memory.masked_fill(~real[..., None], 0.0)

    def _run_padded(self, x: Tensor, turned: Tensor) -> Tensor:
        """All layers over padded rows x (B, S, input_width); `turned` (B, S, 1) is where each step of the reversed rows
        stands.
        """
        cell, directions = self.cell, 2 if self.cell.bidirectional else 1
        zero = x.new_zeros(1, len(x), cell.hidden_size)
        run: tuple[Any, Any] = (torch.lstm, (zero, zero)) if isinstance(cell, nn.LSTM) else (torch.gru, zero)
        for layer in range(cell.num_layers):
            if layer:
                x = F.dropout(x, cell.dropout, self.training)
            parts = []
            for backwards in range(directions):
                weights = cell.all_weights[layer * directions + backwards]
                part = x.gather(1, turned.expand(-1, -1, x.shape[2])) if backwards else x
                part = run[0](part, run[1], weights, True, 1, 0.0, self.training, False, True)[0]
                parts.append(part.gather(1, turned.expand_as(part)) if backwards else part)
            x = torch.cat(parts, -1)
        return x

    def _check(self, x: Tensor, lengths: Tensor | None) -> None:
        check_axes("RecurrentEncoder: x", x, "B, S", self.input_width)
        if lengths is not None:
            B, S = x.shape[:2]
            fits = check.is_ints(lengths)
            if not fits or lengths.shape != (B,) or not bool(((lengths >= 0) & (lengths <= S)).all()):
                expected = f"integers from 0 to {S} of shape (B,) = ({B},)"
                raise check.wrong("RecurrentEncoder: lengths", lengths, expected, fits)

    def _joined(self, x: Tensor) -> Tensor:
        """Both directions of a layer side by side: (layers * directions, B, hidden) -> (layers, B, width)."""
        layers, B = self.cell.num_layers, x.shape[1]
        return x.view(layers, -1, B, x.shape[2]).transpose(1, 2).reshape(layers, B, self.width)
