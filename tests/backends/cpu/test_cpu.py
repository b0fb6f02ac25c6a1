"""The native CPU kernels: every supported component against the reference, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from support.cases import BASE, CASES
from support.compare import compare, compute_reference
from support.cpu import COMMON, NATIVE, SETS, why_not
from support.problems import Problem, fixed_choices, make_problem, problems

import regard
from regard import Summary, mask, normalizer, position, score
from regard.backends.cpu import backend as cpu
from regard.backends.cpu import extension


def test_native_kernels_are_available() -> None:
    """Without a compiler this test fails; most tests below would be skipped."""
    assert extension.missing is None
    assert SETS[-1] == "baseline" or SETS[0] == "baseline"


# Unsupported problems, by a part of the reason.
_REFUSED = {
    "float64": {"dtype": torch.float64},
    "FunctionScore": {"score": "lambda", "L": 5, "S": 7, "heads": (1, 1)},
    "the mask Where": {"mask": "a", "mask a": "where"},
    "64 largest": {"summary": "top", "top": 90},
    "NaN or inf": {"mask": "a", "mask a": "causal", "nonfinite": "masked", "align": -3},
}


@pytest.mark.parametrize("reason", _REFUSED)
def test_unsupported_problem_is_refused(reason: str) -> None:
    problem = make_problem(fixed_choices({**BASE, "summary": None, **_REFUSED[reason]}))
    message = why_not(problem)
    assert message is not None and reason in message, message
    with pytest.raises(ValueError, match="backend is 'cpu', which cannot serve this problem"):
        regard.attention(**problem.arguments(problem.tensors), backend="cpu")


def _served() -> list[Any]:
    """Return each supported case with its summary and without any, where the native kernels compute the gradients."""
    cases = []
    for name, choices in CASES.items():
        for summary in (choices.get("summary", "all"), None):
            case = {**BASE, **choices, "summary": summary}
            reason = why_not(make_problem(fixed_choices(case)))
            if reason is None:
                cases.append(pytest.param(case, id=f"{name}, {summary}"))
    return cases


_SERVED = _served()


def test_most_cases_are_supported() -> None:
    assert len(_SERVED) > 150


@pytest.mark.parametrize("case", _SERVED)
def test_component(case: dict[str, Any], instructions: str) -> None:
    problem = make_problem(fixed_choices(case))
    compare(problem, "cpu", compute_reference(problem))


# bf16 dot products, on machines that have them: even widths, odd sequence lengths.
_needs_bf16_dot = pytest.mark.skipif(SETS[0] != "avx512_bf16", reason="this machine has no bf16 dot products")
_BF16 = {"dtype": torch.bfloat16, "D": 10, "E": 6}


@_needs_bf16_dot
@pytest.mark.parametrize("case", _SERVED)
def test_component_with_bf16_dot(case: dict[str, Any]) -> None:
    problem = make_problem(fixed_choices({**case, **_BF16}))
    compare(problem, "cpu", compute_reference(problem))


@_needs_bf16_dot
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_bf16_dot_is_selected(dropout: float) -> None:
    """Results round differently than with float32 products; for odd widths they are the same."""
    for D, E, same in ((10, 6, False), (10, 7, True), (11, 6, True)):
        results = []
        for name in ("avx512_bf16", "avx512"):
            extension.ops.use(name)
            q, k, v = (x.detach().bfloat16().requires_grad_() for x in _qkv(70, 83, D=D, E=E))
            out = regard.attention(q, k, v, dropout=dropout, seed=1, backend="cpu")
            results.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v])])
        extension.ops.use("")
        assert all(torch.equal(x, y) == same for x, y in zip(*results, strict=True))


def _compare_if_supported(problem: Problem) -> None:
    if why_not(problem) is None:
        compare(problem, "cpu", compute_reference(problem))


def test_uninitialized_memory_is_not_read(instructions: str) -> None:
    """Of a key that only some queries of a tile attend to, nothing is computed for the others."""
    q, k, v = (torch.randn(1, 3, 131, 2, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    arguments: dict[str, Any] = {"mask": mask.causal(), "normalizer": normalizer.Entmax(1.5), "softcap": 5.0}
    for size in range(20_000, 200_000, 10_000):
        torch.full((size,), torch.nan)  # freed at once
        out = regard.attention(q, k, v, **arguments, backend="cpu")
        assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=80, derandomize=True, **COMMON)  # type: ignore[arg-type]
@given(problem=problems(among=NATIVE))
def test_random_problems(name: str, problem: Problem) -> None:
    extension.ops.use(name)
    try:
        _compare_if_supported(problem)
    finally:
        extension.ops.use("")


@_needs_bf16_dot
@settings(max_examples=120, derandomize=True, **COMMON)  # type: ignore[arg-type]
@given(problem=problems(among=NATIVE | {"dtype": (torch.bfloat16,), "D": (2, 10, 34), "E": (2, 6, 18)}))
def test_random_problems_with_bf16_dot(problem: Problem) -> None:
    _compare_if_supported(problem)


@pytest.mark.slow
@settings(max_examples=3000, **COMMON)  # type: ignore[arg-type]
@given(problems(among=NATIVE))
def test_many_random_problems(problem: Problem) -> None:
    _compare_if_supported(problem)


def _qkv(L: int = 300, S: int = 300, heads: tuple[int, int] = (4, 2), D: int = 24, E: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads[0], L, D), (2, heads[1], S, D), (2, heads[1], S, E))
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Several blocks of keys, several super-tiles of queries, and several splits of a head.
_LONG: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": mask.causal(align="end")},
    "window": {"mask": mask.causal(align="end") & mask.window(70, None)},
    "documents": {"mask": mask.documents((torch.arange(700) // 90, torch.arange(900) // 90))},
    "bias": {},
    "bias of the keys": {},
    "ALiBi": {"bias": position.ALiBi(torch.tensor([0.5, 0.25]), align="end")},
    "sink and softcap": {"normalizer": normalizer.Softmax(sink=0.3), "softcap": 3.0},
    "additive": {"mask": mask.causal(align="end")},
    "dropout": {"mask": mask.causal(align="end"), "dropout": 0.1, "seed": 7},
    "Gaussian": {"score": score.Gaussian(4.0)},
}


def _check(references: list[torch.Tensor], baselines: list[torch.Tensor], results: list[torch.Tensor]) -> None:
    """The maximum error is at most twice that of the float32 baseline, plus four units of the largest element."""
    for reference, baseline, got in zip(references, baselines, results, strict=True):
        unit = reference.abs().max().item() * torch.finfo(torch.float32).eps
        assert (got - reference).abs().max() <= 2 * (baseline - reference).abs().max() + 4 * unit + 1e-37


@pytest.mark.parametrize("name", _LONG)
@pytest.mark.parametrize("heads", [(2, 1), (2, 2)])
@pytest.mark.parametrize("threads", [1, 2, 3])  # three: heads have to be split
def test_long_sequences(name: str, heads: tuple[int, int], threads: int) -> None:
    tensors, parameters = _qkv(700, 900, heads), {}
    generator = torch.Generator().manual_seed(1)
    if name == "bias":
        parameters = {"bias": torch.randn(700, 900, generator=generator)}
    elif name == "bias of the keys":
        parameters = {"bias": torch.randn(900, generator=generator)}
    elif name == "additive":
        parameters = {"score": torch.randn(heads[0], 24, generator=generator)}
    with _threads(threads):
        results = [
            _with_gradients([*tensors, *parameters.values()], name, backend, dtype)
            for backend, dtype in (("tiled", torch.float64), ("tiled", torch.float32), ("cpu", torch.float32))
        ]
    _check(*results)


_MASKS: dict[str, mask.Mask | None] = {
    "none": None,
    "causal": mask.causal(align="end"),
    "window": mask.window(30, 5, align="end"),
    "lengths": mask.lengths(torch.tensor([37, 300])),
    "stripes": mask.dense(torch.arange(300) % 100 < 3),
}


@pytest.mark.parametrize("name", _MASKS)
@pytest.mark.parametrize("kind", [normalizer.Softmax(sink=0.5), normalizer.Sigmoid(), normalizer.Entmax(1.5)])
@pytest.mark.parametrize("threads", [1, 3])  # three split a single head: `received` is a sum of three
def test_weight_summaries(name: str, kind: Any, threads: int, instructions: str) -> None:
    q, k, v = (x.detach() for x in _qkv(150, 300, (2, 1) if threads == 1 else (1, 1)))
    groups = torch.arange(300) % 7 == torch.arange(3)[:, None]
    arguments: dict[str, Any] = {"normalizer": kind, "mask": _MASKS[name], "dropout": 0.2, "seed": 1}
    summary = Summary(received=True, mass=groups, rows=(0, 70, -1), full=True)
    results = []
    for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32)):
        with _threads(threads):
            out, got = regard.attention(
                *(x.to(dtype) for x in (q, k, v)), **arguments, backend=backend, summary=summary
            )
        results.append([out, got.received, got.mass, got.rows, got.full])
    _check(*results)


def _with_gradients(
    tensors: list[torch.Tensor], name: str, backend: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    leaves, arguments = [x.detach().to(dtype).requires_grad_() for x in tensors], dict(_LONG[name])
    for x in leaves[3:]:
        arguments |= {"score": score.Additive(x)} if name == "additive" else {"bias": x}
    out, got = regard.attention(*leaves[:3], **arguments, backend=backend, summary=Summary(lse=True))
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype) for x in (out, got.lse)]
    return [out, got.lse, *torch.autograd.grad([out, got.lse], leaves, weights)]


def _additive(q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor) -> list[list[torch.Tensor]]:
    """Return output, log-sum-exp and gradients: the float64 reference, the float32 baseline, and the native kernels."""
    v, results = torch.randn(1, 2, 83, 5, generator=torch.Generator().manual_seed(3)), []
    for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, weight)]
        out, got = regard.attention(
            *leaves[:3], score=score.Additive(leaves[3]), summary=Summary(lse=True), backend=backend
        )
        results.append([out, got.lse, *torch.autograd.grad(out.square().sum() + got.lse.sum(), leaves)])
    return results


# Elements whose exponentials leave the float range, in one block of keys or queries or in all; weights that are zero or
# negligible relative to others.
_EXTREME = {
    "within": {"q": 1.0, "k": 1.0, "weight": 1.0},
    "small": {"q": 0.05, "k": 0.05, "weight": 1.0},
    "saturated": {"q": 9.0, "k": 9.0, "weight": 1.0},
    "far keys": {"q": 1.0, "k": 60.0, "weight": 1.0},
    "far queries": {"q": 1e6, "k": 1.0, "weight": 1.0},
    "opposed": {"q": 45.0, "k": -45.0, "weight": 1.0},
    "no weights": {"q": 1.0, "k": 1.0, "weight": 0.0},
    "tiny weights": {"q": 1.0, "k": 1.0, "weight": 1e-33},
}


@pytest.mark.parametrize("name", _EXTREME)
@pytest.mark.parametrize("heads", [1, 2])
def test_additive_score_in_every_range(name: str, heads: int, instructions: str) -> None:
    sizes, generator = _EXTREME[name], torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, n, 19, generator=generator) for n in (70, 83))
    q[:, :, 40:] *= sizes["q"] if name == "far queries" else 1.0
    k[:, :, 50:] *= sizes["k"] if name == "far keys" else 1.0
    if name == "opposed":
        q, k = q + sizes["q"], k + sizes["k"]
    elif not name.startswith("far"):
        q, k = q * sizes["q"], k * sizes["k"]
    weight = torch.randn(*(heads, 19)[2 - heads :], generator=generator) * sizes["weight"]
    weight[..., 3], weight[..., 4] = 0.0, 1e-12
    _check(*_additive(q, k, weight))


_SPARSE = [{"normalizer": normalizer.Sparsemax()}, {"normalizer": normalizer.Entmax(1.2)}]


@pytest.mark.parametrize("arguments", [{}, {"softcap": 2.0}, {"normalizer": normalizer.Sigmoid()}, *_SPARSE])
@pytest.mark.parametrize("kind", ["scaled_dot", "additive"])
def test_nan_propagates_without_mask(kind: str, arguments: dict[str, Any], instructions: str) -> None:
    """Queries that attend to NaN give NaN, for any position of the key; other heads and rows do not change."""
    q, k, v = (x.detach() for x in _qkv(70, 230, (2, 2), 8))
    arguments = arguments | {"score": score.Additive(torch.ones(8)) if kind == "additive" else None, "backend": "cpu"}
    clean = regard.attention(q, k, v, **arguments)
    for name, index in (("q", 5), ("k", 0), ("k", 229), ("k", 100), ("v", 3)):
        inputs = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        inputs[name][1, 0, index] = torch.nan
        out = regard.attention(*inputs.values(), **arguments)
        rows = slice(index, index + 1) if name == "q" else slice(None)
        assert bool(out[1, 0, rows].isnan().all())
        out[1, 0, rows] = clean[1, 0, rows]
        torch.testing.assert_close(out, clean)


def test_results_are_bitwise_reproducible() -> None:
    tensors = _qkv(700, 900)
    first, *others = (_with_gradients(tensors, "dropout") for _ in range(5))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


def test_cpu_backend_is_selected() -> None:
    q, k, v = _qkv(8, 8)
    with regard.record_backends() as ran:
        regard.attention(q, k, v)
        regard.attention(q, k, v, mask=mask.causal(), softcap=5.0, bias=position.ALiBi())
        regard.attention(q, k, v, score=score.Cosine(0.1), summary=Summary(entropy=True, top=3, received=True))
    assert ran == ["cpu"] * 3


def test_fake_saved_tensors_match_forward() -> None:
    """Compiled graphs use the shapes and dtypes of `empty_saved`."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.detach().to(dtype) for x in _qkv(8, 9))
        problem = regard.plan.assemble.make_problem(q, k, v, *[None] * 5, 0.0, None, None)
        saved = cpu.forward(problem.plan, problem.tensors)[-cpu.saved :]
        expected = cpu.empty_saved(regard.plan.problem.sizes(q, k), torch.empty(0), v)
        assert [(x.shape, x.dtype) for x in saved] == [(x.shape, x.dtype) for x in expected]


