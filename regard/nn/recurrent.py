"""Recurrent decoder with attention, and the coverage loss. The encoder is in `regard.nn.encoder`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard import check
from regard.attention import attention
from regard.components.mask import Mask
from regard.components.score import Dot
from regard.components.summary import AttentionSummary, Summary
from regard.components.tile import Sizes
from regard.nn.additive import AdditiveAttention
from regard.nn.cell import CellKind, RecurrentCell, RecurrentState, make_cell
from regard.nn.checks import check_features, check_mask
from regard.nn.encoder import RecurrentEncoder
from regard.nn.luong import LuongAttention
from regard.nn.memory import Memory, MemoryAttention, concat_summaries, hidden_from_watch, make_vector
from regard.nn.precision import run_recurrent

__all__ = ["RecurrentDecoder", "RecurrentEncoder", "coverage_loss"]


class RecurrentDecoder(nn.Module):
    """A GRU or LSTM that attends to a memory at each step.

        "bahdanau"  attend, then step:  c_t = attention(s_{t-1}, memory)
                                        s_t = cell([x_t; c_t], s_{t-1})         output_t = s_t
        "luong"     step, then attend:  s_t = cell(x_t, s_{t-1})
                                        c_t = attention(s_t, memory)            output_t = tanh(W_c [c_t; s_t])

    s_t is the hidden state of the last layer. With input feeding, the cell of "luong" takes [x_t; output_{t-1}]. With
    coverage, the scores depend on the weights of previous steps: key j is U memory_j + w_c (sum of its weights).

    "luong" without input feeding and coverage computes all steps at once, with one call of the `torch.nn` layer and one
    of attention.

    >>> decoder = regard.nn.recurrent.RecurrentDecoder(8, 16, memory_width=12)
    >>> x, encoded = torch.randn(2, 5, 8), torch.randn(2, 7, 12)
    >>> memory = decoder.remember(encoded, mask.lengths(torch.tensor([7, 4])))
    >>> output, state = decoder(x, memory)  # all steps, in training
    >>> output.shape, state.position
    (torch.Size([2, 5, 16]), 5)
    >>> step_state = decoder.initial(memory)
    >>> for x_t in x.unbind(1):  # step by step, in decoding
    ...     step_output, step_state = decoder.step(x_t, memory, step_state)
    >>> torch.allclose(step_output, output[:, -1], atol=1e-6)
    True

    Args:
        input_width: width of the inputs (B, L, input_width).
        hidden_width: width of the state and of the output.
        memory_width: width of the memory (B, S, memory_width).
        attention: an `AdditiveAttention` or a `LuongAttention` with query_width = hidden_width and key_width =
            memory_width. By default `LuongAttention` ("general") for "luong" without coverage, else `AdditiveAttention`
            of width hidden_width.
        cell: "gru" or "lstm".
        layers: number of stacked layers.
        order: "bahdanau" or "luong".
        input_feeding, coverage: see above.
        dropout: dropout probability between layers, in training.

    Source: Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2015),
    appendix A.2; Luong, Pham, Manning, "Effective Approaches to Attention-based Neural Machine Translation" (2015),
    section 3; See, Liu, Manning, "Get To The Point: Summarization with Pointer-Generator Networks" (2017), section 2.3
    (coverage).
    """

    def __init__(
        self,
        input_width: int,
        hidden_width: int,
        memory_width: int,
        attention: MemoryAttention | None = None,
        *,
        cell: CellKind = "gru",
        layers: int = 1,
        order: Literal["bahdanau", "luong"] = "bahdanau",
        input_feeding: bool = False,
        coverage: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check.integer("RecurrentDecoder: memory_width", memory_width, 1)
        if order not in ("bahdanau", "luong"):
            raise check.error("RecurrentDecoder: order", order, '"bahdanau" or "luong"', isinstance(order, str))
        if input_feeding and order != "luong":
            expected = 'False with order "bahdanau", whose cell takes the context'
            raise check.error("RecurrentDecoder: input_feeding", input_feeding, expected, True)
        fed = memory_width if order == "bahdanau" else hidden_width if input_feeding else 0
        self.cell = make_cell("RecurrentDecoder", input_width, hidden_width, cell, layers, dropout, fed=fed)
        if attention is None:
            if order == "luong" and not coverage:
                attention = LuongAttention(hidden_width, memory_width)
            else:
                attention = AdditiveAttention(hidden_width, memory_width, hidden_width)
        self._check_attention(attention, memory_width, hidden_width, coverage)
        self.attention = attention
        self.input_width, self.memory_width, self.order = input_width, memory_width, order
        self.input_feeding = input_feeding
        self.initial_map = nn.Linear(memory_width, layers * hidden_width * (2 if cell == "lstm" else 1))
        self.output_map = nn.Linear(memory_width + hidden_width, hidden_width, bias=False) if order == "luong" else None
        self.coverage_map = make_vector(attention.width) if coverage else None

    def remember(self, memory: Tensor, mask: Mask | None = None) -> Memory:
        """Project a memory (B, S, memory_width) once, for many steps. `mask`: which keys may be attended to."""
        check_features("RecurrentDecoder: memory", memory, "B, S", self.memory_width)
        check_mask("RecurrentDecoder: mask", mask)
        return self.attention.remember(memory, mask=mask)

    def initial(self, memory: Tensor | Memory, mask: Mask | None = None) -> RecurrentState:
        """Return an initial state: tanh of a learned projection of the mean of the memory, which is (B, S,
        memory_width) or a `Memory`. To start from the last state of an encoder, pass it as a memory of one key:
        `initial(state.hidden[-1][:, None])`.

        Source: Xu et al., "Show, Attend and Tell" (2015), section 3.1.2.
        """
        if not isinstance(memory, Memory):
            check_features("RecurrentDecoder: memory", memory, "B, S", self.memory_width)
            check_mask("RecurrentDecoder: mask", mask)
            memory = Memory(memory, memory)
        memory = memory.within(mask)
        # Scores of 0 give equal weights to all keys that may be attended to.
        zero = memory.values.new_zeros(1, 1, 1).expand(*memory.values.shape[:2], 1)
        with hidden_from_watch():
            mean = attention(zero[:, :1], zero, memory.values, score=Dot(), mask=memory.mask)[:, 0]
        states = (
            torch.tanh(self.initial_map(mean)).view(len(mean), -1, self.cell.hidden_size).transpose(0, 1).contiguous()
        )
        layers = self.cell.num_layers
        return RecurrentState(states[:layers], states[layers:] if isinstance(self.cell, nn.LSTM) else None)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | Memory,
        mask: Mask | None = None,
        state: RecurrentState | Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        summary: Summary | None = None,
    ) -> tuple[Tensor, RecurrentState] | tuple[Tensor, RecurrentState, AttentionSummary]:
        """Run all steps of known inputs, as in training.

        Args:
            x: (B, L, input_width).
            memory: (B, S, memory_width), or a `Memory` from `remember`.
            mask: one of `regard.mask`, such as `mask.lengths(n)`, combined by AND with the mask of the memory. True =
                may attend.
            state: the initial state: one of an earlier call or of an encoder, or the state of a `torch.nn` layer, which
                is (layers, B, hidden) or a pair; `initial(memory)` by default.
            summary: which statistics of the attention weights to return.

        Returns:
            The outputs (B, L, hidden_width) and the state after the last step; with `summary`, also an
            `AttentionSummary` of all steps.
        """
        check_features("RecurrentDecoder: x", x, "B, L", self.input_width)
        if not x.shape[1]:
            raise check.error("RecurrentDecoder: x", x, "at least one step", True)
        memory = memory if isinstance(memory, Memory) else self.remember(memory)
        check_mask("RecurrentDecoder: mask", mask)
        memory = memory.within(mask)
        state = self._complete_state(x, memory, state)
        if summary is not None:
            B, S = memory.keys.shape[:2]
            summary.check(Sizes(B, 1, 1, x.shape[1], S))
        if self._is_parallel:
            out, state, statistics = self._run_parallel(x, memory, state, summary)
        else:
            cells, outputs, steps = RecurrentCell(self.cell, self.input_width), [], []
            # Row numbers count the steps of the sequence, so `concat_summaries` selects the rows from all steps.
            per_step = summary and replace(summary, rows=(), full=summary.full or bool(summary.row_numbers))
            for projected in cells.project(x).unbind(1):
                output, state, statistics = self._run_step(cells, projected, memory, state, per_step)
                outputs.append(output)
                steps.append(statistics)
            out, statistics = torch.stack(outputs, 1), summary and concat_summaries(steps, summary)
        return (out, state) if summary is None else (out, state, statistics)

    def step(
        self, x: Tensor, memory: Memory, state: RecurrentState, *, summary: Summary | None = None
    ) -> tuple[Tensor, RecurrentState] | tuple[Tensor, RecurrentState, AttentionSummary]:
        """Run one step, as in decoding.

        Args:
            x: (B, input_width).
            memory: a `Memory` from `remember`.
            state: the state of the previous step, or `initial(memory)`.
            summary: which statistics of the attention weights to return.

        Returns:
            The output (B, hidden_width) and the state; with `summary`, also an `AttentionSummary` with L = 1.
        """
        check_features("RecurrentDecoder: x", x, "B", self.input_width)
        if not isinstance(memory, Memory):
            raise check.error("RecurrentDecoder: memory", memory, "a Memory from `remember`", False)
        state = self._complete_state(x, memory, state)
        cells = RecurrentCell(self.cell, self.input_width)
        output, state, statistics = self._run_step(cells, cells.project(x), memory, state, summary)
        return (output, state) if summary is None else (output, state, statistics)

    @property
    def _is_parallel(self) -> bool:
        """Whether no state depends on attention, so that all steps can be computed at once."""
        return self.order == "luong" and not self.input_feeding and self.coverage_map is None

    def _run_parallel(
        self, x: Tensor, memory: Memory, state: RecurrentState, summary: Summary | None
    ) -> tuple[Tensor, RecurrentState, Any]:
        hidden, last = run_recurrent(self.cell, self.cell, x, state.to_torch())
        context, statistics = self._attend(hidden, memory, state.position, summary)
        state = RecurrentState.from_torch(last)._replace(position=state.position + x.shape[1])
        return self._output(context, hidden), state, statistics

    def _run_step(
        self, cells: RecurrentCell, projected: Tensor, memory: Memory, state: RecurrentState, summary: Summary | None
    ) -> tuple[Tensor, RecurrentState, Any]:
        if self.order == "bahdanau":
            context, coverage, statistics = self._attend_step(state.hidden[-1], memory, state, summary)
            hidden, cell = cells.step(projected, context, state.hidden, state.cell)
            output = hidden[-1]
        else:
            fed = state.output if self.input_feeding else None
            hidden, cell = cells.step(projected, fed, state.hidden, state.cell)
            context, coverage, statistics = self._attend_step(hidden[-1], memory, state, summary)
            output = self._output(context, hidden[-1])
        previous = output if self.input_feeding else None
        return output, RecurrentState(hidden, cell, previous, coverage, state.position + 1), statistics

    def _attend_step(
        self, query: Tensor, memory: Memory, state: RecurrentState, summary: Summary | None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Return the context (B, memory_width) of one query (B, hidden_width), the new coverage, and the summary."""
        if self.coverage_map is None:
            context, statistics = self._attend(query, memory, state.position, summary)
            return context, None, statistics
        if state.coverage is not None:
            memory = memory._replace(keys=memory.keys + state.coverage[..., None] * self.coverage_map)
        context, statistics = self._attend(query, memory, state.position, replace(summary or Summary(), full=True))
        weights = statistics.full[:, 0]
        statistics = statistics if summary is not None and summary.full else statistics._replace(full=None)
        return context, weights if state.coverage is None else state.coverage + weights, statistics

    def _attend(self, query: Tensor, memory: Memory, position: int, summary: Summary | None) -> tuple[Tensor, Any]:
        start = {"start": position} if isinstance(self.attention, LuongAttention) else {}
        out = self.attention(query, memory, summary=summary, **start)
        return out if summary is not None else (out, None)

    def _output(self, context: Tensor, hidden: Tensor) -> Tensor:
        assert self.output_map is not None
        return torch.tanh(self.output_map(torch.cat([context, hidden], -1)))

    def _complete_state(self, x: Tensor, memory: Memory, initial: Any) -> RecurrentState:
        """Check an initial state and fill in its missing fields."""
        B, S = x.shape[0], memory.keys.shape[1]
        if memory.keys.shape[0] != B:
            expected = f"the batch size of memory, {memory.keys.shape[0]}"
            raise check.error("RecurrentDecoder: x", x, expected, True)
        if initial is None:
            initial = self.initial(memory)
        elif not isinstance(initial, RecurrentState):
            initial = RecurrentState.from_torch(initial)
        state: RecurrentState = initial
        shapes: dict[str, tuple[int, ...]] = {"hidden": (self.cell.num_layers, B, self.cell.hidden_size)}
        if isinstance(self.cell, nn.LSTM):
            shapes["cell"] = shapes["hidden"]
        elif state.cell is not None:
            raise check.error("RecurrentDecoder: the cell of the state", state.cell, "None for a GRU", True)
        if self.input_feeding:
            state = state if state.output is not None else state._replace(output=x.new_zeros(B, self.cell.hidden_size))
            shapes["output"] = (B, self.cell.hidden_size)
        if state.coverage is not None:
            shapes["coverage"] = (B, S)
        for name, shape in shapes.items():
            check.float_tensor(f"RecurrentDecoder: the {name} of the state", getattr(state, name), (shape,), str(shape))
        return state

    @staticmethod
    def _check_attention(attention: Any, memory_width: int, hidden_width: int, coverage: bool) -> None:
        if not isinstance(attention, AdditiveAttention if coverage else MemoryAttention):
            expected = f"an AdditiveAttention{'' if coverage else ' or a LuongAttention'}, or None for the default"
            raise check.error("RecurrentDecoder: attention", attention, expected, False)
        for name, width in (("query_width", hidden_width), ("key_width", memory_width)):
            if getattr(attention, name) != width:
                at = "hidden_width" if name == "query_width" else "memory_width"
                raise ValueError(
                    f"RecurrentDecoder: attention has {name} {getattr(attention, name)}; expected {width}, as {at}"
                )
        if isinstance(attention, LuongAttention) and attention.output_map is not None:
            raise ValueError(
                "RecurrentDecoder: attention has an output_width; expected None, as the decoder has an output map"
            )


def coverage_loss(weights: Tensor) -> Tensor:
    """Compute the coverage loss, which penalizes repeated attention to the same keys:

        loss_t = sum_j min(a_tj, c_tj),  where c_t = a_1 + ... + a_{t-1}

    >>> weights = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]]])  # three steps, two keys
    >>> regard.nn.recurrent.coverage_loss(weights)
    tensor([[0.0000, 0.5000, 0.7500]])

    Args:
        weights: attention weights (B, L, S) of L steps.

    Returns:
        (B, L), from 0 to 1.

    Source: See, Liu, Manning, "Get To The Point: Summarization with Pointer-Generator Networks" (2017), equation 12.
    """
    if not check.is_float_tensor(weights) or weights.dim() != 3:
        raise check.error(
            "coverage_loss: weights", weights, "a float tensor of shape (B, L, S)", check.is_float_tensor(weights)
        )
    coverage = torch.nn.functional.pad(weights.cumsum(1)[:, :-1], (0, 0, 1, 0))
    return torch.minimum(weights, coverage).sum(-1)
