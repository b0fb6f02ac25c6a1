"""The budget rejects what is wrong, and the oracle itself is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from support import oracle
from support.budget import OverBudgetError, Yardstick, check
from support.compare import ask, fresh, judge, solved, truth
from support.problems import DTYPES, Problem, decided, make
from torch import Tensor

_PLAIN: dict[str, Any] = {
    "score": "scaled_dot", "scale": None, "normalizer": "softmax", "with a sink": False, "mask": None, "bias": None,
    "softcap": None, "dropout": 0.0, "summary": "all", "top": 3, "wild": None, "L": 67, "S": 79, "B": 2, "heads": (2, 2),
    "D": 7, "E": 5, "size": 1.0, "shift": 0.0,
}  # fmt: skip


def _problem(**choices: Any) -> Problem:
    return make(decided({**_PLAIN, **choices}))


def _wrong(problem: Problem, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], name: str = "out") -> None:
    """Ask the library something else: that must be seen in this output, and in the gradients of q and v."""
    told = truth(problem)
    leaves = fresh(problem)
    check(name, ask(problem, "reference", leaves)[name], told.outputs[name])
    found = ask(problem, "reference", change(leaves))
    with pytest.raises(OverBudgetError):
        check(name, found[name], told.outputs[name])
    gradients = torch.autograd.grad(found["out"], [leaves["q"], leaves["v"]], told.cotangents["out"].to(problem.dtype))
    alone = truth(_problem(**{**problem.choices, "summary": None}))
    for leaf, gradient in zip("qv", gradients, strict=True):
        with pytest.raises(OverBudgetError):
            check(leaf, gradient, alone.gradients[leaf])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_off_by_a_thousandth(dtype: torch.dtype) -> None:
    _wrong(_problem(dtype=dtype), lambda x: {**x, "q": x["q"] * 1.001})
    _wrong(_problem(dtype=dtype), lambda x: {**x, "q": x["q"] * 1.001}, "lse")
    _wrong(_problem(dtype=dtype), lambda x: {**x, "q": x["q"] * 1.001}, "received")


@pytest.mark.parametrize("score", ["distance", "gaussian", "cosine"])
def test_scale_off_by_a_ten_thousandth(score: str) -> None:
    problem = _problem(dtype=torch.float32, score=score, temperature="number", sigma="number")
    _wrong(problem, lambda x: {**x, "k": x["k"] + 1e-4 * x["k"].flip(-1)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_dropped(dtype: torch.dtype) -> None:
    # The values' rows of another key, in one place of many.
    def drop(x: dict[str, Tensor]) -> dict[str, Tensor]:
        keep = torch.arange(79) != 50
        return {**x, "k": x["k"][:, :, keep], "v": x["v"][:, :, keep]}

    problem = _problem(dtype=dtype, summary="lse")
    _wrong(problem, drop)
    _wrong(problem, drop, "lse")


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_swapped(dtype: torch.dtype) -> None:
    _wrong(_problem(dtype=dtype), lambda x: {**x, "q": x["q"][:, [1, 0, 2, 3]]})


def test_one_number_off_by_a_millionth() -> None:
    told = truth(_problem(dtype=torch.float32))
    good = told.exact["out"].detach().float()
    check("out", good, told.outputs["out"])
    bad = good.clone()
    bad[1, 2, 3, 4] += 4e-6
    with pytest.raises(OverBudgetError):
        check("out", bad, told.outputs["out"])


@pytest.mark.parametrize("wild", [math.nan, math.inf])
def test_nan_where_there_is_none(wild: float) -> None:
    exact = torch.randn(5, dtype=torch.float64)
    got = exact.float()
    got[2] = wild
    with pytest.raises(AssertionError, match="not finite"):
        check("out", got, Yardstick(exact, exact.float()))
    with pytest.raises(AssertionError, match="not finite"):
        check("out", exact.float(), Yardstick(exact.where(got.isfinite(), wild), exact.float()))
    check("out", got, Yardstick(exact, exact.float()), torch.arange(5) != 2)


def test_infinity_of_the_wrong_sign() -> None:
    exact = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    with pytest.raises(AssertionError, match="sign"):
        check("lse", -exact.float(), Yardstick(exact, exact.float()))


def test_judge_sees_what_is_wrong_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that tells something wrong in one output, summary or gradient alone."""
    problem = _problem(dtype=torch.float32, L=11, S=13)
    told = truth(problem)
    judge(problem, "reference", told)
    for wrong in told.outputs:

        def answer(*asked: Any, wrong: str = wrong) -> dict[str, Tensor]:
            return {name: x * 1.0001 if name == wrong else x for name, x in ask(*asked).items()}

        monkeypatch.setattr("support.compare.ask", answer)
        with pytest.raises(AssertionError, match=wrong.replace("_", ".")):
            judge(problem, "reference", told)
    monkeypatch.setattr("support.compare.ask", ask)
    for wrong in told.gradients:

        def leaves(problem: Problem, wrong: str = wrong) -> dict[str, Tensor]:
            found = fresh(problem)
            found[wrong].register_hook(lambda gradient: gradient * 1.0001)
            return found

        monkeypatch.setattr("support.compare.fresh", leaves)
        with pytest.raises(AssertionError, match=f"gradient of {wrong}"):
            judge(problem, "reference", told)


