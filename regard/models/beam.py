"""Beam search: the sequences that a model finds most likely, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from regard import check


class State(Protocol):
    """What a decoder keeps between two steps."""

    def reorder(self: S, rows: Tensor) -> S:
        """The state of these rows (N,), which may be fewer, more, or repeated."""
        ...


S = TypeVar("S", bound=State)
# From the last tokens (N,) and the state to scores (N, V) of the next ones, before softmax, and the state after them.
Step = Callable[[Tensor, S], tuple[Tensor, S]]


class Found(NamedTuple):
    """A sequence that the search found: its tokens without start and end, and its log-likelihood over its length to the
    power of the penalty.
    """

    tokens: list[int]
    score: float


@torch.no_grad()
def search(
    step: Step[S],
    state: S,
    longest: Tensor,
    *,
    start: int,
    end: int,
    beams: int = 5,
    penalty: float = 1.0,
) -> list[list[Found]]:
    """The most likely sequences of every batch row, best first.

    Args:
        step: one step of the decoder.
        state: its state before the first, of N batch rows.
        longest: (N,) how many tokens a sequence may have, the end included. One that reaches it is taken as it is.
        start: the token before the first. end: the token after the last.
        beams: how many sequences are followed in a row; 1 is greedy.
        penalty: sequences are compared by log-likelihood / length^penalty: 0 favours short ones, 1 is the mean.

    Returns:
        For every row, at most `beams` sequences.

    Source: Wu et al., "Google's Neural Machine Translation System" (2016), section 7, with a plain power of the length.
    """
    check.whole("search: beams", beams, 1)
    check.finite("search: penalty", penalty)
    N, device = longest.shape[0], longest.device
    finished: list[list[Found]] = [[] for _ in range(N)]
    rows = torch.arange(N, device=device)  # those that are not done
    state = state.reorder(rows.repeat_interleave(beams))
    last = torch.full((N * beams,), start, device=device)
    tokens = torch.empty(N, beams, 0, dtype=torch.int64, device=device)
    # At first all beams of a row are the same: only one of them counts.
    total = torch.full((N, beams), -torch.inf, device=device)
    total[:, 0] = 0.0
    length = 0
    while rows.numel():
        length += 1
        scores, state = step(last, state)
        V = scores.shape[-1]
        grown = (total[..., None] + scores.float().log_softmax(-1).view(-1, beams, V)).flatten(1)
        # Twice as many as are kept: each of the beams may end.
        best, place = grown.topk(min(2 * beams, grown.shape[1]))
        beam, token = place // V, place % V
        ends = (token == end) | (length >= longest[rows])[:, None]
        _keep(finished, rows, tokens, best, beam, token, ends, end, length**penalty)
        # The first `beams` that go on; where there are too few, what is left has no chance.
        order = (
            torch.where(ends, token.shape[1], 0).add(torch.arange(token.shape[1], device=device)).argsort(-1)[:, :beams]
        )
        total = best.masked_fill(ends, -torch.inf).gather(1, order)
        beam, token = beam.gather(1, order), token.gather(1, order)
        tokens = torch.cat([tokens.gather(1, beam[..., None].expand(-1, -1, length - 1)), token[..., None]], -1)
        going = _going(finished, rows, total, longest, length, beams, penalty)
        kept = (torch.arange(rows.numel(), device=device)[:, None] * beams + beam)[going]
        state = state.reorder(kept.flatten())
        rows, total, tokens, last = rows[going], total[going], tokens[going], token[going].flatten()
    return [sorted(row, key=lambda found: -found.score)[:beams] for row in finished]


def _keep(
    finished: list[list[Found]], rows: Tensor, tokens: Tensor, best: Tensor, beam: Tensor, token: Tensor, ends: Tensor,
    end: int, norm: float,
) -> None:  # fmt: skip
    """Put down the sequences that end here."""
    for i, j in (ends & best.isfinite()).nonzero().tolist():
        sequence = [*tokens[i, beam[i, j]].tolist(), *([] if token[i, j] == end else [int(token[i, j])])]
        finished[int(rows[i])].append(Found(sequence, float(best[i, j]) / norm))


def _going(
    finished: list[list[Found]], rows: Tensor, total: Tensor, longest: Tensor, length: int, beams: int, penalty: float
) -> Tensor:
    """Which rows may still find something better (bool, one a row). A log-likelihood only falls; the most that becomes of it
    is itself over the greatest length.
    """
    norm = torch.clamp(longest[rows], min=length).double() ** penalty if penalty > 0 else float(length) ** penalty
    hope = total[:, 0].double() / norm
    worst = [sorted((f.score for f in finished[row]), reverse=True)[:beams] for row in rows.tolist()]
    bar = torch.tensor(
        [w[-1] if len(w) == beams else -torch.inf for w in worst], dtype=torch.float64, device=total.device
    )
    return hope > bar
