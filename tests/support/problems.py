"""Random problems over all components, each as arguments of the library and as arguments of the oracle.

Every choice is made by `pick(label, options)`, either by Hypothesis or from a dict of fixed choices. The contents of
tensors come from a generator whose seed is one more choice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import torch
from support import oracle
from support.components import (
    Draw,
    bias_names,
    draw_bias,
    draw_mask,
    draw_normalizer,
    draw_score,
    normalizer_names,
    score_names,
    scores_without_oracle,
)
from torch import Tensor

import regard

Pick = Callable[[str, Sequence[Any]], Any]
Tensors = dict[str, Tensor]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Mostly primes, so that axes cannot be confused and tiles of 64 are never full; and sizes at the edges of tiles.
LENGTHS = (1, 2, 5, 13, 31, 67, 131, 149)
WIDTHS = (2, 3, 7, 11, 17)
_PAIRS = 70_000


@dataclass
class Problem:
    """One call of attention.

    Args:
        tensors: q, k, v and the parameters of the components, for the library.
        clean: the same with NaN and inf replaced by 0, for the oracle.
        arguments: builds the arguments of `regard.attention` from the tensors.
        solve: computes the outputs of the oracle from the tensors, in their precision, and from a function that perturbs
            the scores.
        reached: bool (B, H, L, S), pairs that may attend and whose query, key or value contains NaN or inf.
        allowed: bool (B, H, L, S), pairs that may attend.
        alpha: alpha of entmax, or None.
        choices: the choices made, by label.
    """

    tensors: Tensors
    clean: Tensors
    arguments: Callable[[Tensors], dict[str, Any]]
    solve: Callable[..., dict[str, Tensor]]
    reached: Tensor
    allowed: Tensor
    alpha: float | None
    summary: regard.Summary | None
    choices: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Problem({self.choices})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["q"].dtype


def fixed_choices(choices: dict[str, Any], seed: int = 0) -> Pick:
    """Return a `pick` with some fixed choices; the others are random, except that masks are aligned as the problem."""
    choices = {"aligned by": "problem", **choices}
    rng = random.Random(seed)
    return lambda label, options: choices[label] if label in choices else rng.choice(list(options))


@st.composite
def problems(draw: st.DrawFn, among: dict[str, Sequence[Any]] | None = None, **choices: Any) -> Problem:
    """Hypothesis strategy of problems with some fixed choices, and some restricted to the options in `among`."""
    among = among or {}
    return make_problem(
        lambda label, options: choices[label] if label in choices else draw(st.sampled_from(among.get(label, options)))
    )


def make_problem(pick: Pick) -> Problem:
    """Build a problem from the choices of `pick`."""
    choices: dict[str, Any] = {}

    def choose(label: str, options: Sequence[Any]) -> Any:
        choices[label] = pick(label, options)
        return choices[label]

    dtype = choose("dtype", DTYPES)
    score = choose("score", score_names())
    # A score that the oracle does not implement is computed pair by pair, so the problem is small.
    slow = score in scores_without_oracle()
    lengths = LENGTHS[:4] if slow else LENGTHS
    L, S = choose("L", lengths), choose("S", lengths)
    fits = [n for n in (1, 2, 3, 4, 6, 9, 12, 18) if n * L * S <= _PAIRS]
    heads = [(g, r) for g in (1, 2, 3) for r in (1, 2, 3) if g * r in fits] or [(1, 1)]
    G, repeats = choose("heads", [(1, 1)] if slow else heads)
    H = G * repeats
    B = choose("B", [b for b in (1, 2, 3) if b * H in fits] or [1])
    D, E = choose("D", WIDTHS), choose("E", WIDTHS)
    parameters = torch.float64 if dtype == torch.float64 else choose("parameters", (torch.float32, dtype))
    draw = Draw(choose, torch.Generator().manual_seed(choose("numbers", range(1000))), B, H, G, L, S, D, parameters)

    score_part = draw_score(score, draw)
    normalizer = draw_normalizer(choose("normalizer", normalizer_names()), draw)
    mask, allowed = draw_mask(draw)
    bias = draw_bias(choose("bias", (None, None, "tensor", *bias_names())), draw)
    softcap = choose("softcap", (None, None, 0.7, 5.0))
    rate = choose("dropout", (0.0, 0.0, 0.0, 0.3, 0.8, 1.0)) if B * H * L * S < 20_000 else 0.0
    seed = choose("seed", (0, 7, -1, 2**40 + 3)) if rate else None
    keep_mask = oracle.keep(B, H, L, S, seed, rate) if rate else None
    summary, member = _summary(draw)

    # A shift keeps distances, but makes dot products so large that one weight is 1 and the others are 0.
    size, shift = choose("size", (1.0, 2.0)), choose("shift", (0.0, 2.0)) if score in oracle.AS_PRODUCT else 0.0
    size = size * D**-0.25 if score == "dot" else size
    shapes = {"q": (B, H, L, draw.D), "k": (B, G, S, draw.K), "v": (B, G, S, E)}
    clean = {
        n: _with_layout(draw, n, (draw.randn(*shape) * size + (shift if n != "v" else 0)).to(dtype))
        for n, shape in shapes.items()
    }
    parts = (score_part, normalizer, bias)
    clean |= {name: x for part in parts for name, x in part.tensors.items()}
    tensors, reached = _insert_nonfinite(draw, choose, clean, allowed, masked=mask is not None)

    def make_arguments(tensors: Tensors) -> dict[str, Any]:
        arguments = {"mask": mask, "softcap": softcap, "dropout": rate, "seed": seed, "summary": summary}
        arguments |= {
            "score": score_part.component(tensors),
            "normalizer": normalizer.component(tensors),
            "bias": bias.component(tensors),
        }
        return {**{n: tensors[n] for n in "qkv"}, **{n: x for n, x in arguments.items() if x is not None}}

    def solve(tensors: Tensors, noise: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        return oracle.attend(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            score=score_part.oracle(tensors),
            normalizer=normalizer.oracle(tensors),
            allowed=allowed,
            bias=_tensor(bias.oracle(tensors), tensors["q"]),
            softcap=softcap,
            keep_mask=keep_mask,
            rate=rate,
            sink=normalizer.sink(tensors),
            member=member,
            top=summary.top if summary else 0,
            rows=summary.row_numbers if summary else (),
            noise=noise,
        )

    return Problem(tensors, clean, make_arguments, solve, reached, allowed, normalizer.alpha, summary, choices)


def _tensor(bias: Any, like: Tensor) -> Tensor | None:
    return bias(like) if callable(bias) else bias


def _summary(draw: Draw) -> tuple[regard.Summary | None, Tensor | None]:
    """Return a summary, and its groups as (B, N, S)."""
    kind = draw.pick("summary", ("all", None, "lse", "max", "entropy", "top", "received", "mass", "rows", "full"))
    if kind is None:
        return None, None
    member = None
    if kind in ("all", "mass"):
        member = draw.flags(*draw.pick("groups", ((4,), (draw.B, 3), (1, 2))), draw.S)
    rows: int | tuple[int, ...] = ()
    if kind in ("all", "rows") and draw.L:
        rows = draw.pick("rows", (0, (-1, 0), (draw.L // 2, draw.L - 1, -draw.L, draw.L // 2)))
    arguments = regard.Summary(
        mass=member,
        rows=rows,
        top=draw.pick("top", (1, 3, draw.S + 2)) if kind in ("all", "top") else 0,
        **{name: kind in ("all", name) for name in ("lse", "max", "entropy", "received", "full")},
    )
    return arguments, None if member is None else (member if member.dim() == 3 else member[None]).expand(draw.B, -1, -1)


def _with_layout(draw: Draw, name: str, x: Tensor) -> Tensor:
    """Return a tensor of the same values with another memory layout."""
    layout = draw.pick(f"layout of {name}", ("plain", "plain", "heads last", "columns first", "offset", "gaps"))
    if layout == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns first":
        return x.mT.contiguous().mT
    if layout == "offset":
        return torch.nn.functional.pad(x, (3, 2, 1, 1), value=torch.nan)[..., 1:-1, 3:-2]
    if layout == "gaps":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    return x


def _insert_nonfinite(
    draw: Draw, choose: Pick, clean: Tensors, allowed: Tensor, masked: bool
) -> tuple[Tensors, Tensor]:
    """Insert NaN and inf into queries, keys and values of masked problems; return the tensors and the pairs reached."""
    tensors = dict(clean)
    where = choose("nonfinite", (None, None, "masked", "huge", "anywhere")) if masked else None
    nonfinite_q = torch.zeros(draw.B, draw.H, draw.L, dtype=torch.bool)
    nonfinite_k = torch.zeros(draw.B, draw.G, draw.S, dtype=torch.bool)
    if where in ("masked", "huge"):
        # Queries that may attend to no key, and keys that no query may attend to.
        nonfinite_q = ~allowed.any(-1)
        nonfinite_k = ~allowed.any(2).unflatten(1, (draw.G, -1)).any(2)
    elif where == "anywhere":
        nonfinite_q, nonfinite_k = (draw.flags(*x.shape, chance=0.05) for x in (nonfinite_q, nonfinite_k))
    nonfinite_v = nonfinite_k & draw.flags(*nonfinite_k.shape, chance=0.5)
    nonfinite_k = nonfinite_k & (~nonfinite_v | draw.flags(*nonfinite_k.shape, chance=0.5))
    for name, is_nonfinite in (("q", nonfinite_q), ("k", nonfinite_k), ("v", nonfinite_v)):
        x = clean[name]
        huge = 1e15 if x.dtype != torch.float16 else 6e4
        values = [huge, -huge, huge] if where == "huge" else [torch.nan, torch.inf, -torch.inf]
        values = torch.tensor(values)[draw.integers(3, *x.shape)]
        selected = is_nonfinite[..., None] & (draw.flags(*x.shape, chance=0.3) | (torch.arange(x.shape[-1]) == 0))
        # `_overwrite` keeps the layout. The oracle sees 0 in every vector that contains a nonfinite value.
        tensors[name] = _overwrite(x, selected, values.to(x.dtype))
        clean[name] = _overwrite(x, is_nonfinite[..., None].expand(x.shape), torch.zeros_like(x))
    nonfinite_keys = (nonfinite_k | nonfinite_v).repeat_interleave(draw.H // max(draw.G, 1), 1)
    return tensors, allowed & (nonfinite_q[..., :, None] | nonfinite_keys[..., None, :])


def _overwrite(x: Tensor, selected: Tensor, values: Tensor) -> Tensor:
    if not selected.any():
        return x
    # Copying the storage keeps offset and strides.
    copy = torch.as_strided(x, (x.untyped_storage().size() // x.element_size(),), (1,), 0).clone()
    copy = torch.as_strided(copy, x.shape, x.stride(), x.storage_offset())
    copy[selected] = values[selected]
    return copy