def test_judge_knows_luck() -> None:
    """Where the plain way is right by chance, it is measured again."""
    problem = _problem(dtype=torch.float32, score="distance", shift=5.0)
    told = truth(problem)
    told.outputs["out"] = Yardstick(told.exact["out"], told.exact["out"])
    with pytest.raises(OverBudgetError):
        check("out", ask(problem, "reference", fresh(problem))["out"], told.outputs["out"])
    judge(problem, "reference", told)


# ---------------------------------------------------------------------------------------------------------------------
# The oracle.


@pytest.mark.parametrize("normalizer", oracle.NORMALIZERS)
def test_oracle_gradients(normalizer: str) -> None:
    problem = make(decided({
        **_PLAIN, "dtype": torch.float64, "L": 3, "S": 7, "B": 1, "heads": (1, 1), "normalizer": normalizer, "D": 3,
        "with a sink": True, "sink": "one", "bias of the sigmoid": "one", "alpha": 1.5, "bias": "tensor",
        "axes of the bias": "LS", "mask": "a", "mask a": "causal", "align": 3, "bias of -inf": False,
    }))  # fmt: skip
    leaves = {name: x.detach().requires_grad_() for name, x in problem.clean.items()}

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        found = problem.solve(dict(zip(leaves, given, strict=True)))
        return tuple(found[name] for name in ("out", "lse", "entropy", "received", "full", "max"))

    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()))


def test_oracle_softmax_is_that_of_torch() -> None:
    found, x = solved(_problem(dtype=torch.float64), torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(x["q"], x["k"], x["v"], enable_gqa=True)
    torch.testing.assert_close(found["out"], expected, rtol=1e-13, atol=1e-13)


def test_oracle_sparsemax_is_entmax_of_two() -> None:
    s = torch.randn(50, 23, dtype=torch.float64) * 2
    torch.testing.assert_close(oracle.sparsemax(s, 0), oracle.entmax(s, 0, 2.0), rtol=1e-13, atol=1e-13)
    # The condition of the definition: sum 1, and the support is what lies above the threshold.
    p = oracle.entmax(s, 0, 1.5)
    torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=torch.float64), rtol=1e-12, atol=0)
    tau = torch.where(p > 0, 0.5 * s - p.sqrt(), -math.inf).amax(-1, keepdim=True)
    torch.testing.assert_close(p, (0.5 * s - tau).clamp(min=0) ** 2, rtol=1e-9, atol=1e-12)


def test_oracle_sparsemax_is_that_of_fractions() -> None:
    scores = 5 + 2 * torch.cos(3 * torch.randn(9, 131, generator=torch.Generator().manual_seed(0)).double())
    for row, weights in zip(scores.tolist(), oracle.sparsemax(scores, 0).tolist(), strict=True):
        down = sorted(map(Fraction, row), reverse=True)
        tau = max((sum(down[:n]) - 1) / n for n in range(1, len(down) + 1))
        error = [abs(Fraction(p) - max(Fraction(s) - tau, 0)) for s, p in zip(row, weights, strict=True)]
        assert max(error) <= 2**-53
        assert sum(error) <= 2**-51


def test_oracle_t5_buckets_are_those_of_hugging_face() -> None:
    """The formula of the published models, in floating point, as it is written there."""
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


def test_oracle_alibi_slopes_are_those_of_the_paper() -> None:
    assert oracle._alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert oracle._alibi_slopes(2) == [2.0**-4, 2.0**-8]
    sixteen = oracle._alibi_slopes(16)
    assert oracle._alibi_slopes(12) == oracle._alibi_slopes(8) + sixteen[0::2][:4]
