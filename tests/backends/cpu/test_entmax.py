"""Weights that come by a threshold, sparsemax and entmax, in the native kernels: long rows, and what rounding does to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle
from support.cases import PLAIN
from support.compare import judge, truth
from support.problems import decided, make

import regard
from regard import Summary, normalizer, score

# Of weights that come by a threshold: rows longer than a block of keys, some of them with few weights and some with many.
_STRIPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "of nearly equal scores": {"scale": 0.01},
    "of scores far apart": {"scale": 4.0},
    "causal": {"mask": "a", "mask a": "causal"},
    "window": {"mask": "a", "mask a": "window"},
    "documents": {"mask": "a", "mask a": "documents"},
    "dense": {"mask": "a", "mask a": "dense"},
    "bias": {"bias": "tensor", "axes of the bias": "BHLS", "bias of -inf": True},
    "bias of the keys": {"bias": "tensor", "axes of the bias": "S"},
    "ALiBi": {"bias": "alibi"},
    "softcap, distance and ALiBi": {"softcap": 5.0, "score": "distance", "bias": "alibi"},
    "additive": {"score": "additive"},
    "dropout": {"dropout": 0.3, "seed": 7, "L": 67},
    "bfloat16": {"dtype": torch.bfloat16, "parameters": torch.bfloat16},
}


@pytest.mark.parametrize("name", _STRIPS)
@pytest.mark.parametrize("word", ["sparsemax", "entmax"])
def test_strips(name: str, word: str) -> None:
    sizes = {"L": 131, "S": 431, "B": 1, "align": "end", "alpha": 1.5, "normalizer": word}
    for summary in ("all", "lse", None):
        problem = make(decided({**PLAIN, **sizes, "summary": summary, **_STRIPS[name]}))
        judge(problem, "cpu", truth(problem))


@pytest.mark.parametrize("word", [normalizer.Sparsemax(), normalizer.Entmax(1.5)])
def test_one_large_weight_among_thousands_of_small_ones(word: normalizer.Normalizer, instructions: str) -> None:
    """What the small ones are off, together, is not put upon the large one; and all weights sum to 1."""
    s = torch.randn(9, 3000, generator=torch.Generator().manual_seed(0)) * 1e-4 + 1000.0
    s[:, 0] = torch.linspace(1000.3, 1000.9, 9)
    # The scores are the keys, the output is the first weight.
    q, v = s.new_ones(9, 1, 1), torch.zeros(9, 3000, 1)
    v[:, 0] = 1.0
    out, seen = regard.attention(
        q, s[..., None], v, score=score.Dot(), normalizer=word, backend="cpu", summary=Summary(rows=(0,))
    )
    plain = oracle.sparsemax if isinstance(word, normalizer.Sparsemax) else oracle.entmax
    exact = plain(s.double(), 0)
    torch.testing.assert_close(out[:, 0, 0].double(), exact[:, 0], rtol=8 * torch.finfo(torch.float32).eps, atol=0)
    torch.testing.assert_close(
        seen.rows[:, 0].double().sum(-1), torch.ones(9).double(), rtol=8 * torch.finfo(torch.float32).eps, atol=0
    )


@pytest.mark.parametrize("alpha", [1.05, 1.2, 1.5, 1.9, 2.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e6])
def test_thresholds_of_every_size(alpha: float, size: float, instructions: str) -> None:
    """All weights equal, or but one of them 0; no better than the scores can tell, and never NaN."""
    s = torch.randn(70, 300, generator=torch.Generator().manual_seed(1)) * size
    q, k = s.new_ones(70, 1, 1), s[..., None]
    words: dict[str, Any] = {
        "score": score.Dot(),
        "normalizer": normalizer.Entmax(alpha),
        "summary": Summary(full=True),
    }
    got = regard.attention(q, k, k, **words, backend="cpu")[1].full[:, 0].double()
    exact, straight = oracle.entmax(s.double(), 0, alpha), oracle.entmax(s, 0, alpha).double()
    unit = torch.finfo(torch.float32).eps
    assert (got - exact).abs().max() <= 2 * (straight - exact).abs().max() + 4 * unit * exact.max()
    torch.testing.assert_close(got.sum(-1), torch.ones(70).double(), rtol=8 * unit / (alpha - 1), atol=0)
