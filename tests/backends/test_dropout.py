"""Dropout: the same seed drops the same weights on every backend, by an integer hash, at the right rate."""

from __future__ import annotations

import math

import pytest
import torch
from support import oracle
from support.compare import BACKENDS
from torch import Tensor

import regard
from regard import Summary, mask
from regard.backends.dropout import keep
from regard.components.tile import Sizes, Tile

_SEEDS = (0, 1, -1, 7, 2**32 - 1, 2**32, 2**40 + 3, -(2**63), 2**63 - 1)


def _tile(B: int, H: int, L: int, S: int) -> Tile:
    return Tile((0, B), (0, H), (0, L), (0, S), Sizes(B, H, H, L, S), torch.device("cpu"))


@pytest.mark.parametrize("seed", _SEEDS)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999, 1e-9])
def test_keep_equals_integer_hash(seed: int, rate: float) -> None:
    assert torch.equal(keep(_tile(2, 3, 5, 17), torch.tensor(seed), rate), oracle.keep(2, 3, 5, 17, seed, rate))


def test_keep_of_any_tile() -> None:
    whole = keep(_tile(3, 4, 67, 79), torch.tensor(5), 0.4)
    part = Tile((1, 3), (2, 3), (10, 67), (64, 79), Sizes(3, 4, 4, 67, 79), torch.device("cpu"))
    assert torch.equal(keep(part, torch.tensor(5), 0.4), whole[1:3, 2:3, 10:67, 64:79])


def _dropped(kernel: str, seed: int | Tensor | None, rate: float = 0.5) -> Tensor:
    """Return which weights are dropped: with the identity as values, the output holds the weights."""
    q, k = torch.randn(2, 3, 67, 5), torch.randn(2, 3, 79, 5)
    v = torch.eye(79).expand(2, 3, 79, 79)
    return regard.attention(q, k, v, dropout=rate, seed=seed, backend=kernel) == 0


@pytest.mark.parametrize("kernel", BACKENDS)
def test_seed_drops_same_weights_on_every_backend(kernel: str) -> None:
    expected = ~oracle.keep(2, 3, 67, 79, 11, 0.5)
    assert torch.equal(_dropped(kernel, 11), expected)
    assert torch.equal(_dropped(kernel, torch.tensor(11)), expected)
    assert not torch.equal(_dropped(kernel, 12), expected)


@pytest.mark.parametrize("kernel", BACKENDS)
def test_skipped_tiles_do_not_change_dropout(kernel: str) -> None:
    v = torch.eye(200).expand(1, 2, 200, 200)
    q, k = torch.randn(1, 2, 200, 5), torch.randn(1, 2, 200, 5)
    window = mask.window(3, 3) | mask.prefix(2)
    plain = regard.attention(q, k, v, mask=window, backend=kernel)
    dropped = regard.attention(q, k, v, mask=window, dropout=0.5, seed=3, backend=kernel)
    kept = oracle.keep(1, 2, 200, 200, 3, 0.5)
    torch.testing.assert_close(dropped, torch.where(kept, plain * 2, 0.0))


@pytest.mark.parametrize("kernel", BACKENDS)
def test_default_seed_comes_from_torch_generator(kernel: str) -> None:
    answers = []
    for manual in (1, 1, 2):
        torch.manual_seed(manual)
        seeds = [torch.randint(-(1 << 63), (1 << 63) - 1, ()) for _ in range(2)]
        answers.append((_dropped(kernel, None), _dropped(kernel, None), seeds))
    assert torch.equal(answers[0][0], answers[1][0])
    assert not torch.equal(answers[0][0], answers[0][1])
    assert not torch.equal(answers[0][0], answers[2][0])


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_dropout_rate_along_every_axis(rate: float) -> None:
    """Of n weights n * rate are dropped, within a few standard deviations, in total and in each row and column."""
    kept = keep(_tile(4, 8, 128, 256), torch.tensor(99), rate).double()
    for axes in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2), (3,), (2,)):
        n = math.prod(kept.shape[axis] for axis in axes)
        off = (kept.mean(axes) - (1 - rate)).abs() / math.sqrt(rate * (1 - rate) / n)
        # The expected maximum of m normal variables is below sqrt(2 log m); 3 more are very unlikely. Rare events have a
        # longer tail.
        assert off.max() < math.sqrt(2 * math.log(max(off.numel(), 2))) + 3 + 3 / math.sqrt(n * rate * (1 - rate))


def test_rows_and_seeds_are_independent() -> None:
    """Two rows, heads, batch rows or seeds agree on half of the keys, under any shift."""
    kept = keep(_tile(2, 2, 64, 2048), torch.tensor(4), 0.5)
    other = keep(_tile(2, 2, 64, 2048), torch.tensor(5), 0.5)
    neighbours = [
        (kept[0], kept[1]), (kept[:, 0], kept[:, 1]), (kept[:, :, :-1], kept[:, :, 1:]), (kept[..., :-1], kept[..., 1:]),
        (kept, other), (kept, other.transpose(0, 1)), (kept[:, :, 1:, :-1], kept[:, :, :-1, 1:]),
    ]  # fmt: skip
    for a, b in neighbours:
        n = a.numel()
        agreement = (a == b).double().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(n)
    rows = kept.reshape(-1, 2048).double() * 2 - 1
    correlation = (rows @ rows.T / math.sqrt(2048)).fill_diagonal_(0)
    assert correlation.abs().max() < math.sqrt(2 * math.log(rows.shape[0] ** 2)) + 2.5


@pytest.mark.parametrize("kernel", BACKENDS)
def test_mean_over_seeds_equals_output_without_dropout(kernel: str) -> None:
    q, k, v = (torch.randn(1, 2, 13, 5) for _ in range(3))
    plain = regard.attention(q, k, v, backend=kernel)
    runs = torch.stack([regard.attention(q, k, v, dropout=0.3, seed=seed, backend=kernel) for seed in range(400)])
    error = (runs.mean(0) - plain).abs() / (runs.std(0) / math.sqrt(400))
    assert error.max() < 5


@pytest.mark.parametrize("kernel", BACKENDS)
def test_summaries_describe_the_weights_before_dropout(kernel: str) -> None:
    q, k, v = (torch.randn(1, 2, 13, 5) for _ in range(3))
    asked = Summary(True, True, True, 3, True, torch.ones(1, 13, dtype=torch.bool), 0, True)
    plain = regard.attention(q, k, v, summary=asked, backend=kernel)[1]
    dropped = regard.attention(q, k, v, summary=asked, backend=kernel, dropout=0.7, seed=1)[1]
    for x, y in zip((*plain[:3], *plain.top, *plain[4:8]), (*dropped[:3], *dropped.top, *dropped[4:8]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kernel", BACKENDS)
def test_dropout_of_one_drops_everything(kernel: str) -> None:
    q, k, v = (torch.randn(1, 2, 13, 5, requires_grad=True) for _ in range(3))
    out = regard.attention(q, k, v, dropout=1.0, backend=kernel)
    assert bool((out == 0).all())
    assert all(bool((gradient == 0).all()) for gradient in torch.autograd.grad(out.sum(), (q, k, v)))
