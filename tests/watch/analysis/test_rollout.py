"""Rollout against products of full matrices, flow against a linear program."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog
from support.records import make_record, random_weights
from torch import Tensor

from regard.watch import flow, rollout


def weights_of_stack(layers: int = 3, size: int = 7, batch: int = 2, causal: bool = False) -> list[Tensor]:
    return [random_weights(batch, 2, size, size, seed=n, causal=causal) for n in range(layers)]


def with_residual(p: Tensor, residual: float) -> Tensor:
    return residual * torch.eye(p.shape[-1]) + (1 - residual) * p.mean(1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("residual", [0.5, 0.2])
def test_rollout_matches_matrix_product(causal: bool, residual: float) -> None:
    weights = weights_of_stack(causal=causal)
    expected = torch.eye(7).expand(2, 7, 7)
    for p in weights:
        expected = with_residual(p, residual) @ expected
    records = [make_record(p, n, causal=causal) for n, p in enumerate(weights)]
    result = rollout(records, residual=residual)
    torch.testing.assert_close(result.shares, expected)
    assert float(result.unknown.max()) < 1e-5
    some = rollout(records, [-1, 2], residual)
    torch.testing.assert_close(some.shares, expected[:, [6, 2]])


def test_rollout_bounds_with_few_weights() -> None:
    weights = weights_of_stack()
    expected = rollout([make_record(p, n) for n, p in enumerate(weights)])
    partial = rollout([make_record(p, n, k=3) for n, p in enumerate(weights)])
    torch.testing.assert_close(partial.shares.sum(-1) + partial.unknown, torch.ones(2, 7))
    assert bool((partial.shares <= expected.shares + 1e-6).all())
    assert bool((expected.shares <= partial.shares + partial.unknown[..., None] + 1e-6).all())
    assert float(partial.unknown.min()) > 0.05


def test_flow_matches_linear_program() -> None:
    weights = weights_of_stack(2, 4, 1)
    result = flow([make_record(p, n) for n, p in enumerate(weights)], [3, 0])
    assert result.shape == (1, 2, 4)
    for n, token in enumerate((3, 0)):
        for j in range(4):
            assert float(result[0, n, j]) == pytest.approx(flow_by_linear_program(weights, token, j), abs=1e-5)


def flow_by_linear_program(weights: list[Tensor], token: int, target: int) -> float:
    """Solve the maximum flow from a token of the last layer to an input token as a linear program."""
    size, edges = weights[0].shape[-1], []
    for layer, p in enumerate(weights):
        capacity = with_residual(p, 0.5)[0]
        edges += [((layer + 1, i), (layer, j), float(capacity[i, j])) for i in range(size) for j in range(size)]
    nodes = [(layer, i) for layer in range(len(weights) + 1) for i in range(size)]
    source, sink = (len(weights), token), (0, target)
    inner = [node for node in nodes if node not in (source, sink)]
    balance = [[(b == node) - (a == node) for a, b, _ in edges] for node in inner]
    out = [-float(a == source) for a, _, _ in edges]
    solution = linprog(out, A_eq=balance, b_eq=[0] * len(inner), bounds=[(0, c) for _, _, c in edges])
    return float(-solution.fun)


def test_rollout_rejects_mixed_stacks() -> None:
    with pytest.raises(ValueError, match="records is empty"):
        rollout([])
    with pytest.raises(
        ValueError, match=r"is cross attention of 5 queries to 7 keys; expected self-attention of 7 tokens"
    ):
        rollout([make_record(random_weights(1, 2, 5, 7), kind="cross")])
    with pytest.raises(ValueError, match="select one stack"):
        flow([make_record(random_weights(1, 2, 5, 5)), make_record(random_weights(1, 2, 7, 7))])
    with pytest.raises(ValueError, match=r"tokens: 5; expected indices of tokens, from -5 to 4"):
        rollout([make_record(random_weights(1, 2, 5, 5))], [5])
