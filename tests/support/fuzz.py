"""Random problems, as many as are asked for, by the native kernels and by the oracle: for libraries that watch over themselves
(tests/backends/cpu/test_sanitizers.py), and to run a problem of theirs once more.

    python tests/support/fuzz.py COUNT FIRST    # problems FIRST to FIRST + COUNT - 1, the same in every run
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # of `support`, and not the folder of this script

import torch
from support.compare import ask, fresh, gradients_of, judge, truth
from support.components import normalizer_names, score_names, unknown
from support.problems import DTYPES, LENGTHS, Problem, decided, make
from torch import Tensor

import regard
from regard.backends.cpu import extension

_PLAIN: dict[str, Any] = {
    "dtype": torch.float32, "L": 5, "S": 7, "B": 1, "heads": (1, 1), "D": 3, "E": 2, "score": "scaled_dot", "mask": None,
    "normalizer": "softmax", "bias": None, "softcap": None, "dropout": 0.0, "summary": None, "wild": None,
}  # fmt: skip
# Now and then three blocks of 192 keys, and more than the eight tiles of 64 queries that go through the keys together.
_LENGTHS = (*LENGTHS * 6, 523)
# Few heads, for most of the time is the oracle's; three, so that four threads have to share them.
_FEW: dict[str, Sequence[Any]] = {"heads": ((1, 1), (1, 2), (2, 1), (3, 1), (1, 3), (2, 2)), "B": (1, 2)}
# `tiled` takes the gradients of other summaries.
_SUMMARIES = (None, None, "lse", "all")


def served(problem: Problem) -> bool:
    leaves = {name: x.detach() for name, x in problem.tensors.items()}
    return regard.explain(**problem.ask(leaves)).reasons["cpu"] is None


def words() -> dict[str, Sequence[Any]]:
    """What is drawn from, by the name of the decision: of the words, those that the native kernels serve."""
    scores = [name for name in score_names() if name not in unknown()]
    tables: dict[str, Sequence[Any]] = {"dtype": DTYPES, "normalizer": normalizer_names(), "score": scores}
    known = {
        label: [x for x in table if served(make(decided({**_PLAIN, label: x})))] for label, table in tables.items()
    }
    return {**known, **_FEW, "L": _LENGTHS, "S": _LENGTHS, "summary": _SUMMARIES}


def problem(number: int, among: dict[str, Sequence[Any]]) -> Problem:
    """The problem of a number: one that the native kernels serve."""
    chance = random.Random(number)

    def pick(label: str, options: Sequence[Any]) -> Any:
        fit = among[label] if label in "LS" else [x for x in among.get(label, options) if x in options]
        return chance.choice(fit or list(options))

    while True:
        found = make(pick)
        if served(found):
            return found


def answers(of: Problem) -> list[Tensor]:
    """All outputs and gradients."""
    leaves = fresh(of)
    found = ask(of, "cpu", leaves)
    ones = {name: torch.ones_like(x) for name, x in found.items() if x.requires_grad}
    return [*found.values(), *gradients_of(found, ones, leaves).values()]


def run(count: int, first: int) -> None:
    """Raise an AssertionError at the first problem where an instruction set does not give what the oracle says, or does not
    give the same bits twice."""
    among, sets = words(), extension.instructions()
    for number in range(first, first + count):
        drawn, which = problem(number, among), sets[number % len(sets)]
        extension.ops.use(which)
        try:
            judge(drawn, "cpu", truth(drawn))
            for x, y in zip(answers(drawn), answers(drawn), strict=True):
                assert torch.equal(x.nan_to_num(), y.nan_to_num()), "the second time, the bits are others"
        except AssertionError as error:
            raise AssertionError(f"problem {number} by {which}: {drawn}") from error
        finally:
            extension.ops.use("")


if __name__ == "__main__":
    assert extension.missing is None, extension.missing
    torch.set_num_threads(1)
    run(*map(int, sys.argv[1:]))
    print(f"{sys.argv[1]} problems by {extension.__file__}")
