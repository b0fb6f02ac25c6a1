"""Compare random problems on the native kernels to the reference; used with sanitized libraries
(tests/backends/cpu/test_sanitizers.py), and to rerun one of their problems.

    python tests/support/fuzz.py COUNT FIRST    # problems FIRST to FIRST + COUNT - 1, the same in every run
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # the parent of `support` instead of the folder of this script

import torch
from support.compare import compare, compute_reference, gradients_of, new_leaves, run_backend
from support.components import normalizer_names, score_names, scores_without_oracle
from support.problems import DTYPES, LENGTHS, Problem, fixed_choices, make_problem
from torch import Tensor

import regard
from regard.backends.cpu import extension

_PLAIN: dict[str, Any] = {
    "dtype": torch.float32, "L": 5, "S": 7, "B": 1, "heads": (1, 1), "D": 3, "E": 2, "score": "scaled_dot", "mask": None,
    "normalizer": "softmax", "bias": None, "softcap": None, "dropout": 0.0, "summary": None, "nonfinite": None,
}  # fmt: skip
# Occasionally three blocks of 192 keys, and more than the eight tiles of 64 queries of a super-tile.
_LENGTHS = (*LENGTHS * 6, 523)
# Few heads, since the reference takes most of the time; three, so that four threads have to split them.
_FEW: dict[str, Sequence[Any]] = {"heads": ((1, 1), (1, 2), (2, 1), (3, 1), (1, 3), (2, 2)), "B": (1, 2)}
# `tiled` computes the gradients of other summaries.
_SUMMARIES = (None, None, "lse", "all")


def is_served(problem: Problem) -> bool:
    leaves = {name: x.detach() for name, x in problem.tensors.items()}
    return regard.explain(**problem.arguments(leaves)).reasons["cpu"] is None


def choices() -> dict[str, Sequence[Any]]:
    """Return the options of each choice: of the components, those that the native kernels support."""
    scores = [name for name in score_names() if name not in scores_without_oracle()]
    tables: dict[str, Sequence[Any]] = {"dtype": DTYPES, "normalizer": normalizer_names(), "score": scores}
    known = {
        label: [x for x in table if is_served(make_problem(fixed_choices({**_PLAIN, label: x})))]
        for label, table in tables.items()
    }
    return {**known, **_FEW, "L": _LENGTHS, "S": _LENGTHS, "summary": _SUMMARIES}


def problem(number: int, among: dict[str, Sequence[Any]]) -> Problem:
    """Return the problem with this number, one that the native kernels support."""
    generator = random.Random(number)

    def pick(label: str, options: Sequence[Any]) -> Any:
        fit = among[label] if label in "LS" else [x for x in among.get(label, options) if x in options]
        return generator.choice(fit or list(options))

    while True:
        drawn = make_problem(pick)
        if is_served(drawn):
            return drawn


def results(of: Problem) -> list[Tensor]:
    """Return all outputs and gradients."""
    leaves = new_leaves(of)
    outputs = run_backend(of, "cpu", leaves)
    ones = {name: torch.ones_like(x) for name, x in outputs.items() if x.requires_grad}
    return [*outputs.values(), *gradients_of(outputs, ones, leaves).values()]


def run(count: int, first: int) -> None:
    """Raise an AssertionError at the first problem where the results of an instruction set disagree with the reference, or
    are not bitwise reproducible.
    """
    among, sets = choices(), extension.instructions()
    for number in range(first, first + count):
        drawn, which = problem(number, among), sets[number % len(sets)]
        extension.ops.use(which)
        try:
            compare(drawn, "cpu", compute_reference(drawn))
            for x, y in zip(results(drawn), results(drawn), strict=True):
                assert torch.equal(x.nan_to_num(), y.nan_to_num()), "the results are not bitwise reproducible"
        except AssertionError as error:
            raise AssertionError(f"problem {number} by {which}: {drawn}") from error
        finally:
            extension.ops.use("")


if __name__ == "__main__":
    assert extension.missing is None, extension.missing
    torch.set_num_threads(1)
    run(*map(int, sys.argv[1:]))
    print(f"{sys.argv[1]} problems by {extension.__file__}")
