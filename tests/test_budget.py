"""Error budgets reject wrong results, and the oracle itself is correct."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from support import oracle
from support.budget import ErrorBudget, OverBudgetError, assert_within_budget
from support.compare import compare, compute_reference, evaluate_oracle, new_leaves, run_backend
from support.problems import DTYPES, Problem, fixed_choices, make_problem
from torch import Tensor

_CHOICES: dict[str, Any] = {
    "score": "scaled_dot", "scale": None, "normalizer": "softmax", "with a sink": False, "mask": None, "bias": None,
    "softcap": None, "dropout": 0.0, "summary": "all", "top": 3, "nonfinite": None, "L": 67, "S": 79, "B": 2, "heads": (2, 2),
    "D": 7, "E": 5, "size": 1.0, "shift": 0.0,
}  # fmt: skip


def _problem(**choices: Any) -> Problem:
    return make_problem(fixed_choices({**_CHOICES, **choices}))


def _assert_detected(
    problem: Problem, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], name: str = "out"
) -> None:
    """Check that results for changed inputs exceed the budget of this output and of the gradients of q and v."""
    reference = compute_reference(problem)
    leaves = new_leaves(problem)
    assert_within_budget(name, run_backend(problem, "reference", leaves)[name], reference.outputs[name])
    outputs = run_backend(problem, "reference", change(leaves))
    with pytest.raises(OverBudgetError):
        assert_within_budget(name, outputs[name], reference.outputs[name])
    gradients = torch.autograd.grad(
        outputs["out"], [leaves["q"], leaves["v"]], reference.cotangents["out"].to(problem.dtype)
    )
    reference_alone = compute_reference(_problem(**{**problem.choices, "summary": None}))
    for leaf, gradient in zip("qv", gradients, strict=True):
        with pytest.raises(OverBudgetError):
            assert_within_budget(leaf, gradient, reference_alone.gradients[leaf])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_budget_rejects_scale_error_of_one_thousandth(dtype: torch.dtype) -> None:
    _assert_detected(_problem(dtype=dtype), lambda x: {**x, "q": x["q"] * 1.001})
    _assert_detected(_problem(dtype=dtype), lambda x: {**x, "q": x["q"] * 1.001}, "lse")
    _assert_detected(_problem(dtype=dtype), lambda x: {**x, "q": x["q"] * 1.001}, "received")


@pytest.mark.parametrize("score", ["distance", "gaussian", "cosine"])
def test_budget_rejects_key_error_of_one_ten_thousandth(score: str) -> None:
    problem = _problem(dtype=torch.float32, score=score, temperature="number", sigma="number")
    _assert_detected(problem, lambda x: {**x, "k": x["k"] + 1e-4 * x["k"].flip(-1)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_rejects_missing_key(dtype: torch.dtype) -> None:
    def drop(x: dict[str, Tensor]) -> dict[str, Tensor]:
        keep = torch.arange(79) != 50
        return {**x, "k": x["k"][:, :, keep], "v": x["v"][:, :, keep]}

    problem = _problem(dtype=dtype, summary="lse")
    _assert_detected(problem, drop)
    _assert_detected(problem, drop, "lse")


@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_rejects_swapped_heads(dtype: torch.dtype) -> None:
    _assert_detected(_problem(dtype=dtype), lambda x: {**x, "q": x["q"][:, [1, 0, 2, 3]]})


def test_budget_rejects_error_in_one_element() -> None:
    reference = compute_reference(_problem(dtype=torch.float32))
    correct = reference.exact["out"].detach().float()
    assert_within_budget("out", correct, reference.outputs["out"])
    changed = correct.clone()
    changed[1, 2, 3, 4] += 4e-6
    with pytest.raises(OverBudgetError):
        assert_within_budget("out", changed, reference.outputs["out"])


@pytest.mark.parametrize("nonfinite", [math.nan, math.inf])
def test_budget_rejects_misplaced_nonfinite_values(nonfinite: float) -> None:
    exact = torch.randn(5, dtype=torch.float64)
    got = exact.float()
    got[2] = nonfinite
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget("out", got, ErrorBudget(exact, exact.float()))
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget("out", exact.float(), ErrorBudget(exact.where(got.isfinite(), nonfinite), exact.float()))
    assert_within_budget("out", got, ErrorBudget(exact, exact.float()), torch.arange(5) != 2)


def test_budget_rejects_infinity_of_wrong_sign() -> None:
    exact = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    with pytest.raises(AssertionError, match="sign"):
        assert_within_budget("lse", -exact.float(), ErrorBudget(exact, exact.float()))


def test_compare_rejects_error_in_one_output_or_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare` fails for an error in a single output, summary or gradient."""
    problem = _problem(dtype=torch.float32, L=11, S=13)
    reference = compute_reference(problem)
    compare(problem, "reference", reference)
    for wrong in reference.outputs:

        def answer(*arguments: Any, wrong: str = wrong) -> dict[str, Tensor]:
            return {name: x * 1.0001 if name == wrong else x for name, x in run_backend(*arguments).items()}

        monkeypatch.setattr("support.compare.run_backend", answer)
        with pytest.raises(AssertionError, match=wrong.replace("_", ".")):
            compare(problem, "reference", reference)
    monkeypatch.setattr("support.compare.run_backend", run_backend)
    for wrong in reference.gradients:

        def leaves(problem: Problem, wrong: str = wrong) -> dict[str, Tensor]:
            tensors = new_leaves(problem)
            tensors[wrong].register_hook(lambda gradient: gradient * 1.0001)
            return tensors

        monkeypatch.setattr("support.compare.new_leaves", leaves)
        with pytest.raises(AssertionError, match=f"gradient of {wrong}"):
            compare(problem, "reference", reference)


