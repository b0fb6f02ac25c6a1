"""Entmax of any order, also learned: weights and derivatives against a search in float64, and on every backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import oracle
from torch import Tensor

import regard
from regard import Summary, mask, normalizer
from regard.components.learned_entmax import entmax


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("alpha", [1.001, 1.1, 1.5, 2.0, 2.5, 4.0])
def test_weights_of_any_order(alpha: float, size: float) -> None:
    torch.manual_seed(0)
    s = size * torch.randn(50, 37, dtype=torch.float64)
    s[:, 30:] = -torch.inf
    s[0, :30] = 2.0  # all equal
    s[1, :29] = -torch.inf  # a single one
    p = entmax(s, torch.tensor(alpha, dtype=torch.float64))
    torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=torch.float64))
    # The definition: on the support beta s - p^beta is the same tau, and other scores lie below it.
    beta, tolerance = alpha - 1, 1e-12 * max(1.0, size)
    tau = torch.where(p > 0, beta * s - p**beta, torch.nan)
    spread = tau.nan_to_num(-torch.inf).amax(-1) - tau.nan_to_num(torch.inf).amin(-1)
    assert float(spread.max()) < tolerance
    lowest = tau.nan_to_num(torch.inf).amin(-1, keepdim=True)
    assert bool((torch.where(p > 0, -torch.inf, beta * s) <= lowest + tolerance).all())
    if 1.1 <= alpha <= 2.0:
        torch.testing.assert_close(p, oracle.entmax(s, 0, alpha), rtol=1e-9, atol=1e-11)


def test_order_near_one_is_softmax() -> None:
    s, distance = torch.randn(20, 9, dtype=torch.float64), 1e-6
    difference = entmax(s, torch.tensor(1.0 + distance, dtype=torch.float64)) - s.softmax(-1)
    # The derivative by alpha at 1 is p_i (log^2 p_i - sum_j p_j log^2 p_j) / 2, which is below 2 in size for 9 scores.
    assert float(difference.abs().max()) < 2 * distance


def test_orders_that_are_not_above_one_are_nan() -> None:
    p = entmax(torch.randn(2, 1, 5), torch.tensor([[[1.0]], [[1.5]]]))
    assert bool(p[0].isnan().all()) and bool(p[1].isfinite().all())


@pytest.mark.parametrize("shape", [(), (3, 1, 1)])
def test_derivatives(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    s = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    alpha = (1.3 + 0.9 * torch.rand(shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(entmax, (s, alpha), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(entmax, (s, alpha))


@pytest.mark.parametrize("backend", ["tiled", "reference", None])
def test_attention_with_learned_order_per_head(backend: str | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64, requires_grad=True) for n in (31, 47, 47))
    alpha = torch.tensor([1.2, 1.5, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    request = Summary(entropy=True, received=True)
    results = []

    def by_head() -> tuple[Tensor, Tensor]:
        parts = [
            regard.attention(
                *(x[:, h : h + 1] for x in (q, k, v)), normalizer=normalizer.Entmax(alpha[h]), mask=mask.causal("end"),
                summary=request, backend="reference",
            )
            for h in range(4)
        ]  # fmt: skip
        return torch.cat([out for out, _ in parts], 1), torch.cat([stats.entropy for _, stats in parts], 1)

    def at_once() -> tuple[Tensor, Tensor]:
        out, stats = regard.attention(
            q, k, v, normalizer=normalizer.Entmax(alpha), mask=mask.causal("end"), summary=request, backend=backend
        )
        return out, stats.entropy

    for call in (at_once, by_head):
        out, entropy = call()
        loss = out.square().sum() + entropy.sum()
        results.append([out, entropy, *torch.autograd.grad(loss, [q, k, v, alpha])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_fixed_orders_up_to_two_match_native_kernels() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    for alpha in (1.2, 1.5, 2.0):
        expected = regard.attention(q, k, v, normalizer=normalizer.Entmax(alpha))
        torch.testing.assert_close(
            regard.attention(q, k, v, normalizer=normalizer.Entmax(torch.tensor(alpha))), expected
        )


def _call(q: Tensor, alpha: Tensor) -> Tensor:
    return regard.attention(q, q, q, normalizer=normalizer.Entmax(alpha), mask=mask.causal())


@pytest.mark.parametrize(
    "transform",
    [
        lambda: torch.compile(_call, fullgraph=True, backend="aot_eager"),
        lambda: lambda q, alpha: torch.vmap(lambda x: _call(x[None], alpha)[0])(q),
    ],
    ids=["compiled", "vmap"],
)
def test_learned_order_under_transforms(transform: Callable[[], Callable[..., Tensor]]) -> None:
    torch.manual_seed(0)
    q, alpha = torch.randn(2, 3, 13, 8).double(), torch.tensor([1.3, 1.9, 2.6]).double()
    results = []
    for call in (transform(), _call):
        x, a = q.clone().requires_grad_(), alpha.clone().requires_grad_()
        out = call(x, a)
        results.append([out, *torch.autograd.grad(out.cos().sum(), [x, a])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


def test_vmap_over_orders() -> None:
    s, alpha = torch.randn(4, 7).double(), torch.tensor([1.2, 1.5, 2.5]).double()
    expected = torch.stack([entmax(s, a) for a in alpha])
    torch.testing.assert_close(torch.vmap(entmax, (None, 0))(s, alpha), expected)
    torch.testing.assert_close(torch.vmap(entmax, (0, None))(s, alpha[0]), expected[0])
