"""Errors, word by word, from the table in `errors.txt`; that nothing runs before them; and what is no error."""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard import Summary, attention, explain, mask, merge, normalizer, position, score, summary

B, H, G, L, S, D, E = 2, 6, 3, 5, 7, 4, 11
q, k, v = torch.zeros(B, H, L, D), torch.zeros(B, G, S, D), torch.zeros(B, G, S, E)
NAMES: dict[str, Any] = {
    **{"math": math, "torch": torch, "regard": regard, "mask": mask, "normalizer": normalizer, "score": score},
    **{"attention": attention, "merge": merge, "position": position, "summary": summary, "Summary": Summary},
    **{"B": B, "H": H, "G": G, "L": L, "S": S, "D": D, "E": E, "q": q, "k": k, "v": v},
    "outs": [torch.zeros(B, H, L, E)] * 2,
    "lses": [torch.zeros(B, H, L)] * 2,
    "bools": functools.partial(torch.ones, dtype=torch.bool),
    "ints": functools.partial(torch.ones, dtype=torch.int64),
    "away": functools.partial(torch.ones, device="meta"),
}


def table() -> list[tuple[str, str]]:
    """The calls of the table, each with its error: the name of the class, a colon, and the message."""
    text = (Path(__file__).parent / "errors.txt").read_text()
    cases = re.findall(r"^>>> (.*)\n((?:.+\n?)+)", text, re.MULTILINE)
    return [(call, " ".join(error.split("\n")).strip()) for call, error in cases]


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert caught.type in (TypeError, ValueError)
    return f"{caught.type.__name__}: {caught.value}"


CASES = table()


def test_the_table_is_read_whole() -> None:
    assert len(CASES) == (Path(__file__).parent / "errors.txt").read_text().count(">>>")
    assert len(CASES) == len(dict(CASES)) >= 250


@pytest.mark.parametrize(("call", "error"), CASES, ids=[call for call, _ in CASES])
def test_error(call: str, error: str) -> None:
    """The whole of it; before any kernel runs; and `explain`, which runs nothing, says the same."""
    with regard.record_backends() as ran, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error_of(lambda: eval(call, dict(NAMES))) == error
        if call.startswith("attention(") and "backend=" not in call:
            assert error_of(lambda: eval(call, {**NAMES, "attention": explain})) == error
    assert ran == []


@pytest.mark.parametrize("call", ["attention(q, k, v, mask=mask.causal())", "attention(q, k, v, dropout=1.5)"])
@pytest.mark.parametrize("kernel", ["sdpa", "tiled", "reference"])
def test_a_kernel_that_is_forced_changes_no_error(call: str, kernel: str) -> None:
    forced = functools.partial(attention, backend=kernel)
    assert error_of(lambda: eval(call, {**NAMES, "attention": forced})) == dict(CASES)[call]


def test_autocast_changes_no_error() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error_of(lambda: attention(q, k[:, :2], v)) == error_of(lambda: explain(q, k[:, :2], v))
        assert error_of(lambda: attention(q, [1.0], v)).startswith("TypeError: k is [1.0]; expected an ordinary")


# ---------------------------------------------------------------------------------------------------------------------
# Functions of the user.


class Mine(Exception):
    pass


def test_what_goes_wrong_in_a_function_of_the_user_is_his() -> None:
    """His own error comes through as it is, and before anything has run."""

    def fails(*_: Tensor) -> Tensor:
        raise Mine("here")

    for words in ({"score": fails}, {"mask": mask.where(fails)}, {"mask": ~mask.prefix(2) & mask.where(fails)}):
        with regard.record_backends() as ran, pytest.raises(Mine, match="here"):
            attention(q, k, v, **words)
        assert ran == []
    for words in ({"score": lambda q: q}, {"mask": mask.where(lambda i, j: i >= j)}):
        with (
            regard.record_backends() as ran,
            pytest.raises(TypeError, match=r"positional arguments? but \d were given"),
        ):
            attention(q, k, v, **words)
        assert ran == []


def test_functions_are_tried_on_one_pair_before_they_run() -> None:
    asked: list[tuple[Any, ...]] = []

    def scores(q: Tensor, k: Tensor) -> Tensor:
        asked.append((tuple(q.shape), tuple(k.shape), q.dtype))
        return q @ k.mT

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        asked.append(tuple(torch.broadcast_shapes(b.shape, h.shape, i.shape, j.shape)))
        return i >= j

    half = [x.bfloat16() for x in (q, k, v)]
    explain(*half, score=scores, mask=mask.where(allowed))
    # In the precision of the kernels, as they will be asked.
    assert asked == [((1, H, 1, D), (1, H, 1, D), torch.float32), (1, 1, 1, 1)]


