"""The contract that every backend keeps: flags, empty rows, NaN, bits, axes of size zero and other leading axes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compare import BACKENDS, compare, compute_reference, gradients_of, new_leaves, run_backend
from support.components import normalizer_names, score_names, scores_without_oracle
from support.problems import Problem, fixed_choices, make_problem
from torch import Tensor

import regard
from regard import Summary, mask, normalizer, score, summary

_PLAIN: dict[str, Any] = {
    "dtype": torch.float32, "L": 67, "S": 79, "B": 2, "heads": (2, 2), "D": 7, "E": 5, "softcap": None, "align": 2,
    "nonfinite": None, "layout of q": "plain", "layout of k": "plain", "layout of v": "plain", "size": 1.0, "shift": 0.0,
}  # fmt: skip


def _problem(**choices: Any) -> Problem:
    return make_problem(fixed_choices({**_PLAIN, **choices}, seed=3))


def _run(kernel: str, *x: Tensor, **words: Any) -> Any:
    """Call attention, and check that this backend ran."""
    with regard.record_backends() as ran:
        answer = regard.attention(*x, backend=kernel, **words)
    assert ran == [kernel]
    return answer


def _qkv(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)


# ---------------------------------------------------------------------------------------------------------------------
# A flag never changes the mathematics.

_SUMMARIES = {
    "lse": Summary(lse=True),
    "max": Summary(max=True),
    "entropy": Summary(entropy=True),
    "top": Summary(top=5),
    "received": Summary(received=True),
    "mass": Summary(mass=summary.groups(torch.arange(79) % 3)),
    "rows": Summary(rows=(0, -1)),
    "full": Summary(full=True),
    "all": Summary(True, True, True, 5, True, summary.groups(torch.arange(79) % 3), (0, -1), True),
}


@pytest.mark.parametrize("name", _SUMMARIES)
@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("which", normalizer_names())
def test_summary_does_not_change_output(kernel: str, name: str, which: str) -> None:
    problem = _problem(score="scaled_dot", normalizer=which, mask="a & b", summary=None, dropout=0.0)
    leaves = new_leaves(problem)
    plain = run_backend(problem, kernel, leaves)["out"]
    asked = regard.attention(**{**problem.arguments(leaves), "summary": _SUMMARIES[name]}, backend=kernel)[0]
    assert torch.equal(plain, asked)
    for x, y in zip(
        *(torch.autograd.grad(out.sum(), [leaves[n] for n in "qkv"]) for out in (plain, asked)), strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kernel", BACKENDS)
def test_requires_grad_does_not_change_output(kernel: str) -> None:
    q, k, v = _qkv((2, 4, 67, 7), (2, 2, 79, 7), (2, 2, 79, 5))
    with torch.no_grad():
        plain = _run(kernel, q, k, v)
    assert torch.equal(plain, _run(kernel, q, k, v))


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("name", [*score_names(), "dropout"])
def test_repeated_calls_are_bitwise_equal(kernel: str, name: str) -> None:
    choices = (
        {"score": name, "dropout": 0.0} if name != "dropout" else {"score": "scaled_dot", "dropout": 0.3, "seed": 7}
    )
    small = {"L": 13, "S": 31, "heads": (1, 1)} if name in (*scores_without_oracle(), "dropout") else {}
    problem = _problem(**choices, **small, summary="all", mask="a & b")
    answers = []
    for _ in range(3):
        leaves = new_leaves(problem)
        found = run_backend(problem, kernel, leaves)
        weights = {n: torch.ones_like(x) for n, x in found.items() if x.requires_grad}
        answers.append([*found.values(), *gradients_of(found, weights, leaves).values()])
    for first, *others in zip(*answers, strict=True):
        assert all(torch.equal(first, other) or bool(first.isnan().any()) for other in others)


# ---------------------------------------------------------------------------------------------------------------------
# Rows that may attend to nothing, and NaN.

# Batch row 0 has no keys at all, row 1 has 50; in head 1, no query may attend to the first 40.
_HIDDEN = mask.lengths(torch.tensor([0, 50])) & ~(mask.prefix(40) & mask.where(lambda b, h, i, j: (h == 1) | (i < 0)))


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("which", normalizer_names())
@pytest.mark.parametrize("name", [n for n in score_names() if n not in scores_without_oracle()])
def test_empty_rows(kernel: str, which: str, name: str) -> None:
    problem = _problem(score=name, normalizer=which, mask=None, summary=None, dropout=0.0, **{"with a sink": False})
    leaves = new_leaves(problem)
    everything = Summary(True, True, True, 5, True, summary.groups(torch.arange(79) % 3), (0, -1), True)
    asked = {**problem.arguments(leaves), "mask": _HIDDEN, "summary": everything}
    out, seen = regard.attention(**asked, backend=kernel)
    assert bool((out[0] == 0).all())
    assert bool((seen.lse[0] == -torch.inf).all())
    assert seen.lse[1].isfinite().all()
    for x in (seen.max, seen.entropy, seen.top.weights, seen.received, seen.mass, seen.rows, seen.full):
        assert bool((x[0] == 0).all())
    assert bool((seen.top.keys[0] == -1).all())
    outputs = (out, seen.max, seen.entropy, seen.top.weights, seen.received, seen.mass, seen.rows, seen.full)
    gradients = torch.autograd.grad(
        [*outputs, seen.lse.where(seen.lse.isfinite(), 0.0)], [leaves[n] for n in "qkv"],
        [*(torch.randn_like(x) for x in outputs), torch.randn_like(seen.lse)],
    )  # fmt: skip
    for gradient in gradients:
        assert bool((gradient[0] == 0).all())
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kernel", BACKENDS)
def test_gradient_of_minus_infinity_lse_is_zero(kernel: str) -> None:
    """Any gradient of the log-sum-exp of an empty row gives 0."""
    q, k, v = _qkv((1, 2, 5, 3), (1, 2, 7, 3), (1, 2, 7, 3))
    nobody = mask.lengths(torch.tensor([0]))
    _, seen = _run(kernel, q, k, v, mask=nobody, summary=Summary(lse=True))
    for gradient in torch.autograd.grad(seen.lse, [q, k, v], torch.ones_like(seen.lse), allow_unused=True):
        assert gradient is None or bool((gradient == 0).all())


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("sink", [0.0, torch.tensor(0.5), torch.tensor([0.1, 0.2, 0.3, 0.4])])
def test_sink_without_keys(kernel: str, sink: float | Tensor) -> None:
    """Rows without keys, and tiles of such rows, have the log-sum-exp of the sink, and its gradient."""
    q, k, v = _qkv((2, 4, 67, 7), (2, 2, 79, 7), (2, 2, 79, 5))
    sink = sink.clone().requires_grad_() if isinstance(sink, Tensor) else sink
    everything = Summary(True, True, True, 5, True, summary.groups(torch.arange(79) % 3), (0, -1), True)
    out, seen = _run(
        kernel, q, k, v, normalizer=normalizer.Softmax(sink), mask=_HIDDEN, summary=everything, dropout=0.5, seed=1
    )
    expected = torch.as_tensor(sink).detach()
    assert torch.equal(seen.lse[0], (expected.view(-1, 1) if expected.dim() else expected).expand(4, 67))
    assert bool((out[0] == 0).all())
    if isinstance(sink, Tensor):
        (gradient,) = torch.autograd.grad(seen.lse[0].sum(), sink)
        assert torch.allclose(gradient.sum(), torch.tensor(4.0 * 67))


@pytest.mark.parametrize("nonfinite", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("name", [n for n in score_names() if n not in scores_without_oracle()])
def test_masked_nonfinite_values_do_not_leak(kernel: str, name: str, nonfinite: float) -> None:
    """NaN and inf in masked keys and values, and in queries of empty rows."""
    problem = _problem(score=name, normalizer="softmax", mask=None, summary=None, dropout=0.0)
    answers = []
    for fill in (0.0, nonfinite):
        leaves = new_leaves(problem)
        with torch.no_grad():
            # Keys from 50 on are masked out in batch row 1, and all of them in row 0.
            leaves["k"][1, :, 50:, 0], leaves["v"][1, :, 60:] = fill, fill
            leaves["k"][0], leaves["q"][0], leaves["v"][0, :, 3] = fill, fill, fill
        everything = Summary(True, True, True, 5, True, None, (0, -1), True)
        out, seen = regard.attention(
            **{**problem.arguments(leaves), "mask": _HIDDEN, "summary": everything}, backend=kernel
        )
        outputs = (out, seen.max, seen.entropy, seen.top.weights, seen.received, seen.rows, seen.full, seen.lse)
        weights = [torch.ones_like(x) for x in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
        answers.append([*outputs, *(g for g in gradients if g is not None)])
    for clean, got in zip(*answers, strict=True):
        assert not got.isnan().any()
        torch.testing.assert_close(got, clean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", BACKENDS)
def test_nan_propagates_to_attending_rows_only(kernel: str) -> None:
    q, k, v = _qkv((1, 2, 67, 7), (1, 2, 79, 7), (1, 2, 79, 5))
    with torch.no_grad():
        k[0, 0, 30, 2] = torch.nan
        v[0, 1, 66, 0] = torch.inf
        q[0, 1, 5, 3] = torch.nan
    out = _run(kernel, q, k, v, mask=mask.causal("start"))
    expected = torch.zeros(2, 67, dtype=torch.bool)
    expected[0, 30:], expected[1, 66:], expected[1, 5] = True, True, True
    assert torch.equal(out[0].isnan().all(-1), expected)
    assert torch.equal(out[0].isnan().any(-1), expected)


@pytest.mark.parametrize("kernel", BACKENDS)
def test_nan_propagates_without_mask(kernel: str) -> None:
    q, k, v = _qkv((1, 1, 5, 7), (1, 1, 9, 7), (1, 1, 9, 5))
    with torch.no_grad():
        v[0, 0, 3, 1] = torch.nan
    out = _run(kernel, q, k, v)
    assert bool(out[..., 1].isnan().all())


# ---------------------------------------------------------------------------------------------------------------------
# Axes.


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("axis", "BHLSDE")
@pytest.mark.parametrize("name", [n for n in score_names() if n not in scores_without_oracle()])
def test_axes_of_size_zero(kernel: str, axis: str, name: str) -> None:
    for which, hidden, rate, groups in itertools.product(normalizer_names(), (False, True), (0.0, 0.5), (0, 2)):
        size = dict(zip("BHLSDE", (2, 4, 5, 3, 7, 6), strict=True)) | {axis: 0}
        B, H, L, S, D, E = size.values()
        G = groups if H == 0 else H // 2
        q, k, v = _qkv((B, H, L, D), (B, G, S, D), (B, G, S, E))
        words: dict[str, Any] = {"normalizer": _example(which, H), "dropout": rate, "seed": 1 if rate else None}
        words["score"] = _score(name, H, D)
        words["mask"] = mask.causal(S - L) & mask.lengths(torch.full((B,), S)) if hidden else None
        everything = Summary(True, True, True, 2, True, torch.ones(3, S, dtype=torch.bool), (0, -1) if L else (), True)
        out, seen = _run(kernel, q, k, v, summary=everything, **words)
        assert out.shape == (B, H, L, E)
        assert not out.isnan().any()
        assert seen.lse.shape == seen.max.shape == seen.entropy.shape == (B, H, L)
        assert seen.top.weights.shape == seen.top.keys.shape == (B, H, L, 2)
        assert seen.received.shape == (B, H, S)
        assert seen.mass.shape == (B, H, L, 3)
        assert seen.rows is None if L == 0 else seen.rows.shape == (B, H, 2, S)
        assert seen.full.shape == (B, H, L, S)
        outputs = [x for x in (out, *seen[:3], seen.top.weights, *seen[4:]) if x is not None and x.requires_grad]
        if outputs:
            weights = [torch.ones_like(x) for x in outputs]
            for x, gradient in zip(
                (q, k, v), torch.autograd.grad(outputs, (q, k, v), weights, allow_unused=True), strict=True
            ):
                assert gradient is None or (gradient.shape == x.shape and not gradient.isnan().any())


def _example(which: str, heads: int) -> Any:
    return regard.normalizer._NORMALIZERS[which].example(heads)


def _score(name: str, heads: int, width: int) -> Any:
    if name in regard.score._SCORES:
        return regard.score._SCORES[name].example(heads, width)
    return lambda q, k: q @ k.mT


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 4), (2, 3, 4), (2, 1, 3, 4)])
def test_leading_axes(kernel: str, lead: tuple[int, ...]) -> None:
    """(L, D), (B, L, D) and more batch axes equal one batch axis and heads."""
    q, k, v = _qkv((*lead, 5, 3), (*lead, 7, 3), (*lead, 7, 6))
    everything = Summary(True, True, True, 2, True, torch.ones(2, 7, dtype=torch.bool), (1, -1), True)
    out, seen = _run(kernel, q, k, v, summary=everything, mask=mask.causal("end"))
    heads = lead[-1:] if len(lead) > 1 else (1,)
    four = [x.reshape(-1, *heads, *x.shape[-2:]) for x in (q, k, v)]
    out4, seen4 = _run(kernel, *four, summary=everything, mask=mask.causal("end"))
    assert torch.equal(out, out4.reshape(*lead, 5, 6))
    for x, y in zip((*seen[:3], *seen.top, *seen[4:8]), (*seen4[:3], *seen4.top, *seen4[4:8]), strict=True):
        assert torch.equal(x, y.reshape(*lead, *y.shape[2:]))


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize(
    "shapes", [((3, 2), (1, 1)), ((3, 2), (1, 2)), ((3, 2), (3, 1)), ((3,), (1,)), ((2, 3, 2), (1, 3, 1))]
)
def test_keys_and_values_broadcast_over_batch(kernel: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    full, one = shapes
    q, k, v = _qkv((*full, 5, 3), (*one, 7, 3), (*one, 7, 6))
    gradients = []
    for keys, values in ((k, v), (k.expand(*full, 7, 3).clone(), v.expand(*full, 7, 6).clone())):
        out = _run(kernel, q, keys, values)
        gradients.append([out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))])
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@functools.cache
def _grouped(heads: tuple[int, int]) -> tuple[Problem, Any]:
    problem = _problem(
        heads=heads, score="additive", maps="both", w_k="per head", w_q="per head", summary="all", mask="a"
    )
    return problem, compute_reference(problem)


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("heads", [(1, 1), (1, 3), (3, 1), (3, 2)])
def test_grouped_queries(kernel: str, heads: tuple[int, int]) -> None:
    compare(_grouped(heads)[0], kernel, _grouped(heads)[1])


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = _qkv((1, 2, 5, 3), (1, 2, 7, 3), (1, 2, 7, 4), dtype=dtype)
    out, seen = _run(kernel, q, k, v, summary=Summary(lse=True, top=1, full=True))
    assert out.dtype == dtype
    assert {seen.lse.dtype, seen.full.dtype, seen.top.weights.dtype} == {
        dtype if dtype == torch.float64 else torch.float32
    }
    assert all(g.dtype == dtype for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.parametrize("of", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_of_other_dtype(kernel: str, of: torch.dtype, inputs: torch.dtype) -> None:
    """Parameters are converted to the accumulation precision, and their gradients have their own dtype."""
    q, k, v = _qkv((2, 4, 67, 7), (2, 2, 79, 7), (2, 2, 79, 5), dtype=inputs)
    wide = torch.float64 if inputs == torch.float64 else torch.float32
    tables = ((regard.score._SCORES, "score"), (regard.normalizer._NORMALIZERS, "normalizer"))
    cases = [
        (role, _score(name, 4, 7) if role == "score" else _example(name, 4)) for table, role in tables for name in table
    ]
    cases += [("bias", dataclasses.replace(kind.example(4), align="end")) for kind in regard.position._BIASES.values()]
    cases += [("score", score.Gaussian(torch.tensor(1.3))), ("normalizer", normalizer.Softmax(torch.tensor(0.3)))]
    for role, word in cases:
        answers = []
        for dtype in (of, wide):
            fields = {
                n: x.to(of).to(dtype).requires_grad_() if isinstance(x, Tensor) else x for n, x in vars(word).items()
            }
            parameters = [x for x in fields.values() if isinstance(x, Tensor)]
            out, seen = _run(kernel, q, k, v, summary=Summary(lse=True), **{role: type(word)(**fields)})
            assert out.dtype == inputs
            assert seen.lse.dtype == wide
            gradients = torch.autograd.grad(out.float().square().sum() + seen.lse.sum(), [q, k, v, *parameters])
            assert all(g.dtype == x.dtype for g, x in zip(gradients, (q, k, v, *parameters), strict=True))
            answers.append([out, seen.lse, *(g.to(min(of, wide, key=lambda t: t.itemsize)) for g in gradients)])
        for x, y in zip(*answers, strict=True):
            torch.testing.assert_close(x, y)


def test_distance_scores_are_translation_invariant() -> None:
    """Distances, and outputs, do not change when q and k are shifted by the same vector."""
    kinds: list[Callable[[], Any]] = [lambda: score.Gaussian(1.3), score.Distance]
    for kind, kernel in itertools.product(kinds, BACKENDS):
        q, k, v = _qkv((2, 4, 67, 7), (2, 2, 79, 7), (2, 2, 79, 5))
        # Steps of 1/64 stay exact at 1000.
        q, k = ((x * 64).round() / 64 for x in (q, k))
        near = _run(kernel, q, k, v, score=kind())
        torch.testing.assert_close(_run(kernel, q + 1000, k + 1000, v, score=kind()), near, rtol=2e-5, atol=2e-5)
