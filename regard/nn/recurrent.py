"""Recurrent layers around attention: an encoder, and a decoder that attends to the memory that it made."""

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
from regard.nn.cell import Cell, Kind, State, make_cell
from regard.nn.encoder import RecurrentEncoder
from regard.nn.luong import LuongAttention
from regard.nn.memory import Memory, MemoryAttention, check_axes, check_mask, join, unwatched, vector
from regard.nn.precision import run_recurrent

__all__ = ["RecurrentDecoder", "RecurrentEncoder", "coverage_loss"]


class RecurrentDecoder(nn.Module):
    """A GRU or LSTM that attends to a memory at each step.

        "bahdanau"  attend, then step:  c_t = attention(s_{t-1}, memory)
                                        s_t = cell([x_t; c_t], s_{t-1})         output_t = s_t
        "luong"     step, then attend:  s_t = cell(x_t, s_{t-1})
                                        c_t = attention(s_t, memory)            output_t = tanh(W_c [c_t; s_t])

    s_t is the hidden state of the last layer. With input feeding, the cell of "luong" takes [x_t; output_{t-1}]. With
    coverage, attention is told where it looked before: key j becomes U memory_j + w_c (the sum of all weights it got).

    "luong" without either runs through all steps at once: one call of `torch.nn`'s layer, one of attention.

    >>> decoder = RecurrentDecoder(128, 512, memory_width=512)
    >>> output, state = decoder(x, memory, mask.lengths(n))  # (B, L, 128) -> (B, L, 512)

    Args:
        input_width: of the inputs (B, L, input_width).
        hidden_width: of the state and of the output.
        memory_width: of the memory (B, S, memory_width).
        attention: an `AdditiveAttention` or a `LuongAttention` of queries of hidden_width and keys of memory_width. By
            default, the latter ("general") for "luong" without coverage, and the former, of hidden_width, for all else.
        cell: "gru" or "lstm".
        layers: how many, one upon the other.
        order: "bahdanau" or "luong".
        input_feeding, coverage: see above.
        dropout: the chance that a number between two layers is dropped in training.

    Source: Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2015), appendix
    A.2; Luong, Pham, Manning, "Effective Approaches to Attention-based Neural Machine Translation" (2015), section 3; See,
    Liu, Manning, "Get To The Point: Summarization with Pointer-Generator Networks" (2017), section 2.3 (coverage).
    """

    def __init__(
        self,
        input_width: int,
        hidden_width: int,
        memory_width: int,
        attention: MemoryAttention | None = None,
        *,
        cell: Kind = "gru",
        layers: int = 1,
        order: Literal["bahdanau", "luong"] = "bahdanau",
        input_feeding: bool = False,
        coverage: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check.whole("RecurrentDecoder: memory_width", memory_width, 1)
        if order not in ("bahdanau", "luong"):
            raise check.wrong("RecurrentDecoder: order", order, '"bahdanau" or "luong"', isinstance(order, str))
        if input_feeding and order != "luong":
            expected = 'False where order is "bahdanau": its cell takes the context'
            raise check.wrong("RecurrentDecoder: input_feeding", input_feeding, expected, True)
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
        self.coverage_map = vector(attention.width) if coverage else None

    def remember(self, memory: Tensor, mask: Mask | None = None) -> Memory:
        """Map a memory (B, S, memory_width) once, for many steps; `mask` tells what of it may be attended to."""
        check_axes("RecurrentDecoder: memory", memory, "B, S", self.memory_width)
        check_mask("RecurrentDecoder: mask", mask)
        return self.attention.remember(memory, mask=mask)

    def initial(self, memory: Tensor | Memory, mask: Mask | None = None) -> State:
        """A state to begin with: tanh of a learned map of the mean of the memory (B, S, memory_width), or of what `remember`
        made of it. The last state of an encoder is a memory of one key: `initial(state.hidden[-1][:, None])`.

        Source: Xu et al., "Show, Attend and Tell" (2015), section 3.1.2.
        """
        if not isinstance(memory, Memory):
            check_axes("RecurrentDecoder: memory", memory, "B, S", self.memory_width)
            check_mask("RecurrentDecoder: mask", mask)
            memory = Memory(memory, memory)
        memory = memory.within(mask)
        # Weights that are all equal: of those that may be attended to.
        zero = memory.values.new_zeros(1, 1, 1).expand(*memory.values.shape[:2], 1)
        with unwatched():
            mean = attention(zero[:, :1], zero, memory.values, score=Dot(), mask=memory.mask)[:, 0]
        found = (
            torch.tanh(self.initial_map(mean)).view(len(mean), -1, self.cell.hidden_size).transpose(0, 1).contiguous()
        )
        layers = self.cell.num_layers
        return State(found[:layers], found[layers:] if isinstance(self.cell, nn.LSTM) else None)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | Memory,
        mask: Mask | None = None,
        state: State | Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        summary: Summary | None = None,
    ) -> tuple[Tensor, State] | tuple[Tensor, State, AttentionSummary]:
        """All steps of inputs that are known, as in training.

        Args:
            x: (B, L, input_width).
            memory: (B, S, memory_width), or what `remember` made of it.
            mask: one of `regard.mask`, such as `mask.lengths(n)`; joined with that of the memory. True = may attend.
            state: where to begin: of an earlier call, of an encoder, or as `torch.nn`'s layers give it, (layers, B,
                hidden) or a pair; `initial(memory)` by default.
            summary: what else to tell about the weights.

        Returns:
            The outputs (B, L, hidden_width), and the state after the last step; with `summary`, `AttentionSummary` of all steps too.
        """
        check_axes("RecurrentDecoder: x", x, "B, L", self.input_width)
        if not x.shape[1]:
            raise check.wrong("RecurrentDecoder: x", x, "one step at least", True)
        memory = memory if isinstance(memory, Memory) else self.remember(memory)
        check_mask("RecurrentDecoder: mask", mask)
        memory = memory.within(mask)
        state = self._begin(x, memory, state)
        if summary is not None:
            B, S = memory.keys.shape[:2]
            summary.check(Sizes(B, 1, 1, x.shape[1], S))
        if self._is_parallel:
            out, state, seen = self._at_once(x, memory, state, summary)
        else:
            cells, outputs, told = Cell(self.cell, self.input_width), [], []
            # A row is one of the steps: it is taken of them all, in the end.
            asked = summary and replace(summary, rows=(), full=summary.full or bool(summary.row_numbers))
            for mapped in cells.map(x).unbind(1):
                output, state, seen = self._step(cells, mapped, memory, state, asked)
                outputs.append(output)
                told.append(seen)
            out, seen = torch.stack(outputs, 1), summary and join(told, summary)
        return (out, state) if summary is None else (out, state, seen)

    def step(
        self, x: Tensor, memory: Memory, state: State, *, summary: Summary | None = None
    ) -> tuple[Tensor, State] | tuple[Tensor, State, AttentionSummary]:
        """One step, as in decoding.

        Args:
            x: (B, input_width).
            memory: what `remember` made of it.
            state: of the step before, or `initial(memory)`.
            summary: what else to tell about the weights.

        Returns:
            The output (B, hidden_width), and the state; with `summary`, `AttentionSummary` too, where L = 1.
        """
        check_axes("RecurrentDecoder: x", x, "B", self.input_width)
        if not isinstance(memory, Memory):
            raise check.wrong("RecurrentDecoder: memory", memory, "what `remember` made of it", False)
        state = self._begin(x, memory, state)
        cells = Cell(self.cell, self.input_width)
        output, state, seen = self._step(cells, cells.map(x), memory, state, summary)
        return (output, state) if summary is None else (output, state, seen)

    @property
    def _is_parallel(self) -> bool:
        """Do states depend on nothing but inputs, and weights on nothing but states?"""
        return self.order == "luong" and not self.input_feeding and self.coverage_map is None

    def _at_once(self, x: Tensor, memory: Memory, state: State, summary: Summary | None) -> tuple[Tensor, State, Any]:
        hidden, last = run_recurrent(self.cell, self.cell, x, state.given)
        context, seen = self._attend(hidden, memory, state.position, summary)
        return self._output(context, hidden), State.of(last)._replace(position=state.position + x.shape[1]), seen

    def _step(
        self, cells: Cell, mapped: Tensor, memory: Memory, state: State, summary: Summary | None
    ) -> tuple[Tensor, State, Any]:
        if self.order == "bahdanau":
            context, coverage, seen = self._look(state.hidden[-1], memory, state, summary)
            hidden, cell = cells.step(mapped, context, state.hidden, state.cell)
            output = hidden[-1]
        else:
            fed = state.output if self.input_feeding else None
            hidden, cell = cells.step(mapped, fed, state.hidden, state.cell)
            context, coverage, seen = self._look(hidden[-1], memory, state, summary)
            output = self._output(context, hidden[-1])
        kept = output if self.input_feeding else None
        return output, State(hidden, cell, kept, coverage, state.position + 1), seen

    def _look(
        self, query: Tensor, memory: Memory, state: State, summary: Summary | None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """The context (B, memory_width) of one query (B, hidden_width), and the coverage with its weights."""
        if self.coverage_map is None:
            context, seen = self._attend(query, memory, state.position, summary)
            return context, None, seen
        if state.coverage is not None:
            memory = memory._replace(keys=memory.keys + state.coverage[..., None] * self.coverage_map)
        asked = replace(summary or Summary(), full=True)
        context, seen = self._attend(query, memory, state.position, asked)
        weights = seen.full[:, 0]
        seen = seen if summary is not None and summary.full else seen._replace(full=None)
        return context, weights if state.coverage is None else state.coverage + weights, seen

    def _attend(self, query: Tensor, memory: Memory, position: int, summary: Summary | None) -> tuple[Tensor, Any]:
        where = {"start": position} if isinstance(self.attention, LuongAttention) else {}
        found = self.attention(query, memory, summary=summary, **where)
        return found if summary is not None else (found, None)

    def _output(self, context: Tensor, hidden: Tensor) -> Tensor:
        assert self.output_map is not None
        return torch.tanh(self.output_map(torch.cat([context, hidden], -1)))

    def _begin(self, x: Tensor, memory: Memory, given: Any) -> State:
        """Check a state; what is missing in it is filled in."""
        B, S = x.shape[0], memory.keys.shape[1]
        if memory.keys.shape[0] != B:
            expected = f"as many batch rows as there are in memory, {memory.keys.shape[0]}"
            raise check.wrong("RecurrentDecoder: x", x, expected, True)
        if given is None:
            given = self.initial(memory)
        elif not isinstance(given, State):
            given = State.of(given)
        state: State = given
        shapes: dict[str, tuple[int, ...]] = {"hidden": (self.cell.num_layers, B, self.cell.hidden_size)}
        if isinstance(self.cell, nn.LSTM):
            shapes["cell"] = shapes["hidden"]
        elif state.cell is not None:
            raise check.wrong("RecurrentDecoder: the cell of the state", state.cell, "None: a GRU has none", True)
        if self.input_feeding:
            state = state if state.output is not None else state._replace(output=x.new_zeros(B, self.cell.hidden_size))
            shapes["output"] = (B, self.cell.hidden_size)
        if state.coverage is not None:
            shapes["coverage"] = (B, S)
        for name, shape in shapes.items():
            check.floats(f"RecurrentDecoder: the {name} of the state", getattr(state, name), (shape,), str(shape))
        return state

    @staticmethod
    def _check_attention(attention: Any, memory_width: int, hidden_width: int, coverage: bool) -> None:
        if not isinstance(attention, AdditiveAttention if coverage else MemoryAttention):
            expected = f"an AdditiveAttention{'' if coverage else ' or a LuongAttention'}, or None for one"
            raise check.wrong("RecurrentDecoder: attention", attention, expected, False)
        for name, width in (("query_width", hidden_width), ("key_width", memory_width)):
            if getattr(attention, name) != width:
                at = "hidden_width" if name == "query_width" else "memory_width"
                raise ValueError(
                    f"RecurrentDecoder: attention has {name} {getattr(attention, name)}; expected {width}, the {at}"
                )
        if isinstance(attention, LuongAttention) and attention.output_map is not None:
            raise ValueError(
                "RecurrentDecoder: attention has an output_width; expected None: the decoder has an output of its own"
            )


def coverage_loss(weights: Tensor) -> Tensor:
    """How much each step attends to what was attended to before: sum_j min(a_tj, c_tj), where c_t = a_1 + ... + a_{t-1}.

    >>> output, state, seen = decoder(x, memory, summary=Summary(full=True))
    >>> loss = loss + coverage_loss(seen.full).mean()

    Args:
        weights: (B, L, S), of L steps.

    Returns:
        (B, L), from 0 to 1.

    Source: See, Liu, Manning, "Get To The Point: Summarization with Pointer-Generator Networks" (2017), equation 12.
    """
    if not check.is_floats(weights) or weights.dim() != 3:
        raise check.wrong("coverage_loss: weights", weights, "floats of shape (B, L, S)", check.is_floats(weights))
    before = torch.nn.functional.pad(weights.cumsum(1)[:, :-1], (0, 0, 1, 0))
    return torch.minimum(weights, before).sum(-1)
