"""Calls of q, k, v and a summary alone are served without a plan, with the results of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard import Summary, score
from regard.backends.cpu import extension

pytestmark = pytest.mark.skipif(extension.missing is not None, reason="the native kernels serve these calls")

_SUMMARIES = {
    "none": None,
    "lse": Summary(lse=True),
    "entropy, max": Summary(entropy=True, max=True),
    "top": Summary(top=3),
    "received, full": Summary(received=True, full=True),
    "all": Summary(lse=True, max=True, entropy=True, top=64, received=True, full=True),
}


def _qkv(L: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(L)
    shapes = ((2, 6, L, 16), (2, 3, 13, 16), (2, 3, 13, 5))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _tensors(result: Any) -> dict[str, Tensor]:
    out, summary = result if isinstance(result, tuple) else (result, None)
    return {"out": out, **({} if summary is None else summary.named)}


@pytest.mark.parametrize("name", _SUMMARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("L", [1, 9])
def test_call_without_plan_gives_same_bits(name: str, dtype: torch.dtype, L: int) -> None:
    q, k, v = _qkv(L, dtype)
    expected = _tensors(regard.attention(q, k, v, score=score.ScaledDot(), summary=_SUMMARIES[name], backend="cpu"))
    regard.clear_caches()
    with regard.record_backends() as ran:
        results = _tensors(regard.attention(q, k, v, summary=_SUMMARIES[name]))
    if ran == ["cpu"]:
        assert list(results) == list(expected)
        assert all(torch.equal(x, expected[key]) for key, x in results.items())
    else:  # torch's matrix units are faster for the output alone
        assert (ran, name) == (["sdpa"], "none")


def test_only_calls_without_plan_leave_cache_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    from regard.plan import cache

    q, k, v = _qkv(5)
    regard.clear_caches()
    regard.attention(q, k, v)
    regard.attention(q, k, v, summary=Summary(entropy=True, top=2))
    assert not cache._entries
    for summary in (Summary(rows=0), Summary(mass=torch.ones(1, 13, dtype=torch.bool)), Summary(top=65)):
        before = len(cache._entries)
        regard.attention(q, k, v, summary=summary)
        assert len(cache._entries) == before + 1
    q.requires_grad_()
    assert regard.attention(q, k, v, summary=Summary(entropy=True))[1].entropy.requires_grad
    assert len(cache._entries) == 4


@pytest.mark.parametrize(
    ("invalid", "error"),
    [
        ({"lse": 1}, "summary: lse is 1"),
        ({"top": True}, "summary: top is True"),
        ({"top": -1}, "summary: top is -1"),
        ({"top": 2.0}, "summary: top is 2.0"),
        ({"top": [2]}, "summary: top is"),
        ({"other": (1,)}, "summary: other is 1"),
    ],
)
def test_invalid_summary_raises_after_equal_valid_one(invalid: dict[str, Any], error: str) -> None:
    q, k, v = _qkv(5)
    for valid in (Summary(lse=True), Summary(top=1), Summary(top=2)):
        regard.attention(q, k, v, summary=valid)
    with pytest.raises((TypeError, ValueError), match=error):
        regard.attention(q, k, v, summary=Summary(**invalid))
    with pytest.raises(TypeError, match="summary is"):
        regard.attention(q, k, v, summary=invalid)  # type: ignore[call-overload]