@pytest.mark.parametrize("name", ["plain", "causal", "ALiBi, learned", "sink, half", "dropout and summaries"])
def test_compiled_graph_matches_eager(name: str) -> None:
    """A full graph contains the native kernels and their gradients."""
    q, k, v = _qkv(37, 53)
    arguments: dict[str, Any] = {}
    parameters = []
    if name == "causal":
        arguments["mask"] = mask.causal(align="end")
    elif name == "ALiBi, learned":
        parameters = [torch.tensor([0.5, 0.25, 0.1, 0.3], requires_grad=True)]
        arguments["bias"] = position.ALiBi(parameters[0], align="end")
    elif name == "sink, half":
        q, k, v = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
        parameters = [torch.zeros(4, requires_grad=True)]
        arguments["normalizer"] = normalizer.Softmax(parameters[0])
    elif name == "dropout and summaries":
        arguments |= {"dropout": 0.2, "seed": 3, "summary": Summary(lse=True, max=True, top=3, received=True)}

    def eager(*x: torch.Tensor) -> torch.Tensor:
        result = regard.attention(*x, **arguments, backend="cpu")
        return (
            result
            if isinstance(result, torch.Tensor)
            else result[0] + result[1].lse[..., None] + result[1].top.weights.sum()
        )

    results = []
    for function in (eager, torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=True)):
        out = function(q, k, v)
        results.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v, *parameters])])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
