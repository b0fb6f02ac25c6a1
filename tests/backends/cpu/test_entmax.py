"""Sparsemax and entmax in the native kernels: long rows, and rounding of the threshold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle
from support.cases import BASE
from support.compare import compare, compute_reference
from support.problems import fixed_choices, make_problem

import regard
from regard import Summary, normalizer, score

# Rows longer than a block of keys, some with few nonzero weights and some with many.
_LONG_ROWS: dict[str, dict[str, Any]] = {
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


@pytest.mark.parametrize("name", _LONG_ROWS)
@pytest.mark.parametrize("kind", ["sparsemax", "entmax"])
def test_long_rows(name: str, kind: str) -> None:
    sizes = {"L": 131, "S": 431, "B": 1, "align": "end", "alpha": 1.5, "normalizer": kind}
    for summary in ("all", "lse", None):
        problem = make_problem(fixed_choices({**BASE, **sizes, "summary": summary, **_LONG_ROWS[name]}))
        compare(problem, "cpu", compute_reference(problem))


@pytest.mark.parametrize("kind", [normalizer.Sparsemax(), normalizer.Entmax(1.5)])
def test_large_weight_is_exact_among_thousands_of_small_ones(kind: normalizer.Normalizer, instructions: str) -> None:
    """Errors of the small weights do not accumulate in the large one, and all weights sum to 1."""
    s = torch.randn(9, 3000, generator=torch.Generator().manual_seed(0)) * 1e-4 + 1000.0
    s[:, 0] = torch.linspace(1000.3, 1000.9, 9)
    # The scores are the keys, the output is the first weight.
    q, v = s.new_ones(9, 1, 1), torch.zeros(9, 3000, 1)
    v[:, 0] = 1.0
    out, got = regard.attention(
        q, s[..., None], v, score=score.Dot(), normalizer=kind, backend="cpu", summary=Summary(rows=(0,))
    )
    reference = oracle.sparsemax if isinstance(kind, normalizer.Sparsemax) else oracle.entmax
    exact = reference(s.double(), 0)
    torch.testing.assert_close(out[:, 0, 0].double(), exact[:, 0], rtol=8 * torch.finfo(torch.float32).eps, atol=0)
    torch.testing.assert_close(
        got.rows[:, 0].double().sum(-1), torch.ones(9).double(), rtol=8 * torch.finfo(torch.float32).eps, atol=0
    )


@pytest.mark.parametrize("alpha", [1.05, 1.2, 1.5, 1.9, 2.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e6])
def test_entmax_at_every_scale_of_scores(alpha: float, size: float, instructions: str) -> None:
    """From nearly equal weights to a single nonzero one: as precise as the scores, and never NaN."""
    s = torch.randn(70, 300, generator=torch.Generator().manual_seed(1)) * size
    q, k = s.new_ones(70, 1, 1), s[..., None]
    arguments: dict[str, Any] = {
        "score": score.Dot(),
        "normalizer": normalizer.Entmax(alpha),
        "summary": Summary(full=True),
    }
    got = regard.attention(q, k, k, **arguments, backend="cpu")[1].full[:, 0].double()
    exact, baseline = oracle.entmax(s.double(), 0, alpha), oracle.entmax(s, 0, alpha).double()
    unit = torch.finfo(torch.float32).eps
    assert (got - exact).abs().max() <= 2 * (baseline - exact).abs().max() + 4 * unit * exact.max()
    torch.testing.assert_close(got.sum(-1), torch.ones(70).double(), rtol=8 * unit / (alpha - 1), atol=0)
