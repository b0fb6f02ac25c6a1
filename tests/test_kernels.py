"""Every kernel against the oracle: outputs, summaries and gradients, for every word by name, and for random problems."""

from __future__ import annotations

import functools
from typing import Any

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from judge import KERNELS, Truth, judge, truth
from problems import DTYPES, Problem, decided, make, problems
from words import bias_names, normalizer_names, score_names, unknown

import regard

# A problem that is as plain as can be, at distinct primes; two tiles of 64 each way.
PLAIN: dict[str, Any] = {
    "dtype": torch.float32, "parameters": torch.float32, "L": 67, "S": 79, "B": 2, "heads": (2, 2), "D": 7, "E": 5,
    "score": "scaled_dot", "scale": None, "normalizer": "softmax", "with a sink": False, "mask": None, "bias": None,
    "softcap": None, "dropout": 0.0, "summary": "all", "top": 3, "rows": (-1, 0), "groups": (4,), "wild": None, "align": 2,
    "layout of q": "plain", "layout of k": "plain", "layout of v": "plain", "numbers": 5, "size": 1.0, "shift": 0.0,
}  # fmt: skip
_SMALL = {"L": 11, "S": 13, "heads": (1, 1), "B": 2}
_FORMS = ("number", "one", "per head")


def _cases() -> dict[str, dict[str, Any]]:
    """Every word, in every form in which it takes its parameters, apart from all others."""
    cases: dict[str, dict[str, Any]] = {}

    def add(label: str, **choices: Any) -> None:
        cases[f"{label}: " + ", ".join(str(x) for x in choices.values()) if choices else label] = choices

    for dtype in DTYPES:
        add("dtype", dtype=dtype)
        add("dtype", dtype=dtype, score="gaussian", parameters=dtype, shift=2.0)
    for layout in ("heads last", "columns first", "offset", "gaps"):
        add("layout", **{f"layout of {name}": layout for name in "qkv"})
    for name in score_names():
        add("score", score=name, **(_SMALL if name in unknown() else {}))
    for name in ("scaled_dot", "distance"):
        add("scale", score=name, scale=0.3)
    for form in _FORMS:
        add("temperature", score="cosine", temperature=form)
        add("sigma", score="gaussian", sigma=form)
        add("sink", **{"with a sink": True, "sink": form})
        add("bias of the sigmoid", **{"normalizer": "sigmoid", "bias of the sigmoid": form})
    for width in (7, 9):
        add("bilinear", score="bilinear", **{"width of k": width, "W": () if width == 7 else (4,)})
    for maps in ("none", "q", "k", "both"):
        for form in ("one", "per head"):
            forms = {
                "maps": maps,
                "v": () if form == "one" else (4,),
                "w_q": form,
                "w_k": form,
                "bias of the score": form,
            }
            add("additive", score="additive", **forms)
    for name in normalizer_names():
        add("normalizer", normalizer=name)
    for alpha in (1.2, 1.5, 1.8, 2.0):
        add("entmax", normalizer="entmax", alpha=alpha)
    for mask in ("causal", "window", "lengths", "prefix", "documents", "blocks", "dense", "where"):
        for align in ("start", "end"):
            add("mask", **{"mask": "a", "mask a": mask, "align": align})
    for join in ("a & b", "a | b", "~a", "(a | b) & c", "~(a & b) | c"):
        add("joined", **{"mask": join, "mask a": "causal", "mask b": "lengths", "mask c": "dense"})
    for axes in ("BHLS", "HLS", "LS", "S", "L", "BS", ""):
        add("bias", **{"bias": "tensor", "axes of the bias": axes, "bias of -inf": axes in ("BHLS", "LS")})
    for name in bias_names():
        add("bias", bias=name)
    add("bias", bias="alibi", slopes="of the paper")
    add("bias", bias="t5", bidirectional=False, buckets=32, max_distance=20)
    add("softcap", softcap=0.7)
    add("softcap", softcap=5.0, score="additive")
    for rate in (0.3, 1.0):
        add("dropout", dropout=rate, seed=2**40 + 3, **_SMALL)
    for summary in ("lse", "max", "entropy", "top", "received", "mass", "rows", "full", None):
        add("summary", summary=summary)
    for top in (1, 90):
        add("top", top=top)
    for wild in ("masked", "huge", "anywhere"):
        for score in ("scaled_dot", "gaussian", "additive"):
            add("wild", wild=wild, score=score, **{"mask": "a & b", "mask a": "lengths", "mask b": "causal"})
    for normalizer in normalizer_names():
        hidden = {"mask": "a & b", "mask a": "lengths", "mask b": "dense", "density": 0.03, "with a sink": True}
        add("rows with few keys", normalizer=normalizer, **hidden)
    return cases


CASES = _cases()


@functools.cache
def _case(name: str) -> tuple[Problem, Truth]:
    problem = make(decided({**PLAIN, **CASES[name]}))
    return problem, truth(problem)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_word(kernel: str, name: str) -> None:
    problem, told = _case(name)
    judge(problem, kernel, told)


def _judge_all(problem: Problem) -> None:
    told = truth(problem)
    for kernel in KERNELS:
        judge(problem, kernel, told)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("word", [regard.normalizer.Sparsemax(), regard.normalizer.Entmax(1.5)])
def test_one_large_weight_among_thousands_of_small_ones(
    word: regard.normalizer.Normalizer, dtype: torch.dtype, kernel: str
) -> None:
    """What the small ones are off, together, is not put upon the large one."""
    s = torch.randn(9, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-4
    s[:, 0] = torch.linspace(0.3, 0.9, 9)
    s = s.to(dtype)
    # The scores are the keys, the output is the first weight.
    q, v = s.new_ones(9, 1, 1), torch.zeros_like(s).index_fill(1, torch.tensor(0), 1.0)
    got = regard.attention(q, s[..., None], v[..., None], score=regard.score.Dot(), normalizer=word, kernel=kernel)
    plain = oracle.sparsemax if isinstance(word, regard.normalizer.Sparsemax) else oracle.entmax
    torch.testing.assert_close(
        got[:, 0, 0], plain(s.double(), 0)[:, 0].to(dtype), rtol=8 * torch.finfo(dtype).eps, atol=0
    )


_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=150, derandomize=True, **_COMMON)  # type: ignore[arg-type]
@given(problems())
def test_random(problem: Problem) -> None:
    _judge_all(problem)


@pytest.mark.slow
@settings(max_examples=1500, **_COMMON)  # type: ignore[arg-type]
@given(problems())
def test_random_at_length(problem: Problem) -> None:
    _judge_all(problem)


@pytest.mark.parametrize("strip", [1, 50, 700])
@settings(max_examples=15, derandomize=True, **_COMMON)  # type: ignore[arg-type]
@given(problem=problems())
def test_short_strips(strip: int, problem: Problem) -> None:
    """Strips and segments so short that heads of one group are taken apart, and rows, and batch rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regard.kernels.strip._STRIP", strip)
        patch.setattr("regard.kernels.strip._SEGMENT", 40 * strip)
        patch.setattr("regard.kernels.strip._TILE", 16)
        judge(problem, "tiled", truth(problem))
