"""A base problem, and test cases that each change one aspect of it."""

from __future__ import annotations

from typing import Any

import torch
from support.components import bias_names, normalizer_names, score_names, scores_without_oracle
from support.problems import DTYPES

# The base problem. Sizes are distinct primes; L and S span two tiles of 64.
BASE: dict[str, Any] = {
    "dtype": torch.float32, "parameters": torch.float32, "L": 67, "S": 79, "B": 2, "heads": (2, 2), "D": 7, "E": 5,
    "score": "scaled_dot", "scale": None, "normalizer": "softmax", "with a sink": False, "mask": None, "bias": None,
    "softcap": None, "dropout": 0.0, "summary": "all", "top": 3, "rows": (-1, 0), "groups": (4,), "nonfinite": None, "align": 2,
    "layout of q": "plain", "layout of k": "plain", "layout of v": "plain", "numbers": 5, "size": 1.0, "shift": 0.0,
}  # fmt: skip
_SMALL = {"L": 11, "S": 13, "heads": (1, 1), "B": 2}
_FORMS = ("number", "one", "per head")


def _cases() -> dict[str, dict[str, Any]]:
    """Return one case per component and per form of its parameters."""
    cases: dict[str, dict[str, Any]] = {}

    def add(label: str, **choices: Any) -> None:
        cases[f"{label}: " + ", ".join(str(x) for x in choices.values()) if choices else label] = choices

    for dtype in DTYPES:
        add("dtype", dtype=dtype)
        add("dtype", dtype=dtype, score="gaussian", parameters=dtype, shift=2.0)
    for layout in ("heads last", "columns first", "offset", "gaps"):
        add("layout", **{f"layout of {name}": layout for name in "qkv"})
    for name in score_names():
        add("score", score=name, **(_SMALL if name in scores_without_oracle() else {}))
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
    add("mask", **{"mask": "a", "mask a": "packed"})
    for mask, by in (("causal", "row"), ("causal", "query"), ("window", "row"), ("window", "query")):
        add("aligned", **{"mask": "a", "mask a": mask, "aligned by": by})
    for join in ("a & b", "a | b", "~a", "(a | b) & c", "~(a & b) | c"):
        add("joined", **{"mask": join, "mask a": "causal", "mask b": "lengths", "mask c": "dense"})
    for axes in ("BHLS", "HLS", "LS", "S", "L", "BS", ""):
        add("bias", **{"bias": "tensor", "axes of the bias": axes, "bias of -inf": axes in ("BHLS", "LS")})
    for name in bias_names():
        add("bias", bias=name)
    add("bias", bias="alibi", slopes="paper")
    add("bias", bias="t5", bidirectional=False, buckets=32, max_distance=20)
    add("softcap", softcap=0.7)
    add("softcap", softcap=5.0, score="additive")
    for rate in (0.3, 1.0):
        add("dropout", dropout=rate, seed=2**40 + 3, **_SMALL)
    for summary in ("lse", "max", "entropy", "top", "received", "mass", "rows", "full", None):
        add("summary", summary=summary)
    for top in (1, 90):
        add("top", top=top)
    for nonfinite in ("masked", "huge", "anywhere"):
        for score in ("scaled_dot", "gaussian", "additive"):
            add(
                "nonfinite",
                nonfinite=nonfinite,
                score=score,
                **{"mask": "a & b", "mask a": "lengths", "mask b": "causal"},
            )
    for normalizer in normalizer_names():
        hidden = {"mask": "a & b", "mask a": "lengths", "mask b": "dense", "density": 0.03, "with a sink": True}
        add("rows with few keys", normalizer=normalizer, **hidden)
    return cases


CASES = _cases()
