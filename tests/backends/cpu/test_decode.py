"""Decoding, a few queries and many keys, by the native kernels: the way that reads each key once for all heads of a group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from support.budget import OverBudgetError
from support.compare import ask, judge_output, judge_top, measured_again, truth
from support.cpu import COMMON, NATIVE, SETS, why_not
from support.problems import Problem, problems
from torch import Tensor

import regard
from regard import Summary, mask, normalizer, position
from regard.backends.cpu import extension

# Floats a register: so many lanes would be idle, or not.
_LANES = {"avx512_bf16": 16, "avx512": 16, "avx2": 8, "baseline": 4}


@pytest.fixture(params=SETS)
def instructions(request: Any) -> Iterator[str]:
    extension.ops.use(request.param)
    yield request.param
    extension.ops.use("")


# One split and several, with ends of all kinds; rows that are read as they lie and rows that are not; more rows than a
# task has.
_AMONG = {
    **NATIVE,
    "summary": (None, "lse", "max", "entropy", "top"),
    "dropout": (0.0,),
    "L": (1, 1, 2, 4, 7, 8),
    "S": (5, 67, 131, 515, 1301),
    "heads": ((1, 1), (3, 1), (2, 2), (2, 3), (1, 4), (1, 7), (1, 35)),
    "B": (1, 2),
    "D": (3, 16, 24, 32, 64),
    "E": (2, 16, 32, 40, 96),
}


def _judge_last(problem: Problem) -> None:
    """What a problem gives when no gradients are to follow, against the oracle."""
    if why_not(problem) is not None:
        return
    told = truth(problem)
    with torch.no_grad():
        found = ask(problem, "cpu", problem.tensors)
    for again in (False, True):
        try:
            for name in told.cotangents:
                judge_output(problem, name, found[name], told)
            break
        except OverBudgetError:
            if again:
                raise
            told = measured_again(problem, told)
    if "top_keys" in found:
        judge_top(problem, found["top_weights"], found["top_keys"], told)


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=150, derandomize=True, **COMMON)  # type: ignore[arg-type]
@given(problem=problems(among=_AMONG))
def test_random(name: str, problem: Problem) -> None:
    extension.ops.use(name)
    try:
        _judge_last(problem)
    finally:
        extension.ops.use("")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
@settings(max_examples=2000, **COMMON)  # type: ignore[arg-type]
@given(problem=problems(among=_AMONG))
def test_random_at_length(name: str, problem: Problem) -> None:
    test_random.hypothesis.inner_test(name, problem)  # type: ignore[attr-defined]


def _qkv(B: int, L: int, S: int, heads: tuple[int, int], D: int = 64, E: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, heads[0], L, D), (B, heads[1], S, D), (B, heads[1], S, E))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _decoded() -> int:
    return int(extension.ops.decoded())


@pytest.mark.parametrize("L", [1, 2, 4, 8, 9])
@pytest.mark.parametrize("S", [16, 700])
def test_it_is_what_runs(L: int, S: int, instructions: str) -> None:
    """Up to a quarter of the lanes; of a half, where there are keys enough. Not with dropout, and not where
    another pass over the scores is to follow.
    """
    q, k, v = _qkv(1, L, S, (4, 2))
    lanes = _LANES[instructions]
    for words, expected in (
        ({}, lanes >= 4 * L or (lanes >= 2 * L and S >= 64)),
        ({"dropout": 0.5, "seed": 1}, False),
        ({"summary": Summary(received=True)}, False),
    ):
        before = _decoded()
        regard.attention(q, k, v, **words, backend="cpu")
        assert _decoded() - before == expected


_S = 3000
_WORDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": mask.causal(align="end")},
    "window": {"mask": mask.causal(align="end") & mask.window(1100, None, align="end")},
    "lengths": {"mask": mask.lengths(torch.tensor([_S - 7, 600, 0]))},
    "documents": {"mask": mask.documents((torch.tensor([3, 3]), torch.arange(_S) // 700))},
    "of the heads": {"mask": mask.blocks(torch.arange(6 * 4).view(6, 1, 4) % 5 > 1, (2, 750))},
    "bias": {"bias": torch.randn(3, 1, 2, _S, generator=torch.Generator().manual_seed(1)).bfloat16()},
    "bias, keys last": {"bias": torch.randn(_S, 2, generator=torch.Generator().manual_seed(1)).T},
    "ALiBi": {"bias": position.ALiBi(align="end"), "mask": mask.causal(align="end")},
    "softcap, sink": {"softcap": 2.0, "normalizer": normalizer.Softmax(torch.arange(6.0))},
    "sigmoid": {"normalizer": normalizer.Sigmoid(-7.0), "mask": mask.lengths(torch.tensor([_S - 7, 600, 0]))},
}


@pytest.fixture(params=[1, 2])
def threads(request: Any) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", _WORDS)
@pytest.mark.parametrize("heads", [(6, 2), (6, 6)])
def test_many_splits(name: str, heads: tuple[int, int], threads: int) -> None:
    """Every word over several splits of the keys."""
    words = _WORDS[name]
    tensors = _qkv(3, 2, _S, heads)
    sigmoid = name == "sigmoid"
    summary = Summary(lse=not sigmoid, entropy=not sigmoid, max=True, top=5)
    before, found = _decoded(), []
    for kernel in ("cpu", "tiled"):
        out, seen = regard.attention(*tensors, **words, summary=summary, backend=kernel)
        found.append([out, seen.max, seen.top.weights, *([] if sigmoid else [seen.lse, seen.entropy])])
        found[-1].append(seen.top.keys.float())
    assert _decoded() == before + 1
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


def _bits(q: Tensor, k: Tensor, v: Tensor, summary: Summary | None, **words: Any) -> list[Tensor]:
    found = regard.attention(q, k, v, **words, summary=summary, backend="cpu")
    if summary is None:
        return [found]
    out, seen = found
    return [out, seen.lse, seen.max, seen.entropy, *seen.top]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits(dtype: torch.dtype) -> None:
    """Every time, on any number of threads, wherever in a batch, and whatever else is asked for: splits go by the sizes of
    the problem alone, and are merged in their order.
    """
    q, k, v = (x.to(dtype) for x in _qkv(5, 1, 9000, (8, 2)))
    words: dict[str, Any] = {"mask": mask.prefix(8500), "softcap": 4.0}
    summary = Summary(lse=True, max=True, entropy=True, top=4)
    before, count = _decoded(), torch.get_num_threads()
    first = _bits(q, k, v, summary, **words)
    try:
        for threads in (1, 2, 3, 2, 2, 2):
            torch.set_num_threads(threads)
            assert all(torch.equal(x, y) for x, y in zip(first, _bits(q, k, v, summary, **words), strict=True))
    finally:
        torch.set_num_threads(count)
    for row in range(5):
        alone = _bits(*(x[row : row + 1] for x in (q, k, v)), summary, **words)
        assert all(torch.equal(x[row : row + 1], y) for x, y in zip(first, alone, strict=True))
    assert torch.equal(first[0], _bits(q, k, v, None, **words)[0])
    assert _decoded() == before + 13


def test_what_is_masked_is_not_read(instructions: str) -> None:
    """Of runs of keys that nobody may attend to; elsewhere, -inf takes the place of what was computed."""
    q, k, v = _qkv(2, 1, 1500, (4, 2))
    n = torch.tensor([700, 64])
    for dirty in (torch.nan, torch.inf, 3e38):
        nonfinite_k, bad_v = k.clone(), v.clone()
        for row, end in enumerate(n):
            nonfinite_k[row, :, end:], bad_v[row, :, end + 64 :] = dirty, dirty
        words = {
            "weight": None,
            "pairs": True,
            "key_bias": None,
            "query_bias": None,
            "bias": None,
            "relative": None,
            "sink": None,
        }
        words |= {"mask_tensors": [n.view(2, 1)], "mask": [1, 0, 0, 0, 0, 0, -1, 0], "scale": 0.1, "softcap": 0.0}
        words |= {"normalizer": 0, "alpha": 2.0, "dropout": 0.0, "seed": 0, "top": 0}
        words |= {"member": None, "numbers": [], "wanted": 7 + 8}
        before = _decoded()
        clean, dirty_ = (extension.ops.forward(q, *pair, **words) for pair in ((k, v), (nonfinite_k, bad_v)))
        assert _decoded() == before + 2
        assert all(torch.equal(x, y) for x, y in zip(clean, dirty_, strict=True))
        # The whole way, with values too.
        bad_v = torch.where(torch.arange(1500)[:, None] < n[:, None, None, None], v, dirty)
        out = regard.attention(q, nonfinite_k, bad_v, mask=mask.lengths(n))
        torch.testing.assert_close(out, regard.attention(q, k, v, mask=mask.lengths(n)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("S", [9, 1500])
def test_a_nan_that_is_seen_stays_one(S: int, instructions: str) -> None:
    q, k, v = _qkv(1, 1, S, (4, 2))
    k[0, 1, S // 2, 3] = torch.nan
    before = _decoded()
    for word in (normalizer.Softmax(), normalizer.Sigmoid()):
        out = regard.attention(q, k, v, normalizer=word, backend="cpu")
        assert bool(out[0, :2].isfinite().all())
        assert bool(out[0, 2:].isnan().all())
    assert _decoded() == before + 2
