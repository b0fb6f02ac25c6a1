"""Rollout and flow beside the products of whole matrices, and beside a maximum flow by another library's other method."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog
from support.records import random, seen
from torch import Tensor

from regard.watch import flow, rollout


def stack(layers: int = 3, size: int = 7, batch: int = 2, causal: bool = False) -> list[Tensor]:
    return [random(batch, 2, size, size, seed=n, causal=causal) for n in range(layers)]


def mixed(p: Tensor, residual: float) -> Tensor:
    return residual * torch.eye(p.shape[-1]) + (1 - residual) * p.mean(1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("residual", [0.5, 0.2])
def test_rollout(causal: bool, residual: float) -> None:
    weights = stack(causal=causal)
    truth = torch.eye(7).expand(2, 7, 7)
    for p in weights:
        truth = mixed(p, residual) @ truth
    records = [seen(p, n, causal=causal) for n, p in enumerate(weights)]
    found = rollout(records, residual=residual)
    torch.testing.assert_close(found.shares, truth)
    assert float(found.unknown.max()) < 1e-5
    some = rollout(records, [-1, 2], residual)
    torch.testing.assert_close(some.shares, truth[:, [6, 2]])


def test_rollout_knows_what_it_does_not_know() -> None:
    weights = stack()
    truth = rollout([seen(p, n) for n, p in enumerate(weights)])
    few = rollout([seen(p, n, k=3) for n, p in enumerate(weights)])
    torch.testing.assert_close(few.shares.sum(-1) + few.unknown, torch.ones(2, 7))
    assert bool((few.shares <= truth.shares + 1e-6).all())
    assert bool((truth.shares <= few.shares + few.unknown[..., None] + 1e-6).all())
    assert float(few.unknown.min()) > 0.05


def test_flow() -> None:
    weights = stack(2, 4, 1)
    found = flow([seen(p, n) for n, p in enumerate(weights)], [3, 0])
    assert found.shape == (1, 2, 4)
    for n, token in enumerate((3, 0)):
        for j in range(4):
            assert float(found[0, n, j]) == pytest.approx(by_linear_program(weights, token, j), abs=1e-5)


def by_linear_program(weights: list[Tensor], token: int, target: int) -> float:
    """The largest flow from a token above to one below, as the linear program that defines it."""
    size, edges = weights[0].shape[-1], []
    for layer, p in enumerate(weights):
        capacity = mixed(p, 0.5)[0]
        edges += [((layer + 1, i), (layer, j), float(capacity[i, j])) for i in range(size) for j in range(size)]
    nodes = [(layer, i) for layer in range(len(weights) + 1) for i in range(size)]
    source, sink = (len(weights), token), (0, target)
    inner = [node for node in nodes if node not in (source, sink)]
    balance = [[(b == node) - (a == node) for a, b, _ in edges] for node in inner]
    out = [-float(a == source) for a, _, _ in edges]
    done = linprog(out, A_eq=balance, b_eq=[0] * len(inner), bounds=[(0, c) for _, _, c in edges])
    return float(-done.fun)


def test_what_is_no_stack() -> None:
    with pytest.raises(ValueError, match="records: is empty"):
        rollout([])
    with pytest.raises(
        ValueError, match=r"is cross attention of 5 queries to 7 keys; expected self-attention of 7 tokens"
    ):
        rollout([seen(random(1, 2, 5, 7), kind="cross")])
    with pytest.raises(ValueError, match="choose one stack"):
        flow([seen(random(1, 2, 5, 5)), seen(random(1, 2, 7, 7))])
    with pytest.raises(ValueError, match=r"tokens: 5; expected numbers of tokens, from -5 to 4"):
        rollout([seen(random(1, 2, 5, 5))], [5])
