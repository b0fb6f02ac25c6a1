"""The native CPU kernels: every word they serve against the oracle, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from support.cases import CASES, PLAIN
from support.compare import judge, truth
from support.cpu import COMMON, NATIVE, SETS, why_not
from support.problems import Problem, decided, make, problems
from torch import Tensor

import regard
from regard import Summary, mask, normalizer, position, score
from regard.backends.cpu import backend as cpu
from regard.backends.cpu import extension


def test_they_are_there() -> None:
    """Nothing below would run without them: on a machine without a compiler, this is what fails."""
    assert extension.missing is None
    assert SETS[-1] == "baseline" or SETS[0] == "baseline"


# What the native kernels leave to others, by a part of the reason.
_LEFT = {
    "float64": {"dtype": torch.float64},
    "Python": {"score": "lambda", "L": 5, "S": 7, "heads": (1, 1)},
    "masks in Python": {"mask": "a", "mask a": "where"},
    "64 largest": {"summary": "top", "top": 90},
    "NaN or inf": {"mask": "a", "mask a": "causal", "wild": "masked", "align": -3},
}


@pytest.mark.parametrize("reason", _LEFT)
def test_what_is_left_to_others(reason: str) -> None:
    problem = make(decided({**PLAIN, "summary": None, **_LEFT[reason]}))
    found = why_not(problem)
    assert found is not None and reason in found, found
    with pytest.raises(ValueError, match="kernel is 'cpu', which cannot serve this problem"):
        regard.attention(**problem.ask(problem.tensors), backend="cpu")


def _served() -> list[Any]:
    """Each case with the summary it names, and without any: then the native kernels take the gradients themselves."""
    cases = []
    for name, choices in CASES.items():
        for summary in (choices.get("summary", "all"), None):
            case = {**PLAIN, **choices, "summary": summary}
            reason = why_not(make(decided(case)))
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


# Products of pairs of bfloat16, on the machines that have them: widths that are even, sequences that are not.
_paired = pytest.mark.skipif(SETS[0] != "avx512_bf16", reason="this machine does not multiply bfloat16 in pairs")
_PAIRS = {"dtype": torch.bfloat16, "D": 10, "E": 6}


@_paired
@pytest.mark.parametrize("case", _SERVED)
def test_word_in_pairs(case: dict[str, Any]) -> None:
    problem = make(decided({**case, **_PAIRS}))
    judge(problem, "cpu", truth(problem))


@_paired
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_pairs_are_what_runs(dropout: float) -> None:
    """Other roundings than those of the widened numbers; and theirs where widths are odd."""
    for D, E, same in ((10, 6, False), (10, 7, True), (11, 6, True)):
        answers = []
        for name in ("avx512_bf16", "avx512"):
            extension.ops.use(name)
            q, k, v = (x.detach().bfloat16().requires_grad_() for x in _qkv(70, 83, D=D, E=E))
            out = regard.attention(q, k, v, dropout=dropout, seed=1, backend="cpu")
            answers.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v])])
        extension.ops.use("")
        assert all(torch.equal(x, y) == same for x, y in zip(*answers, strict=True))


def _judge_if_served(problem: Problem) -> None:
    if why_not(problem) is None:
        judge(problem, "cpu", truth(problem))


def test_nothing_is_read_of_what_memory_held_before(instructions: str) -> None:
    """Of the keys that some queries of a tile may attend to and others may not, nothing is computed for those others."""
    q, k, v = (torch.randn(1, 3, 131, 2, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    words = {"mask": mask.causal(), "normalizer": normalizer.Entmax(1.5), "softcap": 5.0}
    for size in range(20_000, 200_000, 10_000):
        torch.full((size,), torch.nan)  # given back at once
        out = regard.attention(q, k, v, **words, backend="cpu")
        assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=120, derandomize=True, **COMMON)  # type: ignore[arg-type]
@given(problem=problems(among=NATIVE))
def test_random(name: str, problem: Problem) -> None:
    extension.ops.use(name)
    try:
        _judge_if_served(problem)
    finally:
        extension.ops.use("")


@_paired
@settings(max_examples=120, derandomize=True, **COMMON)  # type: ignore[arg-type]
@given(problem=problems(among=NATIVE | {"dtype": (torch.bfloat16,), "D": (2, 10, 34), "E": (2, 6, 18)}))
def test_random_in_pairs(problem: Problem) -> None:
    _judge_if_served(problem)


@pytest.mark.slow
@settings(max_examples=3000, **COMMON)  # type: ignore[arg-type]
@given(problems(among=NATIVE))
def test_random_at_length(problem: Problem) -> None:
    _judge_if_served(problem)


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


# Several blocks of keys, several super-tiles of queries, and shares of a head: what short problems do not reach.
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


def _check(exact: list[torch.Tensor], plain: list[torch.Tensor], native_: list[torch.Tensor]) -> None:
    """No worse than twice the plain way in float32, by the largest error, and a few units of the largest number."""
    for told, straight, got in zip(exact, plain, native_, strict=True):
        unit = told.abs().max().item() * torch.finfo(torch.float32).eps
        assert (got - told).abs().max() <= 2 * (straight - told).abs().max() + 4 * unit + 1e-37


@pytest.mark.parametrize("name", _LONG)
@pytest.mark.parametrize("heads", [(2, 1), (2, 2)])
@pytest.mark.parametrize("threads", [1, 2, 3])  # three: heads that do not go evenly into them are shared out
def test_long(name: str, heads: tuple[int, int], threads: int) -> None:
    tensors, parameters = _qkv(700, 900, heads), {}
    generator = torch.Generator().manual_seed(1)
    if name == "bias":
        parameters = {"bias": torch.randn(700, 900, generator=generator)}
    elif name == "bias of the keys":
        parameters = {"bias": torch.randn(900, generator=generator)}
    elif name == "additive":
        parameters = {"score": torch.randn(heads[0], 24, generator=generator)}
    with _threads(threads):
        answers = [
            _with_gradients([*tensors, *parameters.values()], name, kernel, dtype)
            for kernel, dtype in (("tiled", torch.float64), ("tiled", torch.float32), ("cpu", torch.float32))
        ]
    _check(*answers)


_MASKS: dict[str, mask.Mask | None] = {
    "none": None,
    "causal": mask.causal(align="end"),
    "window": mask.window(30, 5, align="end"),
    "lengths": mask.lengths(torch.tensor([37, 300])),
    "stripes": mask.dense(torch.arange(300) % 100 < 3),
}


@pytest.mark.parametrize("name", _MASKS)
@pytest.mark.parametrize("kind", [normalizer.Softmax(sink=0.5), normalizer.Sigmoid(), normalizer.Entmax(1.5)])
@pytest.mark.parametrize("threads", [1, 3])  # three share out a single head: what a key receives comes of three sums
def test_all_weights(name: str, kind: Any, threads: int, instructions: str) -> None:
    q, k, v = (x.detach() for x in _qkv(150, 300, (2, 1) if threads == 1 else (1, 1)))
    groups = torch.arange(300) % 7 == torch.arange(3)[:, None]
    words = {"normalizer": kind, "mask": _MASKS[name], "dropout": 0.2, "seed": 1}
    asked = Summary(received=True, mass=groups, rows=(0, 70, -1), full=True)
    answers = []
    for kernel, dtype in (("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32)):
        with _threads(threads):
            out, seen = regard.attention(*(x.to(dtype) for x in (q, k, v)), **words, backend=kernel, summary=asked)
        answers.append([out, seen.received, seen.mass, seen.rows, seen.full])
    _check(*answers)


def _with_gradients(
    tensors: list[torch.Tensor], name: str, kernel: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    leaves, words = [x.detach().to(dtype).requires_grad_() for x in tensors], dict(_LONG[name])
    for x in leaves[3:]:
        words |= {"score": score.Additive(x)} if name == "additive" else {"bias": x}
    out, seen = regard.attention(*leaves[:3], **words, backend=kernel, summary=Summary(lse=True))
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype) for x in (out, seen.lse)]
    return [out, seen.lse, *torch.autograd.grad([out, seen.lse], leaves, weights)]


def _additive(q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor) -> list[list[torch.Tensor]]:
    """Log-sum-exp and all gradients: exact, the plain way in float32, and by the native kernels."""
    v, answers = torch.randn(1, 2, 83, 5, generator=torch.Generator().manual_seed(3)), []
    for kernel, dtype in (("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, weight)]
        words = {"score": score.Additive(leaves[3]), "summary": Summary(lse=True), "kernel": kernel}
        out, seen = regard.attention(*leaves[:3], **words)
        answers.append([out, seen.lse, *torch.autograd.grad(out.square().sum() + seen.lse.sum(), leaves)])
    return answers


# Numbers whose exponentials leave the range of floats, in one block of keys or queries or in all; weights that are nothing,
# and weights that are nothing beside others.
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
def test_additive_in_every_range(name: str, heads: int, instructions: str) -> None:
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


@pytest.mark.parametrize("words", [{}, {"softcap": 2.0}, {"normalizer": normalizer.Sigmoid()}, *_SPARSE])
@pytest.mark.parametrize("kind", ["scaled_dot", "additive"])
def test_nan_is_not_lost(kind: str, words: dict[str, Any], instructions: str) -> None:
    """Where nothing is masked, what attends to NaN is NaN, whichever key it is; and the rest is as it would be."""
    q, k, v = (x.detach() for x in _qkv(70, 230, (2, 2), 8))
    words = words | {"score": score.Additive(torch.ones(8)) if kind == "additive" else None, "kernel": "cpu"}
    clean = regard.attention(q, k, v, **words)
    for name, place in (("q", 5), ("k", 0), ("k", 229), ("k", 100), ("v", 3)):
        bad = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        bad[name][1, 0, place] = torch.nan
        out = regard.attention(*bad.values(), **words)
        rows = slice(place, place + 1) if name == "q" else slice(None)
        assert bool(out[1, 0, rows].isnan().all())
        out[1, 0, rows] = clean[1, 0, rows]
        torch.testing.assert_close(out, clean)


def test_the_same_bits_every_time() -> None:
    tensors = _qkv(700, 900)
    first, *others = (_with_gradients(tensors, "dropout") for _ in range(5))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("L", [1, 70])
@pytest.mark.parametrize("sink", [60.0, 80.0, 100.0])
def test_a_sink_far_above_all_scores(sink: float, L: int, instructions: str) -> None:
    """What is left of the weights is told down to the smallest numbers there are."""
    q, k, v = (x.detach() for x in _qkv(L, 9))
    _told_to_the_last(q, k, v.abs(), normalizer.Softmax(sink=sink), sink)


def _told_to_the_last(q: Tensor, k: Tensor, v: Tensor, of: normalizer.Normalizer, far: float) -> None:
    """Every number is right beside its own size, where scores are `far` from what they are measured against."""
    answers = []
    for kernel, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        summary = Summary(top=2, received=True)
        tensors = (x.to(dtype) for x in (q, k, v))
        out, seen = regard.attention(*tensors, normalizer=of, summary=summary, backend=kernel)
        answers.append([x.double() for x in (out, seen.top.weights, seen.received)])
    number = torch.finfo(torch.float32)
    for got, exact in zip(*answers, strict=True):
        # A score, and its distance, are rounded once each, and what is below the normal numbers once for each summand.
        allowed = 2 * number.eps * far * exact + number.tiny * number.eps * max(q.shape[2], k.shape[2])
        assert bool(((got - exact).abs() <= allowed).all())


@pytest.mark.parametrize("bias", [-60.0, -75.0, -90.0, -110.0])
def test_a_row_of_small_weights(bias: float, instructions: str) -> None:
    """The weights of a sigmoid are small beside nothing: they are told down to the smallest numbers there are."""
    q, k, v = (x.detach() for x in _qkv(5, 7))
    _told_to_the_last(q, k, v.abs(), normalizer.Sigmoid(bias), -bias)  # v > 0, so that nothing cancels


def test_it_is_what_runs() -> None:
    q, k, v = _qkv(8, 8)
    with regard.record_backends() as ran:
        regard.attention(q, k, v)
        regard.attention(q, k, v, mask=mask.causal(), softcap=5.0, bias=position.ALiBi())
        regard.attention(q, k, v, score=score.Cosine(0.1), summary=Summary(entropy=True, top=3, received=True))
    assert ran == ["cpu"] * 3


def test_extras_are_as_they_are_told() -> None:
    """What a compiled graph is told of the tensors that are kept for the backward pass."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.detach().to(dtype) for x in _qkv(8, 9))
        problem = regard.plan.assemble.make_problem(q, k, v, *[None] * 5, 0.0, None, None)
        extras = cpu.forward(problem.plan, problem.tensors)[-cpu.saved :]
        told = cpu.empty_saved(regard.plan.problem.sizes(q, k), torch.empty(0), v)
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
        found = regard.attention(*x, **words, backend="cpu")
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
