"""Recurrent encoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from regard import check
from regard.nn.cell import CellKind, RecurrentState, make_cell
from regard.nn.checks import check_features
from regard.nn.precision import run_recurrent
from regard.tracing import has_values


class RecurrentEncoder(nn.Module):
    """GRU or LSTM encoder, unidirectional or bidirectional. Padding does not affect the outputs of real tokens.

    >>> encoder = regard.nn.recurrent.RecurrentEncoder(8, 4)
    >>> x = torch.randn(2, 5, 8)
    >>> memory, state = encoder(x, torch.tensor([5, 3]))
    >>> memory.shape, state.hidden.shape
    (torch.Size([2, 5, 8]), torch.Size([1, 2, 8]))
    >>> torch.allclose(memory[1:, :3], encoder(x[1:, :3])[0], atol=1e-6), memory[1, 3:].abs().sum().item()
    (True, 0.0)

    Args:
        input_width: width of the sequence (B, S, input_width).
        hidden_width: width of the state of one direction.
        cell: "gru" or "lstm".
        layers: number of stacked layers.
        bidirectional: whether to read the sequence backwards too.
        dropout: dropout probability between layers, in training.

    Source: Schuster, Paliwal, "Bidirectional Recurrent Neural Networks" (1997).
    """

    def __init__(
        self,
        input_width: int,
        hidden_width: int,
        *,
        cell: CellKind = "gru",
        layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.cell = make_cell(
            "RecurrentEncoder", input_width, hidden_width, cell, layers, dropout, bidirectional=bidirectional
        )
        self.input_width, self.width = input_width, hidden_width * (2 if bidirectional else 1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, RecurrentState]:
        """Encode a sequence.

        Args:
            x: (B, S, input_width).
            lengths: number of tokens of each batch row, integers (B,); None if there is no padding.

        Returns:
            The memory (B, S, width), which is 0 beyond the lengths, where width is hidden_width times the number of
            directions; and the state after the last step, (layers, B, width).
        """
        self._check(x, lengths)
        if lengths is None:
            memory, last = run_recurrent(self.cell, self.cell, x)
        else:
            # Packed sequences have at least one step: outputs of empty rows are set to 0 below.
            packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
            packed, last = self.cell(packed)
            memory = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]
            empty = (lengths == 0)[:, None]
            memory = memory.masked_fill(empty[..., None], 0.0)
        parts = last if isinstance(last, tuple) else (last,)
        if lengths is not None:
            parts = tuple(part.masked_fill(empty, 0.0) for part in parts)
        states = [self._concat_directions(part) for part in parts]
        return memory, RecurrentState(states[0], states[1] if len(states) > 1 else None)

    def read(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return only the memory of `forward`, (B, S, width).

        On the CPU this is faster than `forward` (twice as fast for an LSTM in bfloat16), because torch runs packed
        sequences slice by slice. Here padded rows are run instead: each row is reversed within its length for the
        backward direction, so that padding comes after the real tokens in both directions.
        """
        if lengths is None or not isinstance(x, Tensor) or not x.is_cpu:
            memory: Tensor = self(x, lengths)[0]
            return memory
        self._check(x, lengths)
        steps = torch.arange(x.shape[1])
        real = steps < lengths[:, None]
        reversal = torch.where(real, lengths[:, None] - 1 - steps, steps)[..., None]  # its own inverse
        memory = run_recurrent(self.cell, self._run_padded, x, reversal)
        return memory.masked_fill(~real[..., None], 0.0)

    def _run_padded(self, x: Tensor, reversal: Tensor) -> Tensor:
        """Run all layers over padded rows x (B, S, input_width). Indexing by `reversal` (B, S, 1) reverses the rows."""
        cell, directions = self.cell, 2 if self.cell.bidirectional else 1
        zero = x.new_zeros(1, len(x), cell.hidden_size)
        run: Any = torch.lstm if isinstance(cell, nn.LSTM) else torch.gru
        initial: Any = (zero, zero) if isinstance(cell, nn.LSTM) else zero
        for layer in range(cell.num_layers):
            if layer:
                x = F.dropout(x, cell.dropout, self.training)
            parts = []
            for direction in range(directions):
                weights = cell.all_weights[layer * directions + direction]
                part = x.gather(1, reversal.expand(-1, -1, x.shape[2])) if direction else x
                part = run(part, initial, weights, True, 1, 0.0, self.training, False, True)[0]
                parts.append(part.gather(1, reversal.expand_as(part)) if direction else part)
            x = torch.cat(parts, -1)
        return x

    def _check(self, x: Tensor, lengths: Tensor | None) -> None:
        check_features("RecurrentEncoder: x", x, "B, S", self.input_width)
        if lengths is not None:
            B, S = x.shape[:2]
            fits = check.is_integer_tensor(lengths)
            valid = fits and lengths.shape == (B,)
            if not valid or (has_values(lengths) and not bool(((lengths >= 0) & (lengths <= S)).all())):
                expected = f"an integer tensor of shape (B,) = ({B},), from 0 to {S}"
                raise check.error("RecurrentEncoder: lengths", lengths, expected, fits)

    def _concat_directions(self, x: Tensor) -> Tensor:
        """Concatenate the directions of each layer: (layers * directions, B, hidden) -> (layers, B, width)."""
        layers, B = self.cell.num_layers, x.shape[1]
        return x.view(layers, -1, B, x.shape[2]).transpose(1, 2).reshape(layers, B, self.width)
