"""The native CPU kernels: every word they serve against the oracle, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from judge import judge, truth
from problems import Problem, decided, make, problems
from test_kernels import CASES, PLAIN

import regard
from regard import Summary, mask, normalizer, position, score
from regard.kernels import cpu, native

_SETS = native.instructions()


def test_they_are_there() -> None:
    """Nothing below would run without them: on a machine without a compiler, this is what fails."""
    assert native.missing is None
    assert _SETS[-1] == "baseline" or _SETS[0] == "baseline"


@pytest.fixture(params=_SETS)
def instructions(request: Any) -> Iterator[str]:
    native.ops.use(request.param)
    assert native.instructions()[0] == request.param
    yield request.param
    native.ops.use("")


# What the native kernels leave to others, by a part of the reason.
_LEFT = {
    "float64": {"dtype": torch.float64},
    "Additive": {"score": "additive"},
    "Python": {"score": "lambda", "L": 5, "S": 7, "heads": (1, 1)},
    "Sparsemax": {"normalizer": "sparsemax"},
    "Entmax": {"normalizer": "entmax"},
    "masks in Python": {"mask": "a", "mask a": "where"},
    "no log-sum-exp and no entropy": {"normalizer": "sigmoid", "summary": "entropy"},
    "64 largest": {"summary": "top", "top": 90},
    "NaN or inf": {"mask": "a", "mask a": "causal", "wild": "masked", "align": -3},
}


def _why_not(problem: Problem) -> str | None:
    leaves = {name: x.detach() for name, x in problem.tensors.items()}
    return regard.explain(**problem.ask(leaves)).reasons["cpu"]


@pytest.mark.parametrize("reason", _LEFT)
def test_what_is_left_to_others(reason: str) -> None:
    problem = make(decided({**PLAIN, "summary": None, **_LEFT[reason]}))
    found = _why_not(problem)
    assert found is not None and reason in found, found
    with pytest.raises(ValueError, match="kernel is 'cpu', which cannot serve this problem"):
        regard.attention(**problem.ask(problem.tensors), kernel="cpu")


def _served() -> list[Any]:
    """Each case with the summary it names, and without any: then the native kernels take the gradients themselves."""
    cases = []
    for name, choices in CASES.items():
        for summary in (choices.get("summary", "all"), None):
            case = {**PLAIN, **choices, "summary": summary}
            reason = _why_not(make(decided(case)))
            if reason is None:
                cases.append(pytest.param(case, id=f"{name}, {summary}"))
    return cases


_SERVED = _served()


def test_most_is_served() -> None:
    assert len(_SERVED) > 150


@pytest.mark.parametrize("case", _SERVED)
def test_word(case: dict[str, Any], instructions: str) -> None:
    problem = make(decided(case))
    judge(problem, "cpu", truth(problem))


_NATIVE = {
    "score": ("scaled_dot", "dot", "cosine", "bilinear", "gaussian", "distance"),
    "normalizer": ("softmax", "softmax", "sigmoid"),
    "dtype": (torch.float32, torch.float32, torch.bfloat16, torch.float16),
    "summary": (None, None, "lse", "all"),
}
_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def _judge_if_served(problem: Problem) -> None:
    if _why_not(problem) is None:
        judge(problem, "cpu", truth(problem))


@pytest.mark.parametrize("name", _SETS)
@settings(max_examples=120, derandomize=True, **_COMMON)  # type: ignore[arg-type]
@given(problem=problems(among=_NATIVE))
def test_random(name: str, problem: Problem) -> None:
    native.ops.use(name)
    try:
        _judge_if_served(problem)
    finally:
        native.ops.use("")


@pytest.mark.slow
@settings(max_examples=3000, **_COMMON)  # type: ignore[arg-type]
@given(problems(among=_NATIVE))
def test_random_at_length(problem: Problem) -> None:
    _judge_if_served(problem)


def _qkv(L: int = 300, S: int = 300, heads: tuple[int, int] = (4, 2), D: int = 24, E: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads[0], L, D), (2, heads[1], S, D), (2, heads[1], S, E))
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


# Several blocks of keys, several super-tiles of queries, and shares of a head: what short problems do not reach.
_LONG = {
    "plain": {},
    "causal": {"mask": mask.causal(align="end")},
    "window": {"mask": mask.causal(align="end") & mask.window(70, None)},
    "documents": {"mask": mask.documents((torch.arange(700) // 90, torch.arange(900) // 90))},
    "bias": {"bias": "L x S"},
    "bias of the keys": {"bias": "S"},
    "ALiBi": {"bias": position.ALiBi(torch.tensor([0.5, 0.25]), align="end")},
    "sink and softcap": {"normalizer": normalizer.Softmax(sink=0.3), "softcap": 3.0},
}


@pytest.mark.parametrize("name", _LONG)
@pytest.mark.parametrize("heads", [(2, 1), (2, 2)])
@pytest.mark.parametrize("threads", [1, 2])
def test_long(name: str, heads: tuple[int, int], threads: int) -> None:
    tensors = _qkv(700, 900, heads)
    words: dict[str, Any] = dict(_LONG[name])
    if isinstance(words.get("bias"), str):
        shape = (700, 900) if words["bias"] == "L x S" else (900,)
        words["bias"] = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
        tensors.append(words["bias"])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native_, told = (_with_gradients(tensors, kernel, words) for kernel in ("cpu", "tiled"))
    finally:
        torch.set_num_threads(before)
    for got, expected in zip(native_, told, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


def _with_gradients(tensors: list[torch.Tensor], kernel: str, words: dict[str, Any]) -> list[torch.Tensor]:
    out, seen = regard.attention(*tensors[:3], **words, kernel=kernel, summary=Summary(lse=True))
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) for x in (out, seen.lse)]
    return [out, seen.lse, *torch.autograd.grad([out, seen.lse], tensors, weights)]


def test_the_same_bits_every_time() -> None:
    tensors = _qkv(700, 900)
    words = {"mask": mask.causal(align="end"), "dropout": 0.1, "seed": 7}
    first, *others = (_with_gradients(tensors, "cpu", words) for _ in range(5))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


def test_it_is_what_runs() -> None:
    q, k, v = _qkv(8, 8)
    with regard.chosen() as ran:
        regard.attention(q, k, v)
        regard.attention(q, k, v, mask=mask.causal(), softcap=5.0, bias=position.ALiBi())
        regard.attention(q, k, v, score=score.Cosine(0.1), summary=Summary(entropy=True, top=3, received=True))
    assert ran == ["cpu"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 5, 3)}, "k has another shape"),
        ({"q": torch.zeros(1, 2, 4, 8)[..., ::2]}, "gaps in its last axis"),
        ({"q": torch.zeros(1, 2, 4, 4, dtype=torch.float64)}, "type"),
        ({"mask": [0, 0, 0]}, "nodes of 8 numbers"),
        ({"mask": [5, 0, 0, 0, 0, 0, -1, -1]}, "do not come before it"),
        ({"mask": [1, 0, 0, 0, 0, 0, -1, 0]}, "names a tensor that is not there"),
        ({"mask": [9, 0, 0, 0, 0, 0, -1, -1]}, "of no known kind"),
        ({"relative": torch.zeros(2, 3)}, "relative must be"),
        ({"dropout": 2.0}, "dropout must be from 0 to 1"),
    ],
)
def test_an_operator_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    """Anyone may call an operator: it must not read what is not there."""
    q, k, v = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 3)
    words = {"q": q, "k": k, "v": v, "key_bias": None, "query_bias": None, "bias": None, "relative": None}
    words |= {"sink": None, "mask_tensors": [], "mask": [], "scale": 1.0, "softcap": 0.0, "normalizer": 0}
    words |= {"dropout": 0.0, "seed": 0, "top": 0, "wanted": 0}
    native.ops.forward(**words)
    with pytest.raises(RuntimeError, match=message):
        native.ops.forward(**{**words, **change})


def test_extras_are_as_they_are_told() -> None:
    """What a compiled graph is told of the tensors that are kept for the backward pass."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.detach().to(dtype) for x in _qkv(8, 9))
        problem = regard.problem.pose(q, k, v, *[None] * 5, 0.0, None, None)
        extras = cpu.forward(problem.plan, problem.tensors)[-cpu.EXTRAS :]
        told = cpu.empty_extras(regard.problem.sizes(q, k), torch.empty(0), v)
        assert [(x.shape, x.dtype) for x in extras] == [(x.shape, x.dtype) for x in told]


