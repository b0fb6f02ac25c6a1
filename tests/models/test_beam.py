"""Beam search against exhaustive search."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from regard.models.beam import Hypothesis, beam_search

_START, _END, _V = 5, 1, 4


@dataclass
class Prefixes:
    """A state that holds the prefix and the batch row."""

    row: Tensor  # (N,)
    prefix: list[tuple[int, ...]]

    def reorder(self, rows: Tensor) -> Prefixes:
        return Prefixes(self.row[rows], [self.prefix[i] for i in rows.tolist()])


def _scores(row: int, prefix: tuple[int, ...]) -> Tensor:
    """Return pseudorandom logits that depend on the prefix and the row."""
    seed = 1000 * row + sum((token + 1) * 7**i for i, token in enumerate(prefix))
    return 2 * torch.randn(_V, generator=torch.Generator().manual_seed(seed))


def _step(tokens: Tensor, state: Prefixes) -> tuple[Tensor, Prefixes]:
    prefix = [(*before, token) for before, token in zip(state.prefix, tokens.tolist(), strict=True)]
    scores = torch.stack([_scores(row, p) for row, p in zip(state.row.tolist(), prefix, strict=True)])
    return scores, Prefixes(state.row, prefix)


def _all(row: int, longest: int, penalty: float) -> list[Hypothesis]:
    """Return all sequences, best first."""
    found = []
    for length in range(1, longest + 1):
        for sequence in itertools.product(range(_V), repeat=length):
            if _END in sequence[:-1] or (sequence[-1] != _END and length < longest):
                continue
            score, prefix = 0.0, (_START,)
            for token in sequence:
                score += float(_scores(row, prefix).log_softmax(-1)[token])
                prefix = (*prefix, token)
            tokens = list(sequence[:-1]) if sequence[-1] == _END else list(sequence)
            found.append(Hypothesis(tokens, score / length**penalty))
    return sorted(found, key=lambda one: -one.score)


def _start(rows: int) -> Prefixes:
    return Prefixes(torch.arange(rows), [()] * rows)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_exhaustive_beam_finds_optimum(penalty: float) -> None:
    longest = torch.tensor([4, 1, 3])
    found = beam_search(_step, _start(3), longest, start=_START, end=_END, beams=100, penalty=penalty)
    for row, best in enumerate(found):
        every = _all(row, int(longest[row]), penalty)
        for got, expected in zip(best[:10], every[:10], strict=len(every) >= 10):
            assert got.tokens == expected.tokens
            assert math.isclose(got.score, expected.score, rel_tol=1e-5)


def test_single_beam_is_greedy_search() -> None:
    found = beam_search(_step, _start(6), torch.full((6,), 9), start=_START, end=_END, beams=1)
    for row, (best,) in enumerate(found):
        prefix: tuple[int, ...] = (_START,)
        while len(prefix) < 10 and (token := int(_scores(row, prefix).argmax())) != _END:
            prefix = (*prefix, token)
        assert best.tokens == list(prefix[1:])


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_batch_rows_are_independent(beams: int) -> None:
    longest = torch.tensor([7, 2, 5, 9, 1])
    together = beam_search(_step, _start(5), longest, start=_START, end=_END, beams=beams)
    for row in range(5):
        state = Prefixes(torch.tensor([row]), [()])
        (alone,) = beam_search(_step, state, longest[row : row + 1], start=_START, end=_END, beams=beams)
        assert [one.tokens for one in alone] == [one.tokens for one in together[row]]
        assert len(alone) <= beams
        assert all(len(one.tokens) <= longest[row] for one in alone)
        assert [one.score for one in alone] == sorted((one.score for one in alone), reverse=True)


def test_more_beams_do_not_lower_score() -> None:
    scores = [
        [
            row[0].score
            for row in beam_search(_step, _start(20), torch.full((20,), 6), start=_START, end=_END, beams=beams)
        ]
        for beams in (1, 4, 64)
    ]
    assert sum(scores[0]) < sum(scores[1]) <= sum(scores[2])


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ValueError, match="beam_search: beams is 0; expected an integer >= 1"):
        beam_search(_step, _start(1), torch.tensor([3]), start=_START, end=_END, beams=0)
    with pytest.raises(ValueError, match="search: penalty is nan; expected a finite number"):
        beam_search(_step, _start(1), torch.tensor([3]), start=_START, end=_END, penalty=math.nan)
