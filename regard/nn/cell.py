"""Recurrent cells: an `nn.GRU` or `nn.LSTM`, run one step at a time."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import check
from regard.deprecated import getter
from regard.nn.checks import check_batch_indices, check_probability

CellKind = Literal["gru", "lstm"]


def make_cell(
    name: str, input_width: int, hidden_width: int, kind: CellKind, layers: int, dropout: float, *,
    fed: int = 0, bidirectional: bool = False,
) -> nn.GRU | nn.LSTM:  # fmt: skip
    """Check the arguments of the layer `name`. Return an `nn.GRU` or `nn.LSTM` of input width input_width + fed."""
    for argument, value in (("input_width", input_width), ("hidden_width", hidden_width), ("layers", layers)):
        check.integer(f"{name}: {argument}", value, 1)
    if kind not in ("gru", "lstm"):
        raise check.error(f"{name}: cell", kind, '"gru" or "lstm"', isinstance(kind, str))
    check_probability(f"{name}: dropout", dropout)
    # torch applies dropout between layers, and warns if there is a single layer.
    dropout = dropout if layers > 1 else 0.0
    return (nn.GRU if kind == "gru" else nn.LSTM)(
        input_width + fed, hidden_width, layers, batch_first=True, dropout=dropout, bidirectional=bidirectional
    )


class RecurrentState(NamedTuple):
    """State of a recurrent layer between two steps.

    hidden: (layers, B, hidden).
    cell: (layers, B, hidden), the cell state of an LSTM; None for a GRU.
    output: (B, hidden), the previous output, for input feeding; None without it.
    coverage: (B, S), the sum of the attention weights of the previous steps; None without coverage.
    position: the number of previous steps.

    >>> encoder = regard.nn.recurrent.RecurrentEncoder(8, 4, cell="lstm", layers=3, bidirectional=False)
    >>> _, state = encoder(torch.randn(2, 5, 8))
    >>> state.hidden.shape, state.cell.shape
    (torch.Size([3, 2, 4]), torch.Size([3, 2, 4]))
    >>> torch.equal(state.reorder(torch.tensor([1, 1, 0])).hidden[:, 2], state.hidden[:, 0])
    True
    """

    hidden: Tensor
    cell: Tensor | None = None
    output: Tensor | None = None
    coverage: Tensor | None = None
    position: int = 0

    @classmethod
    def from_torch(cls, state: Any) -> RecurrentState:
        """Convert the state of a layer of `torch.nn`: the hidden state, or a pair (hidden state, cell state)."""
        return cls(*state) if isinstance(state, tuple) and len(state) == 2 else cls(state)

    def to_torch(self) -> Any:
        """Convert to the state of a layer of `torch.nn`."""
        return self.hidden if self.cell is None else (self.hidden, self.cell)

    def reorder(self, rows: Tensor) -> RecurrentState:
        """Return the state of the batch rows `rows`, an integer tensor of shape (N,). Rows may repeat."""
        check_batch_indices("RecurrentState.reorder: rows", rows)
        cell, output, coverage = (
            None if x is None else x.index_select(axis, rows)
            for x, axis in ((self.cell, 1), (self.output, 0), (self.coverage, 0))
        )
        return RecurrentState(self.hidden.index_select(1, rows), cell, output, coverage, self.position)


class RecurrentCell:
    """Runs the layers of `rnn` one step at a time, for inputs [x; fed]. The inputs x (B, L, input_width) are known
    before the first step, so their projection to the gates is computed for all steps at once by `project`.

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
            # An LSTM adds both biases to the same gates.
            self.layers.append((w_x, w_h.T, b_x, b_h) if self.is_gru else (w_x, w_h.T, b_x + b_h, None))
        first = self.layers[0][0]
        self.w_input, self.w_fed = first[:, :input_width], first[:, input_width:].T

    def project(self, x: Tensor) -> Tensor:
        """Project inputs x (..., input_width) to the gates of the first layer."""
        return F.linear(x, self.w_input, self.layers[0][2])

    def step(
        self, projected: Tensor, fed: Tensor | None, hidden: Tensor, cell: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the next hidden and cell state, (layers, B, hidden), from projected and fed inputs (B, width)."""
        gates = projected if fed is None else torch.addmm(projected, fed, self.w_fed)
        states: list[Tensor] = []
        cells: list[Tensor] = []
        for layer, (w_x, w_h, b_x, b_h) in enumerate(self.layers):
            if layer:
                below = F.dropout(states[-1], self.rnn.dropout, self.rnn.training)
                gates = F.linear(below, w_x, b_x)
            if cell is None:
                states.append(_gru_step(gates, torch.addmm(b_h, hidden[layer], w_h), hidden[layer]))
            else:
                state, next_cell = _lstm_step(torch.addmm(gates, hidden[layer], w_h), cell[layer])
                states.append(state)
                cells.append(next_cell)
        return torch.stack(states), None if cell is None else torch.stack(cells)


def _gru_step(x: Tensor, h: Tensor, hidden: Tensor) -> Tensor:
    """Compute one GRU step from the gate projections of the input and of the state, (B, 3 hidden) each."""
    width = hidden.shape[-1]
    x_rz, x_n = torch.split_with_sizes(x, (2 * width, width), -1)
    h_rz, h_n = torch.split_with_sizes(h, (2 * width, width), -1)
    r, z = torch.sigmoid(x_rz + h_rz).chunk(2, -1)
    n = torch.tanh(torch.addcmul(x_n, r, h_n))
    return torch.lerp(n, hidden.to(n.dtype), z)


def _lstm_step(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Compute one LSTM step from its gates (B, 4 hidden)."""
    width = cell.shape[-1]
    i_f, g, o = torch.split_with_sizes(gates, (2 * width, width, width), -1)
    i, f = torch.sigmoid(i_f).chunk(2, -1)
    cell = torch.addcmul(i * torch.tanh(g), f, cell.to(f.dtype))
    return torch.sigmoid(o) * torch.tanh(cell), cell


__getattr__ = getter("regard.nn.cell")
