"""The native decoding kernel: few queries, many keys, each key read once for all query heads of its group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from support.budget import OverBudgetError
from support.compare import compare_output, compare_top, compute_reference, remeasure_baseline, run_backend
from support.cpu import COMMON, NATIVE, ROWS, SETS, requested, why_not
from support.problems import Problem, problems
from torch import Tensor

import regard
from regard import Summary, mask, normalizer, position
from regard.backends.cpu import extension
from regard.backends.cpu.pack import pack
from regard.plan.assemble import make_problem

# Floats per register.
_LANES = {"avx512_bf16": 16, "avx512": 16, "avx2": 8, "baseline": 4}


# One or several splits, with partial last splits; rows read in place and rows that are copied; more rows than a task has.
_AMONG = {
    **NATIVE,
    "summary": (None, "lse", "max", "entropy", "top", "received", "mass", "rows", "full", "all"),
    "dropout": (0.0,),
    "L": (1, 1, 2, 4, 7, 8),
    "S": (5, 67, 131, 515, 1301),
    "heads": ((1, 1), (3, 1), (2, 2), (2, 3), (1, 4), (1, 7), (1, 35)),
    "B": (1, 2),
    "D": (3, 16, 24, 32, 64),
    "E": (2, 16, 32, 40, 96),
}


def _compare_without_grad(problem: Problem) -> None:
    """Compare the outputs without gradients to the reference."""
    if why_not(problem) is not None:
        return
    reference = compute_reference(problem)
    with torch.no_grad():
        outputs = run_backend(problem, "cpu", problem.tensors)
    for is_retry in (False, True):
        try:
            for name in reference.cotangents:
                compare_output(problem, name, outputs[name], reference)
            break
        except OverBudgetError:
            if is_retry:
                raise
            reference = remeasure_baseline(problem, reference)
    if "top_keys" in outputs:
        compare_top(problem, outputs["top_weights"], outputs["top_keys"], reference)


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=40, derandomize=True, **COMMON)  # type: ignore[arg-type]
@given(problem=problems(among=_AMONG))
def test_random_problems(name: str, problem: Problem) -> None:
    extension.ops.use(name)
    try:
        _compare_without_grad(problem)
    finally:
        extension.ops.use("")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
@settings(max_examples=2000, **COMMON)  # type: ignore[arg-type]
@given(problem=problems(among=_AMONG))
def test_many_random_problems(name: str, problem: Problem) -> None:
    test_random_problems.hypothesis.inner_test(name, problem)  # type: ignore[attr-defined]


def _qkv(B: int, L: int, S: int, heads: tuple[int, int], D: int = 64, E: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, heads[0], L, D), (B, heads[1], S, D), (B, heads[1], S, E))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _decode_count() -> int:
    return int(extension.ops.decode_count())


@pytest.mark.parametrize("L", [1, 2, 4, 8, 9])
@pytest.mark.parametrize("S", [16, 700])
def test_decode_kernel_is_selected(L: int, S: int, instructions: str) -> None:
    """Up to a quarter of the lanes, or half of them with enough keys; never with dropout. Statistics that need all weights:
    one query.
    """
    q, k, v = _qkv(1, L, S, (4, 2))
    lanes = _LANES[instructions]
    for arguments, expected in (
        ({}, lanes >= 4 * L or (lanes >= 2 * L and S >= 64)),
        ({"dropout": 0.5, "seed": 1}, False),
        ({"summary": Summary(received=True)}, L == 1),
    ):
        before = _decode_count()
        regard.attention(q, k, v, **arguments, backend="cpu")
        assert _decode_count() - before == expected


_S = 3000
_ARGUMENTS: dict[str, dict[str, Any]] = {
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


@pytest.mark.parametrize("name", _ARGUMENTS)
@pytest.mark.parametrize("heads", [(6, 2), (6, 6)])
def test_all_components_over_many_splits(name: str, heads: tuple[int, int], threads: int) -> None:
    arguments = _ARGUMENTS[name]
    tensors = _qkv(3, 2, _S, heads)
    sigmoid = name == "sigmoid"
    summary = Summary(lse=not sigmoid, entropy=not sigmoid, max=True, top=5)
    before, results = _decode_count(), []
    for backend in ("cpu", "tiled"):
        out, got = regard.attention(*tensors, **arguments, summary=summary, backend=backend)
        results.append([out, got.max, got.top.weights, *([] if sigmoid else [got.lse, got.entropy])])
        results[-1].append(got.top.keys.float())
    assert _decode_count() == before + 1
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in _ARGUMENTS if name not in ("bias", "bias, keys last", "documents")])
def test_all_weights_of_one_query_over_many_splits(name: str, threads: int) -> None:
    arguments, tensors = _ARGUMENTS[name], _qkv(3, 1, _S, (6, 2))
    if name == "of the heads":
        arguments = {"mask": mask.blocks(torch.arange(6 * 4).view(6, 1, 4) % 5 > 1, (1, 750))}
    member = torch.arange(_S) % torch.tensor([[2], [7], [5000]]) == 1
    summary = Summary(received=True, full=True, rows=(0, -1), mass=member)
    before, results = _decode_count(), []
    for backend in ("cpu", "tiled"):
        _, got = regard.attention(*tensors, **arguments, summary=summary, backend=backend)
        results.append([got.received, got.full, got.rows, got.mass])
    assert _decode_count() == before + 1
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-7)
    received, full, rows, mass = results[0]
    assert torch.equal(received, full[:, :, 0])
    assert torch.equal(rows, full.expand(-1, -1, 2, -1))
    torch.testing.assert_close(mass, full @ member.T.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top", [1, 4, 15, 16, 17, 40])
def test_largest_weights_among_equal_and_masked_scores(top: int, instructions: str) -> None:
    """The bound from the largest score of each lane keeps ties, and does not count masked keys."""
    q = torch.ones(1, 1, 1, 1)
    for values in (torch.zeros(600), torch.arange(600) % 3, torch.arange(600), -torch.arange(600)):
        k = values.float().view(1, 1, -1, 1) / 100
        for n in (600, 20, 3):
            _, got = regard.attention(
                q, k, k, mask=mask.lengths(torch.tensor([n])), summary=Summary(top=top), backend="cpu"
            )
            expected = torch.nn.functional.pad(k[..., :n, 0].softmax(-1), (0, max(top - n, 0))).sort(-1, True)[0]
            torch.testing.assert_close(got.top.weights[:, :, 0], expected[..., :top], rtol=1e-5, atol=0)
            keys = got.top.keys[0, 0, 0]
            assert len(set(keys[: min(top, n)].tolist())) == min(top, n)
            assert bool((keys[:n] >= 0).all()) and bool((keys[:n] < n).all()) and bool((keys[n:] == -1).all())


def _outputs(q: Tensor, k: Tensor, v: Tensor, summary: Summary | None, **arguments: Any) -> list[Tensor]:
    result = regard.attention(q, k, v, **arguments, summary=summary, backend="cpu")
    if summary is None:
        return [result]
    out, got = result
    return [out, got.lse, got.max, got.entropy, *got.top, got.received]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_bitwise_reproducible(dtype: torch.dtype) -> None:
    """For any number of threads, batch and summary: splits depend on sizes only, and are merged in order."""
    q, k, v = (x.to(dtype) for x in _qkv(5, 1, 9000, (8, 2)))
    arguments: dict[str, Any] = {"mask": mask.prefix(8500), "softcap": 4.0}
    summary = Summary(lse=True, max=True, entropy=True, top=4, received=True)
    before, count = _decode_count(), torch.get_num_threads()
    first = _outputs(q, k, v, summary, **arguments)
    try:
        for threads in (1, 2, 3, 2, 2, 2):
            torch.set_num_threads(threads)
            assert all(torch.equal(x, y) for x, y in zip(first, _outputs(q, k, v, summary, **arguments), strict=True))
    finally:
        torch.set_num_threads(count)
    for row in range(5):
        alone = _outputs(*(x[row : row + 1] for x in (q, k, v)), summary, **arguments)
        assert all(torch.equal(x[row : row + 1], y) for x, y in zip(first, alone, strict=True))
    assert torch.equal(first[0], _outputs(q, k, v, None, **arguments)[0])
    assert _decode_count() == before + 13


def test_nonfinite_masked_keys_do_not_change_results(instructions: str) -> None:
    """Fully masked blocks are not read; elsewhere, -inf replaces the computed score."""
    q, k, v = _qkv(2, 1, 1500, (4, 2))
    n = torch.tensor([700, 64])
    for value in (torch.nan, torch.inf, 3e38):
        nonfinite_k, nonfinite_v = k.clone(), v.clone()
        for row, end in enumerate(n):
            nonfinite_k[row, :, end:], nonfinite_v[row, :, end + 64 :] = value, value
        score = regard.score.Product(scale=0.1)
        problem = make_problem(q, k, v, score, None, mask.lengths(n), None, None, 0.0, None, None)
        parameters = problem.tensors[3:]
        before = _decode_count()
        clean, masked = (
            extension.ops.forward(*pack(problem.plan, (q, *pair, *parameters))[1], *requested(*ROWS, is_last=True))
            for pair in ((k, v), (nonfinite_k, nonfinite_v))
        )
        assert _decode_count() == before + 2
        assert all(torch.equal(x, y) for x, y in zip(clean, masked, strict=True))
        # The same through `attention`, with all masked values.
        nonfinite_v = torch.where(torch.arange(1500)[:, None] < n[:, None, None, None], v, value)
        out = regard.attention(q, nonfinite_k, nonfinite_v, mask=mask.lengths(n))
        torch.testing.assert_close(out, regard.attention(q, k, v, mask=mask.lengths(n)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("S", [9, 1500])
def test_nan_in_attended_key_propagates(S: int, instructions: str) -> None:
    q, k, v = _qkv(1, 1, S, (4, 2))
    k[0, 1, S // 2, 3] = torch.nan
    before = _decode_count()
    for kind in (normalizer.Softmax(), normalizer.Sigmoid()):
        out = regard.attention(q, k, v, normalizer=kind, backend="cpu")
        assert bool(out[0, :2].isfinite().all())
        assert bool(out[0, 2:].isnan().all())
    assert _decode_count() == before + 2