def test_compare_remeasures_small_baseline_error() -> None:
    """The error of the baseline is measured again if it is small by chance."""
    problem = _problem(dtype=torch.float32, score="distance", shift=5.0)
    reference = compute_reference(problem)
    reference.outputs["out"] = ErrorBudget(reference.exact["out"], reference.exact["out"])
    with pytest.raises(OverBudgetError):
        assert_within_budget(
            "out", run_backend(problem, "reference", new_leaves(problem))["out"], reference.outputs["out"]
        )
    compare(problem, "reference", reference)


# ---------------------------------------------------------------------------------------------------------------------
# The oracle.


@pytest.mark.parametrize("normalizer", oracle.NORMALIZERS)
def test_oracle_gradients(normalizer: str) -> None:
    problem = make_problem(fixed_choices({
        **_CHOICES, "dtype": torch.float64, "L": 3, "S": 7, "B": 1, "heads": (1, 1), "normalizer": normalizer, "D": 3,
        "with a sink": True, "sink": "one", "bias of the sigmoid": "one", "alpha": 1.5, "bias": "tensor",
        "axes of the bias": "LS", "mask": "a", "mask a": "causal", "align": 3, "bias of -inf": False,
    }))  # fmt: skip
    leaves = {name: x.detach().requires_grad_() for name, x in problem.clean.items()}

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = problem.solve(dict(zip(leaves, inputs, strict=True)))
        return tuple(found[name] for name in ("out", "lse", "entropy", "received", "full", "max"))

    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()))


def test_oracle_softmax_matches_torch() -> None:
    found, x = evaluate_oracle(_problem(dtype=torch.float64), torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(x["q"], x["k"], x["v"], enable_gqa=True)
    torch.testing.assert_close(found["out"], expected, rtol=1e-13, atol=1e-13)


def test_oracle_sparsemax_is_entmax_with_alpha_2() -> None:
    s = torch.randn(50, 23, dtype=torch.float64) * 2
    torch.testing.assert_close(oracle.sparsemax(s, 0), oracle.entmax(s, 0, 2.0), rtol=1e-13, atol=1e-13)
    # By definition the weights sum to 1, and the support consists of the scores above the threshold.
    p = oracle.entmax(s, 0, 1.5)
    torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=torch.float64), rtol=1e-12, atol=0)
    tau = torch.where(p > 0, 0.5 * s - p.sqrt(), -math.inf).amax(-1, keepdim=True)
    torch.testing.assert_close(p, (0.5 * s - tau).clamp(min=0) ** 2, rtol=1e-9, atol=1e-12)


def test_oracle_sparsemax_matches_fractions() -> None:
    scores = 5 + 2 * torch.cos(3 * torch.randn(9, 131, generator=torch.Generator().manual_seed(0)).double())
    for row, weights in zip(scores.tolist(), oracle.sparsemax(scores, 0).tolist(), strict=True):
        down = sorted(map(Fraction, row), reverse=True)
        tau = max((sum(down[:n]) - 1) / n for n in range(1, len(down) + 1))
        error = [abs(Fraction(p) - max(Fraction(s) - tau, 0)) for s, p in zip(row, weights, strict=True)]
        assert max(error) <= 2**-53
        assert sum(error) <= 2**-51


def test_oracle_t5_buckets_match_hugging_face() -> None:
    """The formula of the published models, in floating point."""
    for buckets, furthest, both in ((32, 128, True), (32, 128, False), (8, 20, True), (16, 100, False)):
        for step in range(-300, 301):
            number, count, start = torch.tensor([-step]), buckets, torch.zeros(1, dtype=torch.int64)
            if both:
                count //= 2
                start = (number > 0).long() * count
                number = number.abs()
            else:
                number = -torch.min(number, torch.zeros_like(number))
            exact = count // 2
            far = torch.log(number.float() / exact) / math.log(furthest / exact) * (count - exact)
            far = torch.min(exact + far.long(), torch.tensor([count - 1]))
            expected = start + torch.where(number < exact, number, far)
            assert oracle._t5_bucket(step, buckets, both, furthest) == int(expected), (step, buckets, furthest, both)


def test_oracle_alibi_slopes_match_paper() -> None:
    assert oracle._alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert oracle._alibi_slopes(2) == [2.0**-4, 2.0**-8]
    sixteen = oracle._alibi_slopes(16)
    assert oracle._alibi_slopes(12) == oracle._alibi_slopes(8) + sixteen[0::2][:4]
