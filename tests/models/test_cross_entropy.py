"""`cross_entropy` matches torch, and does not materialize the logits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regard.models.cross_entropy import cross_entropy


def _drawn(rows: int, arguments: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden, table = (torch.randn(n, width, generator=generator, dtype=dtype) for n in (rows, arguments))
    return hidden.requires_grad_(), table.requires_grad_(), torch.randint(arguments, (rows,), generator=generator)


def _theirs(hidden: Tensor, table: Tensor, target: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(hidden @ table.mT, target, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("rows", [1, 512, 1031])
def test_cross_entropy_matches_torch(rows: int, smoothing: float) -> None:
    hidden, table, target = _drawn(rows, 67, 13)
    found, wanted = (f(hidden, table, target, smoothing) for f in (cross_entropy, _theirs))
    # The rounding error of 1,031 rows in float64 is about 1e-13; a missing row or label causes 1e-3.
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for x, y in zip(*(torch.autograd.grad(3 * loss, (hidden, table)) for loss in (found, wanted)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


def test_cross_entropy_passes_gradcheck() -> None:
    hidden, table, target = _drawn(5, 7, 3)
    assert torch.autograd.gradcheck(lambda *x: cross_entropy(*x, target, 0.1), (hidden, table))


def test_gradient_of_single_input() -> None:
    hidden, table, target = _drawn(5, 7, 3)
    (alone,) = torch.autograd.grad(cross_entropy(hidden, table.detach(), target), hidden)
    (both, _) = torch.autograd.grad(cross_entropy(hidden, table, target), (hidden, table))
    assert torch.equal(alone, both)
    assert not cross_entropy(hidden.detach(), table.detach(), target).requires_grad


def test_autocast_products_use_its_dtype_and_sums_float32() -> None:
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
    """Records the number of elements of the largest output of any operator."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_logits_are_not_materialized() -> None:
    hidden, table, target = _drawn(1031, 67, 13)
    with _Largest() as ours:
        cross_entropy(hidden, table, target, 0.1).backward()
    with _Largest() as theirs:
        _theirs(hidden, table, target, 0.1)
    assert ours.numbers <= 512 * 67 < 1031 * 67 <= theirs.numbers


def test_large_logits_do_not_overflow() -> None:
    hidden, table, target = _drawn(9, 11, 3, torch.float32)
    found, wanted = cross_entropy(hidden * 1e4, table, target), _theirs(hidden * 1e4, table, target, 0.0)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"hidden": torch.ones(5)},
            "hidden is a float32 tensor of shape (5,); expected a float tensor of shape (N, width)",
        ),
        (
            {"table": torch.ones(7, 4)},
            "table is a float32 tensor of shape (7, 4); expected a float tensor of shape (V, 3)",
        ),
        ({"target": torch.ones(5)}, "expected an integer tensor of shape (5,)"),
        ({"smoothing": 1.5}, "smoothing is 1.5; expected a number from 0 to 1"),
    ],
)
def test_invalid_arguments_raise(wrong: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "hidden": torch.ones(5, 3),
        "table": torch.ones(7, 3),
        "target": torch.zeros(5, dtype=torch.int64),
    }
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        cross_entropy(**{**given, **wrong})
