"""Every backend against the oracle: outputs, summaries and gradients, of every component by name, and of random problems."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support import oracle
from support.cases import BASE, CASES
from support.compare import BACKENDS, Reference, compare, compute_reference
from support.problems import Problem, fixed_choices, make_problem, problems

import regard


@functools.cache
def _case(name: str) -> tuple[Problem, Reference]:
    problem = make_problem(fixed_choices({**BASE, **CASES[name]}))
    return problem, compute_reference(problem)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", BACKENDS)
def test_component(kernel: str, name: str) -> None:
    problem, told = _case(name)
    compare(problem, kernel, told)


def _judge_all(problem: Problem) -> None:
    told = compute_reference(problem)
    for kernel in BACKENDS:
        compare(problem, kernel, told)


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("word", [regard.normalizer.Sparsemax(), regard.normalizer.Entmax(1.5)])
def test_one_large_weight_among_thousands_of_small_weights(
    word: regard.normalizer.Normalizer, dtype: torch.dtype, kernel: str
) -> None:
    """The accumulated rounding error of the small weights does not change the large one."""
    s = torch.randn(9, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-4
    s[:, 0] = torch.linspace(0.3, 0.9, 9)
    s = s.to(dtype)
    # The scores are the keys, the output is the first weight.
    q, v = s.new_ones(9, 1, 1), torch.zeros_like(s).index_fill(1, torch.tensor(0), 1.0)
    got = regard.attention(q, s[..., None], v[..., None], score=regard.score.Dot(), normalizer=word, backend=kernel)
    plain = oracle.sparsemax if isinstance(word, regard.normalizer.Sparsemax) else oracle.entmax
    torch.testing.assert_close(
        got[:, 0, 0], plain(s.double(), 0)[:, 0].to(dtype), rtol=8 * torch.finfo(dtype).eps, atol=0
    )


_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=100, derandomize=True, **_COMMON)  # type: ignore[arg-type]
@given(problems())
def test_random(problem: Problem) -> None:
    _judge_all(problem)


@pytest.mark.slow
@settings(max_examples=1500, **_COMMON)  # type: ignore[arg-type]
@given(problems())
def test_random_at_length(problem: Problem) -> None:
    _judge_all(problem)


@pytest.mark.parametrize("strip", [1, 50, 700])
@settings(max_examples=15, derandomize=True, **_COMMON)  # type: ignore[arg-type]
@given(problem=problems())
def test_small_row_blocks(strip: int, problem: Problem) -> None:
    """Row blocks and segments so small that groups of heads, rows and batch rows are split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regard.backends.tiled.row_block._BLOCK_SIZE", strip)
        patch.setattr("regard.backends.tiled.row_block._SEGMENT_SIZE", 40 * strip)
        patch.setattr("regard.backends.tiled.row_block._TILE", 16)
        compare(problem, "tiled", compute_reference(problem))
