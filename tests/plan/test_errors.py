"""Invalid arguments raise the errors listed in `errors.txt` before a backend runs; valid ones do not."""

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


def read_table() -> list[tuple[str, str]]:
    """Return the calls of the table, each with its error: class name, colon and message."""
    text = (Path(__file__).parent / "errors.txt").read_text()
    cases = re.findall(r"^>>> (.*)\n((?:.+\n?)+)", text, re.MULTILINE)
    return [(call, " ".join(error.split("\n")).strip()) for call, error in cases]


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert caught.type in (TypeError, ValueError)
    return f"{caught.type.__name__}: {caught.value}"


CASES = read_table()


def test_table_is_read_completely() -> None:
    assert len(CASES) == (Path(__file__).parent / "errors.txt").read_text().count(">>>")
    assert len(CASES) == len(dict(CASES)) >= 250


@pytest.mark.parametrize(("call", "error"), CASES, ids=[call for call, _ in CASES])
def test_error(call: str, error: str) -> None:
    """The complete message is raised before a backend runs, and `explain` raises the same."""
    with regard.record_backends() as ran, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error_of(lambda: eval(call, dict(NAMES))) == error
        if call.startswith("attention(") and "backend=" not in call:
            assert error_of(lambda: eval(call, {**NAMES, "attention": explain})) == error
    assert ran == []


@pytest.mark.parametrize("call", ["attention(q, k, v, mask=mask.causal())", "attention(q, k, v, dropout=1.5)"])
@pytest.mark.parametrize("backend", ["sdpa", "tiled", "reference"])
def test_errors_do_not_depend_on_backend(call: str, backend: str) -> None:
    forced = functools.partial(attention, backend=backend)
    assert error_of(lambda: eval(call, {**NAMES, "attention": forced})) == dict(CASES)[call]


def test_errors_do_not_depend_on_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error_of(lambda: attention(q, k[:, :2], v)) == error_of(lambda: explain(q, k[:, :2], v))
        assert error_of(lambda: attention(q, [1.0], v)).startswith("TypeError: k is [1.0]; expected a strided")


# ---------------------------------------------------------------------------------------------------------------------
# User functions.


class UserError(Exception):
    pass


def test_exceptions_in_user_functions_propagate() -> None:
    """The exception propagates unchanged, before a backend runs."""

    def fails(*_: Tensor) -> Tensor:
        raise UserError("here")

    for arguments in ({"score": fails}, {"mask": mask.where(fails)}, {"mask": ~mask.prefix(2) & mask.where(fails)}):
        with regard.record_backends() as ran, pytest.raises(UserError, match="here"):
            attention(q, k, v, **arguments)
        assert ran == []
    for arguments in ({"score": lambda q: q}, {"mask": mask.where(lambda i, j: i >= j)}):
        with (
            regard.record_backends() as ran,
            pytest.raises(TypeError, match=r"positional arguments? but \d were given"),
        ):
            attention(q, k, v, **arguments)
        assert ran == []


def test_user_functions_are_validated_on_one_pair() -> None:
    calls: list[tuple[Any, ...]] = []

    def scores(q: Tensor, k: Tensor) -> Tensor:
        calls.append((tuple(q.shape), tuple(k.shape), q.dtype))
        return q @ k.mT

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        calls.append(tuple(torch.broadcast_shapes(b.shape, h.shape, i.shape, j.shape)))
        return i >= j

    half = [x.bfloat16() for x in (q, k, v)]
    explain(*half, score=scores, mask=mask.where(allowed))
    # In the precision that backends use.
    assert calls == [((1, H, 1, D), (1, H, 1, D), torch.float32), (1, 1, 1, 1)]


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_user_functions_failing_on_larger_tiles_raise(backend: str) -> None:
    part = f"parts q {(B, H, L, D)} and k {(B, H, S, D)}"
    assert error_of(lambda: attention(q, k, v, score=lambda q, k: (q @ k.mT)[..., :1], backend=backend)) == (
        f"ValueError: score: the result of the function for {part} is a float32 tensor of shape {(B, H, L, 1)}; expected "
        f"a float tensor of shape {(B, H, L, S)}"
    )
    narrow = mask.where(lambda b, h, i, j: (i >= j)[..., :2])
    assert error_of(lambda: attention(q, k, v, mask=narrow, backend=backend)) == (
        f"ValueError: mask: the result of the predicate of where for a tile (b, h, l, s) = {(B, H, L, S)} is a bool "
        f"tensor of shape {(1, 1, L, 2)}; expected a bool tensor that broadcasts to it"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Valid arguments.


@pytest.mark.parametrize(
    "arguments",
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
    ids=lambda arguments: re.sub(" at 0x[0-9a-f]+", "", str(arguments)),
)
def test_valid_arguments(arguments: dict[str, Any]) -> None:
    got = attention(q, k, v, **arguments)
    out = got[0] if isinstance(got, tuple) else got
    assert out.shape == (B, H, L, E)
    assert out.isfinite().all()


def test_valid_shapes() -> None:
    """Batch dimensions of size 1 expand, and every dimension may have size 0."""
    assert attention(q, k[:1], v[:1]).shape == (B, H, L, E)
    for zeros in ({"B": 0}, {"L": 0}, {"S": 0}, {"D": 0}, {"E": 0}, {"H": 0, "G": 0}):
        n = {"B": B, "H": H, "G": G, "L": L, "S": S, "D": D, "E": E, **zeros}
        q0, k0, v0 = (torch.zeros(n["B"], n[h], n[x], n[y]) for h, x, y in ("HLD", "GSD", "GSE"))
        for arguments in ({}, {"mask": mask.causal("end"), "bias": position.ALiBi()}, {"score": lambda q, k: q @ k.mT}):
            assert attention(q0, k0, v0, **arguments).shape == (n["B"], n["H"], n["L"], n["E"])


def test_scalar_tensors_on_other_device_are_valid() -> None:
    """As everywhere in torch. All other tensors must be on the device of q."""
    q, k, v = (torch.zeros(B, H, n, D, device="meta") for n in (L, S, S))
    explain(q, k, v, normalizer=normalizer.Softmax(torch.zeros(())), score=score.Cosine(torch.ones(())))
    explain(q, k, v, mask=mask.prefix(3), dropout=0.1, seed=torch.tensor(1))
    assert error_of(lambda: explain(q, k, v, mask=mask.lengths([3, 4]))) == (
        "ValueError: mask: n is on cpu but q is on meta; expected the same"
    )
