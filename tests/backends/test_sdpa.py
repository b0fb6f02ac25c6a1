"""The kernel `torch`: PyTorch's own attention, held to the same contract where it serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.compare import compare_all, truth
from support.problems import DTYPES, decided, make
from torch import Tensor

import regard
from regard import Summary, mask, normalizer, score

_SERVED: dict[str, Any] = {
    "L": 67, "S": 79, "B": 2, "heads": (2, 2), "D": 8, "E": 8, "normalizer": "softmax", "with a sink": False, "bias": None,
    "softcap": None, "dropout": 0.0, "summary": None, "size": 1.0, "shift": 0.0, "align": "start", "mask a": "causal",
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [None, "a"])
@pytest.mark.parametrize("name", ["scaled_dot", "dot", "bilinear"])
def test_against_the_oracle(dtype: torch.dtype, hidden: str | None, name: str) -> None:
    if name == "bilinear" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("the score is widened to float32, which this kernel refuses: see below")
    for seed, wild in enumerate((None, "masked", "anywhere")):
        choices = {**_SERVED, "dtype": dtype, "parameters": dtype, "mask": hidden, "score": name, "wild": wild}
        problem = make(decided({**choices, "width of k": 8}, seed))
        # Half-precision products are its own: it is measured against the plain way in that precision.
        compare_all(problem, "sdpa", truth(problem, None))


@pytest.mark.parametrize("layout", ["heads last", "columns first", "offset", "gaps"])
def test_any_layout(layout: str) -> None:
    layouts = {f"layout of {name}": layout for name in "qkv"}
    problem = make(decided({**_SERVED, **layouts, "dtype": torch.float32, "mask": "a", "score": "scaled_dot"}))
    compare_all(problem, "sdpa", truth(problem, None))


def _qkv() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 2, 67, 8, generator=generator) for _ in range(3))


def test_nan_after_a_query_does_not_leak() -> None:
    q, k, v = _qkv()
    clean = regard.attention(q, k, v, mask=mask.causal(), backend="sdpa")
    for x, wild in ((k, torch.nan), (v, torch.inf)):
        x[0, 1, 40, 3] = wild
    out = regard.attention(q, k, v, mask=mask.causal(), backend="sdpa")
    assert bool(out[0, 1, 40:].isnan().all())
    torch.testing.assert_close(out[0, 1, :40], clean[0, 1, :40])
    assert torch.equal(out[1], clean[1])
    assert torch.equal(out[0, 0], clean[0, 0])


def test_nan_in_a_query_makes_its_row_nan() -> None:
    q, k, v = _qkv()
    clean = regard.attention(q, k, v, mask=mask.causal(), backend="sdpa")
    q[0, 0, 5, 2] = torch.nan
    out = regard.attention(q, k, v, mask=mask.causal(), backend="sdpa")
    assert bool(out[0, 0, 5].isnan().all())
    out[0, 0, 5] = clean[0, 0, 5]
    assert torch.equal(out, clean)


_REFUSED: dict[str, dict[str, Any]] = {
    "score": {"score": score.Cosine()},
    "query and key": {"score": score.Distance()},
    "normalizer": {"normalizer": normalizer.Sparsemax()},
    "sink": {"normalizer": normalizer.Softmax(0.0)},
    "summaries": {"summary": Summary(lse=True)},
    "softcap": {"softcap": 1.0},
    "bias": {"bias": torch.zeros(67, 67)},
    "dropout": {"dropout": 0.1},
    "masks": {"mask": mask.window(3, 0)},
}


@pytest.mark.parametrize("reason", [name for name in _REFUSED if name != "score"])
def test_what_it_refuses_goes_to_another_kernel(reason: str) -> None:
    q, k, v = _qkv()
    with pytest.raises(ValueError, match=reason):
        regard.attention(q, k, v, backend="sdpa", **_REFUSED[reason])
    with regard.record_backends() as ran:
        regard.attention(q, k, v, **_REFUSED[reason])
    assert ran in (["cpu"], ["tiled"])


def test_causal_from_the_end_is_refused() -> None:
    q, k, v = _qkv()
    with pytest.raises(ValueError, match="start"):
        regard.attention(q[:, :, :5], k, v, mask=mask.causal("end"), backend="sdpa")


def test_without_native_kernels_it_is_chosen_for_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.backends.cpu.extension.missing", "not there")
    q, k, v = _qkv()
    for words in ({}, {"mask": mask.causal()}, {"score": score.Dot()}):
        with regard.record_backends() as ran:
            regard.attention(q, k, v, **words)
        assert ran == ["sdpa"]


def test_matrix_units_are_preferred_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    half = [x.bfloat16() for x in _qkv()]
    for units, kernel in ((True, "sdpa"), (False, "cpu")):
        monkeypatch.setattr("regard.backends.choose._MATRIX_UNITS", units)
        with regard.record_backends() as ran:
            regard.attention(*half)
        assert ran == [kernel]
