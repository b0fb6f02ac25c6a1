"""Recurrent cells: the layers of an nn.GRU or nn.LSTM, one step at a time."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import check
from regard.nn.memory import check_chance, check_rows

Kind = Literal["gru", "lstm"]


def make_cell(
    name: str, input_width: int, hidden_width: int, kind: Kind, layers: int, dropout: float, *,
    fed: int = 0, bidirectional: bool = False,
) -> nn.GRU | nn.LSTM:  # fmt: skip
    """Check what a layer of this name was given; its nn.GRU or nn.LSTM, which takes inputs of input_width + fed."""
    for argument, value in (("input_width", input_width), ("hidden_width", hidden_width), ("layers", layers)):
        check.whole(f"{name}: {argument}", value, 1)
    if kind not in ("gru", "lstm"):
        raise check.wrong(f"{name}: cell", kind, '"gru" or "lstm"', isinstance(kind, str))
    check_chance(f"{name}: dropout", dropout)
    # Dropout stands between layers: torch warns where there is one.
    dropout = dropout if layers > 1 else 0.0
    return (nn.GRU if kind == "gru" else nn.LSTM)(
        input_width + fed, hidden_width, layers, batch_first=True, dropout=dropout, bidirectional=bidirectional
    )


class State(NamedTuple):
    """What a recurrent layer knows between two steps.

    hidden: (layers, B, hidden). cell: the same of an LSTM. output: (B, hidden), what input feeding gives to the next step.
    coverage: (B, S), the sum of all weights so far. position: how many steps were made. None where there is no such thing.
    """

    hidden: Tensor
    cell: Tensor | None = None
    output: Tensor | None = None
    coverage: Tensor | None = None
    position: int = 0

    @classmethod
    def of(cls, given: Any) -> State:
        """What `torch.nn`'s layers give: the hidden state, or a pair of it and the cell."""
        return cls(*given) if isinstance(given, tuple) and len(given) == 2 else cls(given)

    @property
    def given(self) -> Any:
        """The same, as they take it."""
        return self.hidden if self.cell is None else (self.hidden, self.cell)

    def reorder(self, rows: Tensor) -> State:
        """The state of these batch rows, integers of shape (N,), as often as each is named: for beam search."""
        check_rows("State.reorder: rows", rows)
        cell, output, coverage = (
            None if x is None else x.index_select(axis, rows)
            for x, axis in ((self.cell, 1), (self.output, 0), (self.coverage, 0))
        )
        return State(self.hidden.index_select(1, rows), cell, output, coverage, self.position)


class Cell:
    """The layers of `rnn`, one step at a time, for inputs [x; fed], where x (B, L, input_width) is known before the first
    step: what it adds to the gates is computed for all steps at once.

        r, z = sigmoid(W [x; fed; h] + b)    n = tanh(W_n [x; fed] + b_n + r (U_n h + c_n))    h' = (1 - z) n + z h
        i, f, o = sigmoid(W [x; fed; h] + b)    g = tanh(W_g [x; fed; h] + b_g)    c' = f c + i g    h' = o tanh(c')
    """

    def __init__(self, rnn: nn.GRU | nn.LSTM, input_width: int) -> None:
        self.rnn, self.is_gru = rnn, isinstance(rnn, nn.GRU)
        self.layers: list[Any] = []
        for layer in range(rnn.num_layers):
            w_x, w_h, b_x, b_h = (
                getattr(rnn, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            # In an LSTM, both biases go to the same places.
            self.layers.append((w_x, w_h.T, b_x, b_h) if self.is_gru else (w_x, w_h.T, b_x + b_h, None))
        first = self.layers[0][0]
        self.w_input, self.w_fed = first[:, :input_width], first[:, input_width:].T

    def map(self, x: Tensor) -> Tensor:
        """What inputs x (..., input_width) add to the gates of the first layer."""
        return F.linear(x, self.w_input, self.layers[0][2])

    def step(
        self, mapped: Tensor, fed: Tensor | None, hidden: Tensor, cell: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """From what `map` gave for this step (B, .), fed (B, .) and the state (layers, B, hidden) to the next state."""
        gates = mapped if fed is None else torch.addmm(mapped, fed, self.w_fed)
        states: list[Tensor] = []
        cells: list[Tensor] = []
        for layer, (w_x, w_h, b_x, b_h) in enumerate(self.layers):
            if layer:
                below = F.dropout(states[-1], self.rnn.dropout, self.rnn.training)
                gates = F.linear(below, w_x, b_x)
            if cell is None:
                states.append(_gru(gates, torch.addmm(b_h, hidden[layer], w_h), hidden[layer]))
            else:
                state, kept = _lstm(torch.addmm(gates, hidden[layer], w_h), cell[layer])
                states.append(state)
                cells.append(kept)
        return torch.stack(states), None if cell is None else torch.stack(cells)


def _gru(x: Tensor, h: Tensor, hidden: Tensor) -> Tensor:
    """One step of a GRU from the gates' parts of the input and of the state, (B, 3 hidden) each."""
    width = hidden.shape[-1]
    x_rz, x_n = torch.split_with_sizes(x, (2 * width, width), -1)
    h_rz, h_n = torch.split_with_sizes(h, (2 * width, width), -1)
    r, z = torch.sigmoid(x_rz + h_rz).chunk(2, -1)
    n = torch.tanh(torch.addcmul(x_n, r, h_n))
    return torch.lerp(n, hidden.to(n.dtype), z)


def _lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM from its gates (B, 4 hidden)."""
    width = cell.shape[-1]
    i_f, g, o = torch.split_with_sizes(gates, (2 * width, width, width), -1)
    i, f = torch.sigmoid(i_f).chunk(2, -1)
    cell = torch.addcmul(i * torch.tanh(g), f, cell.to(f.dtype))
    return torch.sigmoid(o) * torch.tanh(cell), cell
