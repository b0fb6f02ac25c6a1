"""`merge` of attention over parts of the keys equals attention over all keys."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.budget import ErrorBudget, assert_within_budget
from support.compare import BACKENDS, compute_reference, evaluate_oracle, new_leaves
from support.problems import Problem, fixed_choices, make_problem
from torch import Tensor

import regard
from regard import Summary, mask, normalizer, summary

_CHOICES: dict[str, Any] = {
    "L": 31, "S": 79, "B": 2, "heads": (2, 2), "D": 7, "E": 5, "score": "scaled_dot", "normalizer": "softmax", "mask": None,
    "bias": None, "softcap": None, "dropout": 0.0, "with a sink": False, "size": 1.0, "summary": "lse", "nonfinite": None,
    "dtype": torch.float32, "scale": None,
}  # fmt: skip


def _parts(problem: Problem, leaves: dict[str, Tensor], cuts: Sequence[int], backend: str, **components: Any) -> Any:
    """Compute attention over each part of the keys and merge the results."""
    outs, lses = [], []
    for start, stop in zip((0, *cuts), (*cuts, 79), strict=True):
        keys, values = leaves["k"][:, :, start:stop], leaves["v"][:, :, start:stop]
        arguments = {name: make(start, stop) for name, make in components.items()}
        out, stats = regard.attention(
            leaves["q"], keys, values, summary=Summary(lse=True), backend=backend, **arguments
        )
        outs.append(out)
        lses.append(stats.lse)
    return regard.merge(outs, lses)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [(), (1,), (40,), (13, 13, 50, 78)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merge_of_parts_matches_full_attention(backend: str, cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = make_problem(fixed_choices({**_CHOICES, "dtype": dtype}))
    reference = compute_reference(problem)
    leaves = new_leaves(problem)
    out, lse = _parts(problem, leaves, cuts, backend)
    assert out.dtype == dtype
    found = {"out": out, "lse": lse}
    for name, got in found.items():
        _within(name, got, reference.outputs[name], parts=len(cuts) + 1)
    grad_outputs = [reference.cotangents[name].to(x.dtype) for name, x in found.items()]
    for name, gradient in zip(
        "qkv", torch.autograd.grad(list(found.values()), [leaves[n] for n in "qkv"], grad_outputs), strict=True
    ):
        _within(f"gradient of {name}", gradient, reference.gradients[name], parts=len(cuts) + 1)


def _within(name: str, got: Tensor, budget: ErrorBudget, parts: int) -> None:
    # Each part is rounded to the dtype of the output before it is merged, which adds one rounding per part.
    rounding = torch.finfo(got.dtype).eps * budget.scale * parts
    worst = (got.detach().double() - budget.exact).abs().max().item()
    assert worst <= budget.allowed_error(got.dtype) + rounding, f"{name}: error {worst}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_merge_with_fully_masked_rows(backend: str) -> None:
    table = torch.rand(2, 4, 31, 79, generator=torch.Generator().manual_seed(1)) < 0.3
    table[:, :, 3], table[0, 0, 4:9, 40:], table[1, 1, 10:20, :40] = False, False, False
    problem = make_problem(fixed_choices(_CHOICES))
    leaves = new_leaves(problem)
    out, lse = _parts(problem, leaves, (40,), backend, mask=lambda start, stop: mask.dense(table[..., start:stop]))
    expected, stats = regard.attention(
        *(leaves[n] for n in "qkv"), mask=mask.dense(table), summary=Summary(lse=True), backend="reference"
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, stats.lse, rtol=1e-5, atol=1e-6)
    assert bool((out[:, :, 3] == 0).all())
    assert bool((lse[:, :, 3] == -torch.inf).all())
    weights = torch.randn_like(out)
    gradients = [torch.autograd.grad((x * weights).sum() + y.where(y.isfinite(), 0).sum(), [leaves[n] for n in "qkv"])
            for x, y in ((out, lse), (expected, stats.lse))]  # fmt: skip
    for x, y in zip(*gradients, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert bool((gradients[0][0][:, :, 3] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_merge_with_sink_in_one_part(backend: str) -> None:
    problem = make_problem(fixed_choices(_CHOICES))
    leaves = new_leaves(problem)
    sink = torch.randn(4, requires_grad=True)

    def make_normalizer(start: int, stop: int) -> normalizer.Softmax:
        return normalizer.Softmax(sink if start == 0 else None)

    out, lse = _parts(problem, leaves, (13, 50), backend, normalizer=make_normalizer)
    expected, stats = regard.attention(
        *(leaves[n] for n in "qkv"), normalizer=normalizer.Softmax(sink), summary=Summary(lse=True), backend="reference"
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, stats.lse, rtol=1e-5, atol=1e-6)
    x, y = (torch.autograd.grad(z.square().sum(), sink)[0] for z in (out, expected))
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


class _SumOfSquares(summary.Statistic):
    """sum_j p_j^2, which merges as sum_a w_a^2 sum_j p_j^2."""

    name = "squares"

    def compute(self, weights: summary.Weights) -> Tensor:
        return weights.p.square().sum(-1)

    def merge(self, parts: summary.Parts) -> Tensor:
        return torch.stack([w.square() * x for w, x in zip(parts.shares, parts.of(self.name), strict=True)]).sum(0)


@pytest.mark.parametrize("lead", [(2, 4), (3,), ()])
def test_merge_of_summaries_matches_summary_of_all_keys(lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(*lead, n, 7, dtype=torch.float64, requires_grad=True) for n in (31, 79, 79))
    table = torch.rand(31, 79) < 0.3
    table[3], table[4:9, 40:], table[10:20, :40] = False, False, False
    member = torch.rand(5, 79) < 0.5
    cuts = (0, 3, 40, 79)

    def request(start: int, stop: int) -> Summary:
        return Summary(
            lse=True, max=True, entropy=True, top=6, mass=member[:, start:stop], rows=(3, 5, -1), full=True,
            other=(_SumOfSquares(),),
        )  # fmt: skip

    results = [
        regard.attention(
            q, k[..., a:b, :], v[..., a:b, :], mask=mask.dense(table[:, a:b]), summary=request(a, b), backend="tiled"
        )
        for a, b in itertools.pairwise(cuts)
    ]
    outs, stats = zip(*results, strict=True)
    out, merged = regard.merge(outs, stats, request(0, 79), starts=cuts[:-1])
    expected, whole = regard.attention(q, k, v, mask=mask.dense(table), summary=request(0, 79), backend="tiled")
    torch.testing.assert_close(out, expected)
    assert merged.named.keys() == whole.named.keys()
    for name, x in whole.named.items():
        torch.testing.assert_close(merged.named[name], x, msg=lambda m, name=name: f"{name}: {m}")
    gradients = [
        torch.autograd.grad(sum(x.where(x.isfinite(), 0).cos().sum() for x in s.named.values()), [q, k])
        for s in (merged, whole)
    ]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)


def test_merge_refuses_summaries_that_do_not_follow_from_parts() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))

    def merged(request: Summary, merged_request: Summary | None = None, **arguments: Any) -> Any:
        out, stats = regard.attention(q, k, v, summary=request)
        return regard.merge([out], [stats], merged_request or request, **arguments)

    with pytest.raises(NotImplementedError, match="received over all keys does not follow"):
        merged(Summary(lse=True, received=True))
    with pytest.raises(ValueError, match="starts is None; expected the index of the first key"):
        merged(Summary(lse=True, top=2))
    with pytest.raises(ValueError, match=r"starts is \[0, 3\]; expected the index of the first key of each of 1 parts"):
        merged(Summary(lse=True, top=2), starts=[0, 3])
    with pytest.raises(ValueError, match="requests max, which a part lacks"):
        merged(Summary(lse=True), Summary(lse=True, max=True))
    with pytest.raises(ValueError, match="with lse=True"):
        merged(Summary(max=True))
    with pytest.raises(TypeError, match="AttentionSummary of each part"):
        regard.merge([q], [torch.zeros(1, 2, 5)], Summary(lse=True))  # type: ignore[list-item]


def test_merge_is_associative() -> None:
    problem = make_problem(fixed_choices({**_CHOICES, "dtype": torch.float64}))
    found, leaves = evaluate_oracle(problem, torch.float64)
    parts = [
        regard.attention(leaves["q"], leaves["k"][:, :, a:b], leaves["v"][:, :, a:b], summary=Summary(lse=True))
        for a, b in ((0, 20), (20, 50), (50, 79))
    ]
    pairs = [(out, stats.lse) for out, stats in parts]
    first = regard.merge(*zip(*pairs[:2], strict=True))
    out, lse = regard.merge(*zip(first, pairs[2], strict=True))
    assert_within_budget("out", out, ErrorBudget(found["out"], found["out"] * (1 + 1e-14)))
    assert_within_budget("lse", lse, ErrorBudget(found["lse"], found["lse"] * (1 + 1e-14)))


def test_merge_keeps_half_precision() -> None:
    out, lse = regard.merge([torch.ones(1, 1, 2, 3, dtype=torch.bfloat16)] * 2, [torch.zeros(1, 1, 2)] * 2)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.ones_like(out))
    assert torch.allclose(lse, torch.full_like(lse, 2.0).log())


@pytest.mark.parametrize("scale", [0.0, 1e4, -1e4])
def test_merge_large_scores_do_not_overflow(scale: float) -> None:
    outs = [torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)]
    out, _ = regard.merge(outs, [torch.zeros(1, 1, 1), torch.full((1, 1, 1), scale)])
    assert float(out) == pytest.approx({0.0: 0.5, 1e4: 1.0, -1e4: 0.0}[scale])


@pytest.mark.parametrize(
    ("outs", "lses"),
    [
        ([], []),
        ([torch.zeros(1, 2, 3, 4)], []),
        ([torch.zeros(1, 2, 3, 4)], [torch.zeros(1, 2, 4)]),
        ([torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)], [torch.zeros(1, 2, 3), torch.zeros(1, 2, 5)]),
    ],
)
def test_merge_mismatched_parts_raise(outs: list[Tensor], lses: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="merge"):
        regard.merge(outs, lses)