@pytest.mark.parametrize("kernel", ["tiled", "reference"])
def test_functions_that_fail_on_larger_parts_are_told_which(kernel: str) -> None:
    part = f"parts of q {(B, H, L, D)} and k {(B, H, S, D)}"
    assert error_of(lambda: attention(q, k, v, score=lambda q, k: (q @ k.mT)[..., :1], backend=kernel)) == (
        f"ValueError: score: what the function gives for {part} is a float32 tensor of shape {(B, H, L, 1)}; expected "
        f"floats of shape {(B, H, L, S)}"
    )
    narrow = mask.where(lambda b, h, i, j: (i >= j)[..., :2])
    assert error_of(lambda: attention(q, k, v, mask=narrow, backend=kernel)) == (
        f"ValueError: mask: what the predicate of where gives for a part (b, h, l, s) = {(B, H, L, S)} is a bool "
        f"tensor of shape {(1, 1, L, 2)}; expected bools that broadcast to it"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is no error.


@pytest.mark.parametrize(
    "words",
    [
        {"seed": 3},  # without dropout, as in evaluation
        {"dropout": 0},
        {"dropout": 1, "seed": torch.tensor(-5)},
        {"dropout": 0.5, "seed": -(1 << 63)},
        {"softcap": 30},
        {"score": score.ScaledDot(0)},
        {"score": score.ScaledDot(-3)},
        {"score": score.Cosine(torch.tensor(0.1))},
        {"score": score.Bilinear(torch.ones(D, D, dtype=torch.float64))},
        {"score": lambda q, k: q @ k.mT},
        {"normalizer": normalizer.Softmax(-math.inf)},
        {"normalizer": normalizer.Softmax(torch.zeros(()))},
        {"normalizer": normalizer.Sigmoid(0)},
        {"normalizer": normalizer.Entmax(2)},
        {"mask": mask.lengths([3, 9])},
        {"mask": mask.lengths(torch.tensor([-1, S]))},
        {"mask": mask.lengths(torch.tensor([4]))},
        {"mask": mask.prefix(99)},
        {"mask": mask.documents((torch.ones(L).int(), torch.ones(1, S).long()))},
        {"mask": mask.blocks(torch.ones(H, 3, 2, dtype=torch.bool), (2, 4))},
        {"mask": mask.dense(torch.tensor(True))},
        {"mask": mask.where(lambda b, h, i, j: b.new_ones((), dtype=torch.bool))},
        {"mask": mask.causal(-3)},
        {"mask": mask.causal("start"), "bias": position.ALiBi(align="end")},
        {"bias": torch.zeros(())},
        {"bias": torch.zeros(S, dtype=torch.float64)},
        {"bias": torch.nn.Parameter(torch.zeros(1, 1, L, 1))},
        {"summary": Summary()},
        {"summary": Summary(top=99, rows=[0, -1], mass=summary.groups([0, 1, -1, 2, 0, 0, 1], count=5))},
        {"summary": Summary(rows=range(3))},
        {"summary": Summary(rows=-L)},
    ],
    ids=str,
)
def test_what_is_no_error(words: dict[str, Any]) -> None:
    got = attention(q, k, v, **words)
    out = got[0] if isinstance(got, tuple) else got
    assert out.shape == (B, H, L, E)
    assert out.isfinite().all()


def test_shapes_that_are_no_error() -> None:
    """Batch axes of 1 expand, and any axis but that of the heads may have size 0."""
    assert attention(q, k[:1], v[:1]).shape == (B, H, L, E)
    for zeros in ({"B": 0}, {"L": 0}, {"S": 0}, {"D": 0}, {"E": 0}, {"H": 0, "G": 0}):
        n = {"B": B, "H": H, "G": G, "L": L, "S": S, "D": D, "E": E, **zeros}
        q0, k0, v0 = (torch.zeros(n["B"], n[h], n[x], n[y]) for h, x, y in ("HLD", "GSD", "GSE"))
        for words in ({}, {"mask": mask.causal("end"), "bias": position.ALiBi()}, {"score": lambda q, k: q @ k.mT}):
            assert attention(q0, k0, v0, **words).shape == (n["B"], n["H"], n["L"], n["E"])


def test_a_number_in_a_tensor_goes_with_any_device() -> None:
    """As everywhere in torch. All other tensors have to be where q is: to move them would cost a copy in every call."""
    q, k, v = (torch.zeros(B, H, n, D, device="meta") for n in (L, S, S))
    explain(q, k, v, normalizer=normalizer.Softmax(torch.zeros(())), score=score.Cosine(torch.ones(())))
    explain(q, k, v, mask=mask.prefix(3), dropout=0.1, seed=torch.tensor(1))
    assert error_of(lambda: explain(q, k, v, mask=mask.lengths([3, 4]))) == (
        "ValueError: mask: n is on cpu but q is on meta; expected the same"
    )
