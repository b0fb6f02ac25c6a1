"""Cross entropy over a vocabulary is that of torch, with its gradients, and holds no scores of all tokens."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regard.models.cross_entropy import cross_entropy


def _drawn(rows: int, words: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden, table = (torch.randn(n, width, generator=generator, dtype=dtype) for n in (rows, words))
    return hidden.requires_grad_(), table.requires_grad_(), torch.randint(words, (rows,), generator=generator)


def _theirs(hidden: Tensor, table: Tensor, target: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(hidden @ table.mT, target, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("rows", [1, 512, 1031])
def test_loss_and_gradients_are_those_of_torch(rows: int, smoothing: float) -> None:
    hidden, table, target = _drawn(rows, 67, 13)
    found, wanted = (f(hidden, table, target, smoothing) for f in (cross_entropy, _theirs))
    # A sum of 1,031 rows in float64 rounds by some 1e-13; a row or a label that is missed makes 1e-3.
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for x, y in zip(*(torch.autograd.grad(3 * loss, (hidden, table)) for loss in (found, wanted)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


def test_gradients_are_those_of_the_function() -> None:
    hidden, table, target = _drawn(5, 7, 3)
    assert torch.autograd.gradcheck(lambda *x: cross_entropy(*x, target, 0.1), (hidden, table))


def test_one_gradient_alone() -> None:
    hidden, table, target = _drawn(5, 7, 3)
    (alone,) = torch.autograd.grad(cross_entropy(hidden, table.detach(), target), hidden)
    (both, _) = torch.autograd.grad(cross_entropy(hidden, table, target), (hidden, table))
    assert torch.equal(alone, both)
    assert not cross_entropy(hidden.detach(), table.detach(), target).requires_grad


def test_autocast_computes_products_in_its_dtype_and_sums_in_float32() -> None:
    hidden, table, target = _drawn(700, 501, 64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = cross_entropy(hidden, table, target, 0.1), _theirs(hidden, table, target, 0.1)
    truth = _theirs(hidden.double(), table.double(), target, 0.1)
    assert found.dtype == torch.float32
    assert abs(found - truth) <= 2 * abs(wanted - truth) + 1e-5 * truth
    for x, y, z in zip(*(torch.autograd.grad(loss, (hidden, table)) for loss in (found, wanted, truth)), strict=True):
        assert x.dtype == torch.float32
        assert (x - z).norm() <= 2 * (y - z).norm()


class _Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that comes of any operator."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_the_scores_of_all_tokens_are_never_there() -> None:
    hidden, table, target = _drawn(1031, 67, 13)
    with _Largest() as ours:
        cross_entropy(hidden, table, target, 0.1).backward()
    with _Largest() as theirs:
        _theirs(hidden, table, target, 0.1)
    assert ours.numbers <= 512 * 67 < 1031 * 67 <= theirs.numbers


def test_scores_far_apart_are_no_overflow() -> None:
    hidden, table, target = _drawn(9, 11, 3, torch.float32)
    found, wanted = cross_entropy(hidden * 1e4, table, target), _theirs(hidden * 1e4, table, target, 0.0)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"hidden": torch.ones(5)}, "hidden is a float32 tensor of shape (5,); expected floats of shape (N, width)"),
        ({"table": torch.ones(7, 4)}, "table is a float32 tensor of shape (7, 4); expected floats of shape (V, 3)"),
        ({"target": torch.ones(5)}, "expected integers of shape (5,)"),
        ({"smoothing": 1.5}, "smoothing is 1.5; expected a number from 0 to 1"),
    ],
)
def test_bad_input_is_named(wrong: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {
        "hidden": torch.ones(5, 3),
        "table": torch.ones(7, 3),
        "target": torch.zeros(5, dtype=torch.int64),
    }
    with pytest.raises((ValueError, TypeError), match=re.escape(told)):
        cross_entropy(**{**given, **wrong})
