"""Beam search."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from regard import check


class DecoderState(Protocol):
    """State of a decoder between two steps."""

    def reorder(self: S, rows: Tensor) -> S:
        """Return the state of the batch rows `rows` (N,). Rows may be omitted or repeated."""
        ...


S = TypeVar("S", bound=DecoderState)
# From the last tokens (N,) and the state to the logits (N, V) of the next tokens and the next state.
Step = Callable[[Tensor, S], tuple[Tensor, S]]


class Hypothesis(NamedTuple):
    """A finished sequence: its tokens without start and end, and its score, log-likelihood / length^penalty."""

    tokens: list[int]
    score: float


@torch.no_grad()
def beam_search(
    step: Step[S],
    state: S,
    longest: Tensor,
    *,
    start: int,
    end: int,
    beams: int = 5,
    penalty: float = 1.0,
) -> list[list[Hypothesis]]:
    """Search for the most likely sequences of each batch row, and return them best first.

    Args:
        step: one step of the decoder.
        state: the initial state of N batch rows.
        longest: (N,), maximum number of tokens of a sequence, including the end token. A sequence of this length is
            finished even without end token.
        start: the start token.
        end: the end token.
        beams: number of hypotheses per batch row; 1 is greedy search.
        penalty: length penalty. Sequences are ranked by log-likelihood / length^penalty: 0 favors short sequences, 1 is
            the mean log-likelihood per token.

    Returns:
        At most `beams` hypotheses per batch row.

    >>> from typing import NamedTuple
    >>> class Count(NamedTuple):  # a decoder without memory: token 1 is likely, token 0 ends the sequence
    ...     n: torch.Tensor
    ...     def reorder(self, rows):
    ...         return Count(self.n[rows])
    >>> def step(last, state):
    ...     return torch.tensor([0.3, 0.6, 0.1]).log().expand(len(last), 3), state
    >>> best = beam_search(step, Count(torch.zeros(1)), torch.tensor([3]), start=2, end=0, beams=2, penalty=0.0)
    >>> [(hypothesis.tokens, round(hypothesis.score, 3)) for hypothesis in best[0]]
    [([], -1.204), ([1, 1, 1], -1.532)]

    Source: Wu et al., "Google's Neural Machine Translation System" (2016), section 7, with a plain power of the length.
    """
    check.integer("beam_search: beams", beams, 1)
    check.finite("beam_search: penalty", penalty)
    N, device = longest.shape[0], longest.device
    finished: list[list[Hypothesis]] = [[] for _ in range(N)]
    rows = torch.arange(N, device=device)  # rows that are still searched
    state = state.reorder(rows.repeat_interleave(beams))
    last = torch.full((N * beams,), start, device=device)
    tokens = torch.empty(N, beams, 0, dtype=torch.int64, device=device)
    # All beams of a row start equal, so only the first one has a finite score.
    total = torch.full((N, beams), -torch.inf, device=device)
    total[:, 0] = 0.0
    length = 0
    while rows.numel():
        length += 1
        scores, state = step(last, state)
        V = scores.shape[-1]
        candidates = (total[..., None] + scores.float().log_softmax(-1).view(-1, beams, V)).flatten(1)
        # 2 * beams candidates, because up to `beams` of them end here.
        best, index = candidates.topk(min(2 * beams, candidates.shape[1]))
        beam, token = index // V, index % V
        ends = (token == end) | (length >= longest[rows])[:, None]
        _add_finished(finished, rows, tokens, best, beam, token, ends, end, length**penalty)
        # The first `beams` candidates that do not end. If there are fewer, the rest has a score of -inf.
        order = (
            torch.where(ends, token.shape[1], 0).add(torch.arange(token.shape[1], device=device)).argsort(-1)[:, :beams]
        )
        total = best.masked_fill(ends, -torch.inf).gather(1, order)
        beam, token = beam.gather(1, order), token.gather(1, order)
        tokens = torch.cat([tokens.gather(1, beam[..., None].expand(-1, -1, length - 1)), token[..., None]], -1)
        active = _find_active(finished, rows, total, longest, length, beams, penalty)
        selected = (torch.arange(rows.numel(), device=device)[:, None] * beams + beam)[active]
        state = state.reorder(selected.flatten())
        rows, total, tokens, last = rows[active], total[active], tokens[active], token[active].flatten()
    return [sorted(row, key=lambda hypothesis: -hypothesis.score)[:beams] for row in finished]


def _add_finished(
    finished: list[list[Hypothesis]], rows: Tensor, tokens: Tensor, best: Tensor, beam: Tensor, token: Tensor,
    ends: Tensor, end: int, norm: float,
) -> None:  # fmt: skip
    """Append the candidates that end here to `finished`."""
    for i, j in (ends & best.isfinite()).nonzero().tolist():
        sequence = [*tokens[i, beam[i, j]].tolist(), *([] if token[i, j] == end else [int(token[i, j])])]
        finished[int(rows[i])].append(Hypothesis(sequence, float(best[i, j]) / norm))


def _find_active(
    finished: list[list[Hypothesis]],
    rows: Tensor,
    total: Tensor,
    longest: Tensor,
    length: int,
    beams: int,
    penalty: float,
) -> Tensor:
    """Return which rows may still find a better hypothesis, bool per row.

    Log-likelihoods only decrease, so an upper bound of a score is the current log-likelihood / (maximum
    length)^penalty.
    """
    norm = torch.clamp(longest[rows], min=length).double() ** penalty if penalty > 0 else float(length) ** penalty
    bound = total[:, 0].double() / norm
    worst = [sorted((f.score for f in finished[row]), reverse=True)[:beams] for row in rows.tolist()]
    threshold = torch.tensor(
        [w[-1] if len(w) == beams else -torch.inf for w in worst], dtype=torch.float64, device=total.device
    )
    return bound > threshold
