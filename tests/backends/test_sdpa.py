"""The backend `sdpa`: torch's fused attention, under the same contract where it serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.compare import compare_once, compute_reference
from support.problems import DTYPES, fixed_choices, make_problem
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
def test_sdpa_matches_oracle(dtype: torch.dtype, hidden: str | None, name: str) -> None:
    if name == "bilinear" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("the score is computed in float32, which this backend refuses: see below")
    for seed, nonfinite in enumerate((None, "masked", "anywhere")):
        choices = {
            **_SERVED,
            "dtype": dtype,
            "parameters": dtype,
            "mask": hidden,
            "score": name,
            "nonfinite": nonfinite,
        }
        problem = make_problem(fixed_choices({**choices, "width of k": 8}, seed))
        # Half-precision products are its own: it is measured against the direct formula in that precision.
        compare_once(problem, "sdpa", compute_reference(problem, None))


@pytest.mark.parametrize("layout", ["heads last", "columns first", "offset", "gaps"])
def test_sdpa_of_any_layout(layout: str) -> None:
    layouts = {f"layout of {name}": layout for name in "qkv"}
    problem = make_problem(
        fixed_choices({**_SERVED, **layouts, "dtype": torch.float32, "mask": "a", "score": "scaled_dot"})
    )
    compare_once(problem, "sdpa", compute_reference(problem, None))


def _qkv() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 2, 67, 8, generator=generator) for _ in range(3))


def test_future_nan_does_not_leak_in_causal_sdpa() -> None:
    q, k, v = _qkv()
    clean = regard.attention(q, k, v, mask=mask.causal(), backend="sdpa")
    for x, nonfinite in ((k, torch.nan), (v, torch.inf)):
        x[0, 1, 40, 3] = nonfinite
    out = regard.attention(q, k, v, mask=mask.causal(), backend="sdpa")
    assert bool(out[0, 1, 40:].isnan().all())
    torch.testing.assert_close(out[0, 1, :40], clean[0, 1, :40])
    assert torch.equal(out[1], clean[1])
    assert torch.equal(out[0, 0], clean[0, 0])


def test_nan_query_gives_nan_row() -> None:
    q, k, v = _qkv()
    clean = regard.attention(q, k, v, mask=mask.causal(), backend="sdpa")
    q[0, 0, 5, 2] = torch.nan
    out = regard.attention(q, k, v, mask=mask.causal(), backend="sdpa")
    assert bool(out[0, 0, 5].isnan().all())
    out[0, 0, 5] = clean[0, 0, 5]
    assert torch.equal(out, clean)


_REFUSED: dict[str, dict[str, Any]] = {
    "score": {"score": score.Cosine()},
    "query or key": {"score": score.Distance()},
    "normalizer": {"normalizer": normalizer.Sparsemax()},
    "sink": {"normalizer": normalizer.Softmax(0.0)},
    "summary lse": {"summary": Summary(lse=True)},
    "softcap": {"softcap": 1.0},
    "bias": {"bias": torch.zeros(67, 67)},
    "dropout": {"dropout": 0.1},
    "masks": {"mask": mask.window(3, 0)},
}


@pytest.mark.parametrize("reason", [name for name in _REFUSED if name != "score"])
def test_refused_problem_is_served_by_other_backend(reason: str) -> None:
    q, k, v = _qkv()
    with pytest.raises(ValueError, match=reason):
        regard.attention(q, k, v, backend="sdpa", **_REFUSED[reason])
    with regard.record_backends() as ran:
        regard.attention(q, k, v, **_REFUSED[reason])
    assert ran in (["cpu"], ["tiled"])


def test_end_aligned_causal_mask_is_refused() -> None:
    q, k, v = _qkv()
    with pytest.raises(ValueError, match="start"):
        regard.attention(q[:, :, :5], k, v, mask=mask.causal("end"), backend="sdpa")


def test_sdpa_is_chosen_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.backends.cpu.extension.missing", "not there")
    q, k, v = _qkv()
    for words in ({}, {"mask": mask.causal()}, {"score": score.Dot()}):
        with regard.record_backends() as ran:
            regard.attention(q, k, v, **words)
        assert ran == ["sdpa"]


def test_sdpa_is_preferred_on_amx_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    half = [x.bfloat16() for x in _qkv()]
    for units, kernel in ((True, "sdpa"), (False, "cpu")):
        monkeypatch.setattr("regard.backends.machine.HAS_MATRIX_UNITS", units)
        monkeypatch.setattr("regard.backends.sdpa.is_fastest_for", {torch.bfloat16} if units else ())
        regard.clear_caches()
        with regard.record_backends() as ran:
            regard.attention(*half)
        assert ran == [kernel]
    regard.clear_caches()