@pytest.mark.parametrize("name", ["plain", "causal", "ALiBi, learned", "sink, half", "dropout and summaries"])
def test_one_graph(name: str) -> None:
    """Compiled graphs hold the native kernels too, and their gradients."""
    q, k, v = _qkv(37, 53)
    words: dict[str, Any] = {}
    parameters = []
    if name == "causal":
        words["mask"] = mask.causal(align="end")
    elif name == "ALiBi, learned":
        parameters = [torch.tensor([0.5, 0.25, 0.1, 0.3], requires_grad=True)]
        words["bias"] = position.ALiBi(parameters[0], align="end")
    elif name == "sink, half":
        q, k, v = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
        parameters = [torch.zeros(4, requires_grad=True)]
        words["normalizer"] = normalizer.Softmax(parameters[0])
    elif name == "dropout and summaries":
        words |= {"dropout": 0.2, "seed": 3, "summary": Summary(lse=True, max=True, top=3, received=True)}

    def eager(*x: torch.Tensor) -> torch.Tensor:
        found = regard.attention(*x, **words, kernel="cpu")
        return (
            found
            if isinstance(found, torch.Tensor)
            else found[0] + found[1].lse[..., None] + found[1].top.weights.sum()
        )

    answers = []
    for function in (eager, torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=True)):
        out = function(q, k, v)
        answers.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v, *parameters])])
    for expected, got in zip(*answers, strict=True):
        torch.testing.assert_close(got, expected)
