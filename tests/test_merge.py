"""`merge` joins attention over parts of the keys into attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.budget import Yardstick, check
from support.compare import KERNELS, fresh, solved, truth
from support.problems import Problem, decided, make
from torch import Tensor

import regard
from regard import Summary, mask, normalizer

_CHOICES: dict[str, Any] = {
    "L": 31, "S": 79, "B": 2, "heads": (2, 2), "D": 7, "E": 5, "score": "scaled_dot", "normalizer": "softmax", "mask": None,
    "bias": None, "softcap": None, "dropout": 0.0, "with a sink": False, "size": 1.0, "summary": "lse", "wild": None,
    "dtype": torch.float32, "scale": None,
}  # fmt: skip


def _parts(problem: Problem, leaves: dict[str, Tensor], cuts: Sequence[int], kernel: str, **words: Any) -> Any:
    """Attention over each part of the keys, merged."""
    outs, lses = [], []
    for start, stop in zip((0, *cuts), (*cuts, 79), strict=True):
        keys, values = leaves["k"][:, :, start:stop], leaves["v"][:, :, start:stop]
        given = {name: word(start, stop) for name, word in words.items()}
        out, seen = regard.attention(leaves["q"], keys, values, summary=Summary(lse=True), backend=kernel, **given)
        outs.append(out)
        lses.append(seen.lse)
    return regard.merge(outs, lses)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cuts", [(), (1,), (40,), (13, 13, 50, 78)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parts_make_the_whole(kernel: str, cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = make(decided({**_CHOICES, "dtype": dtype}))
    told = truth(problem)
    leaves = fresh(problem)
    out, lse = _parts(problem, leaves, cuts, kernel)
    assert out.dtype == dtype
    found = {"out": out, "lse": lse}
    for name, got in found.items():
        _within(name, got, told.outputs[name], parts=len(cuts) + 1)
    given = [told.cotangents[name].to(x.dtype) for name, x in found.items()]
    for name, gradient in zip(
        "qkv", torch.autograd.grad(list(found.values()), [leaves[n] for n in "qkv"], given), strict=True
    ):
        _within(f"gradient of {name}", gradient, told.gradients[name], parts=len(cuts) + 1)


def _within(name: str, got: Tensor, yardstick: Yardstick, parts: int) -> None:
    # Each part is rounded to the dtype of the output before it is merged: that is one more rounding of each.
    rounding = torch.finfo(got.dtype).eps * yardstick.scale * parts
    worst = (got.detach().double() - yardstick.exact).abs().max().item()
    assert worst <= yardstick.budget(got.dtype) + rounding, f"{name}: off by {worst}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_attend_to_nothing_in_some_parts_or_in_all(kernel: str) -> None:
    table = torch.rand(2, 4, 31, 79, generator=torch.Generator().manual_seed(1)) < 0.3
    table[:, :, 3], table[0, 0, 4:9, 40:], table[1, 1, 10:20, :40] = False, False, False
    problem = make(decided(_CHOICES))
    leaves = fresh(problem)
    out, lse = _parts(problem, leaves, (40,), kernel, mask=lambda start, stop: mask.dense(table[..., start:stop]))
    whole, seen = regard.attention(
        *(leaves[n] for n in "qkv"), mask=mask.dense(table), summary=Summary(lse=True), backend="reference"
    )
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, seen.lse, rtol=1e-5, atol=1e-6)
    assert bool((out[:, :, 3] == 0).all())
    assert bool((lse[:, :, 3] == -torch.inf).all())
    weights = torch.randn_like(out)
    told = [torch.autograd.grad((x * weights).sum() + y.where(y.isfinite(), 0).sum(), [leaves[n] for n in "qkv"])
            for x, y in ((out, lse), (whole, seen.lse))]  # fmt: skip
    for x, y in zip(*told, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert bool((told[0][0][:, :, 3] == 0).all())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sink_belongs_in_one_part(kernel: str) -> None:
    problem = make(decided(_CHOICES))
    leaves = fresh(problem)
    sink = torch.randn(4, requires_grad=True)

    def word(start: int, stop: int) -> normalizer.Softmax:
        return normalizer.Softmax(sink if start == 0 else None)

    out, lse = _parts(problem, leaves, (13, 50), kernel, normalizer=word)
    whole, seen = regard.attention(
        *(leaves[n] for n in "qkv"), normalizer=normalizer.Softmax(sink), summary=Summary(lse=True), backend="reference"
    )
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, seen.lse, rtol=1e-5, atol=1e-6)
    x, y = (torch.autograd.grad(z.square().sum(), sink)[0] for z in (out, whole))
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_merged_parts_merge_again() -> None:
    problem = make(decided({**_CHOICES, "dtype": torch.float64}))
    found, leaves = solved(problem, torch.float64)
    parts = [
        regard.attention(leaves["q"], leaves["k"][:, :, a:b], leaves["v"][:, :, a:b], summary=Summary(lse=True))
        for a, b in ((0, 20), (20, 50), (50, 79))
    ]
    pairs = [(out, seen.lse) for out, seen in parts]
    first = regard.merge(*zip(*pairs[:2], strict=True))
    out, lse = regard.merge(*zip(first, pairs[2], strict=True))
    check("out", out, Yardstick(found["out"], found["out"] * (1 + 1e-14)))
    check("lse", lse, Yardstick(found["lse"], found["lse"] * (1 + 1e-14)))


def test_half_precision_keeps_its_dtype() -> None:
    out, lse = regard.merge([torch.ones(1, 1, 2, 3, dtype=torch.bfloat16)] * 2, [torch.zeros(1, 1, 2)] * 2)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.ones_like(out))
    assert torch.allclose(lse, torch.full_like(lse, 2.0).log())


@pytest.mark.parametrize("scale", [0.0, 1e4, -1e4])
def test_large_scores_do_not_overflow(scale: float) -> None:
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
def test_parts_that_do_not_fit(outs: list[Tensor], lses: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="merge"):
        regard.merge(outs, lses)
