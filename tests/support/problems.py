"""Random problems over the whole vocabulary, each as the library is asked and as the oracle understands it.

Every decision goes through `pick(label, options)`: hypothesis takes it, or a list of decisions made beforehand. What is
no decision (the numbers in the tensors) comes from a generator whose seed is one more decision.
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
    unknown,
)
from torch import Tensor

import regard

Pick = Callable[[str, Sequence[Any]], Any]
Tensors = dict[str, Tensor]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Primes, so that no axis is mistaken for another and no tile of 64 comes out even; and the sizes at the edges.
LENGTHS = (1, 2, 5, 13, 31, 67, 131, 149)
WIDTHS = (2, 3, 7, 11, 17)
_PAIRS = 70_000


@dataclass
class Problem:
    """One call.

    Args:
        tensors: q, k, v and the parameters of the words: what gradients are taken of, as the library gets them.
        clean: the same, with 0 for NaN and inf: as the oracle gets them.
        ask: the arguments of `regard.attention`, from the tensors.
        solve: the outputs by the oracle, from the tensors in the precision that they have.
        reached: bool (B, H, L, S), pairs that may attend and whose query, key or value holds NaN or inf.
        allowed: bool (B, H, L, S), pairs that may attend.
        alpha: that of an entmax.
        choices: what was decided.
    """

    tensors: Tensors
    clean: Tensors
    ask: Callable[[Tensors], dict[str, Any]]
    solve: Callable[[Tensors], dict[str, Tensor]]
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


def decided(choices: dict[str, Any], seed: int = 0) -> Pick:
    """Decisions made beforehand; those that were not are taken at random."""
    chance = random.Random(seed)
    return lambda label, options: choices[label] if label in choices else chance.choice(list(options))


@st.composite
def problems(draw: st.DrawFn, among: dict[str, Sequence[Any]] | None = None, **choices: Any) -> Problem:
    """Random problems in which some decisions were made beforehand, and some are taken `among` other options."""
    among = among or {}
    return make(
        lambda label, options: choices[label] if label in choices else draw(st.sampled_from(among.get(label, options)))
    )


def make(pick: Pick) -> Problem:
    """A problem from decisions."""
    choices: dict[str, Any] = {}

    def choose(label: str, options: Sequence[Any]) -> Any:
        choices[label] = pick(label, options)
        return choices[label]

    dtype = choose("dtype", DTYPES)
    score = choose("score", score_names())
    # A score that the oracle does not know by name is scored pair by pair, of one head.
    slow = score in unknown()
    lengths = LENGTHS[:4] if slow else LENGTHS
    L, S = choose("L", lengths), choose("S", lengths)
    fits = [n for n in (1, 2, 3, 4, 6, 9, 12, 18) if n * L * S <= _PAIRS]
    heads = [(g, r) for g in (1, 2, 3) for r in (1, 2, 3) if g * r in fits] or [(1, 1)]
    G, repeats = choose("heads", [(1, 1)] if slow else heads)
    H = G * repeats
    B = choose("B", [b for b in (1, 2, 3) if b * H in fits] or [1])
    D, E = choose("D", WIDTHS), choose("E", WIDTHS)
    parameters = torch.float64 if dtype == torch.float64 else choose("parameters", (torch.float32, dtype))
    on = Draw(choose, torch.Generator().manual_seed(choose("numbers", range(1000))), B, H, G, L, S, D, parameters)

    score_part = draw_score(score, on)
    normalizer = draw_normalizer(choose("normalizer", normalizer_names()), on)
    mask, allowed = draw_mask(on)
    bias = draw_bias(choose("bias", (None, None, "tensor", *bias_names())), on)
    softcap = choose("softcap", (None, None, 0.7, 5.0))
    rate = choose("dropout", (0.0, 0.0, 0.0, 0.3, 0.8, 1.0)) if B * H * L * S < 20_000 else 0.0
    seed = choose("seed", (0, 7, -1, 2**40 + 3)) if rate else None
    kept = oracle.keep(B, H, L, S, seed, rate) if rate else None
    summary, member = _summary(on)

    # Far from the origin, distances are the same, and products so large that one weight is 1 and the others 0.
    size, shift = choose("size", (1.0, 2.0)), choose("shift", (0.0, 2.0)) if score in oracle.AS_PRODUCT else 0.0
    size = size * D**-0.25 if score == "dot" else size
    shapes = {"q": (B, H, L, on.D), "k": (B, G, S, on.K), "v": (B, G, S, E)}
    clean = {
        n: _lay(on, n, (on.randn(*shape) * size + (shift if n != "v" else 0)).to(dtype)) for n, shape in shapes.items()
    }
    parts = (score_part, normalizer, bias)
    clean |= {name: x for part in parts for name, x in part.tensors.items()}
    tensors, reached = _plant(on, choose, clean, allowed, masked=mask is not None)

    def ask(own: Tensors) -> dict[str, Any]:
        asked = {"mask": mask, "softcap": softcap, "dropout": rate, "seed": seed, "summary": summary}
        asked |= {"score": score_part.word(own), "normalizer": normalizer.word(own), "bias": bias.word(own)}
        return {**{n: own[n] for n in "qkv"}, **{n: x for n, x in asked.items() if x is not None}}

    def solve(own: Tensors) -> dict[str, Tensor]:
        return oracle.attend(
            own["q"],
            own["k"],
            own["v"],
            score=score_part.plain(own),
            normalizer=normalizer.plain(own),
            allowed=allowed,
            bias=_tensor(bias.plain(own), own["q"]),
            softcap=softcap,
            kept=kept,
            rate=rate,
            sink=normalizer.sink(own),
            member=member,
            top=summary.top if summary else 0,
            rows=summary.row_numbers if summary else (),
        )

    return Problem(tensors, clean, ask, solve, reached, allowed, normalizer.alpha, summary, choices)


def _tensor(bias: Any, like: Tensor) -> Tensor | None:
    return bias(like) if callable(bias) else bias


def _summary(on: Draw) -> tuple[regard.Summary | None, Tensor | None]:
    """A summary, and its groups as (B, N, S)."""
    wanted = on.pick("summary", ("all", None, "lse", "max", "entropy", "top", "received", "mass", "rows", "full"))
    if wanted is None:
        return None, None
    member = None
    if wanted in ("all", "mass"):
        member = on.flags(*on.pick("groups", ((4,), (on.B, 3), (1, 2))), on.S)
    rows: int | tuple[int, ...] = ()
    if wanted in ("all", "rows") and on.L:
        rows = on.pick("rows", (0, (-1, 0), (on.L // 2, on.L - 1, -on.L, on.L // 2)))
    asked = regard.Summary(
        mass=member,
        rows=rows,
        top=on.pick("top", (1, 3, on.S + 2)) if wanted in ("all", "top") else 0,
        **{name: wanted in ("all", name) for name in ("lse", "max", "entropy", "received", "full")},
    )
    return asked, None if member is None else (member if member.dim() == 3 else member[None]).expand(on.B, -1, -1)


def _lay(on: Draw, name: str, x: Tensor) -> Tensor:
    """The same numbers, laid out in memory in another way."""
    layout = on.pick(f"layout of {name}", ("plain", "plain", "heads last", "columns first", "offset", "gaps"))
    if layout == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns first":
        return x.mT.contiguous().mT
    if layout == "offset":
        return torch.nn.functional.pad(x, (3, 2, 1, 1), value=torch.nan)[..., 1:-1, 3:-2]
    if layout == "gaps":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    return x


def _plant(on: Draw, choose: Pick, clean: Tensors, allowed: Tensor, masked: bool) -> tuple[Tensors, Tensor]:
    """NaN and inf in queries, keys and values, and the pairs that they reach. Without a mask there is nothing to show."""
    tensors = dict(clean)
    where = choose("wild", (None, None, "masked", "huge", "anywhere")) if masked else None
    nonfinite_q = torch.zeros(on.B, on.H, on.L, dtype=torch.bool)
    nonfinite_k = torch.zeros(on.B, on.G, on.S, dtype=torch.bool)
    if where in ("masked", "huge"):
        # Rows that may attend to nothing, and keys that nobody may attend to.
        nonfinite_q = ~allowed.any(-1)
        nonfinite_k = ~allowed.any(2).unflatten(1, (on.G, -1)).any(2)
    elif where == "anywhere":
        nonfinite_q, nonfinite_k = (on.flags(*x.shape, chance=0.05) for x in (nonfinite_q, nonfinite_k))
    bad_v = nonfinite_k & on.flags(*nonfinite_k.shape, chance=0.5)
    nonfinite_k = nonfinite_k & (~bad_v | on.flags(*nonfinite_k.shape, chance=0.5))
    for name, bad in (("q", nonfinite_q), ("k", nonfinite_k), ("v", bad_v)):
        x = clean[name]
        huge = 1e15 if x.dtype != torch.float16 else 6e4
        wild = [huge, -huge, huge] if where == "huge" else [torch.nan, torch.inf, -torch.inf]
        wild = torch.tensor(wild)[on.whole(3, *x.shape)]
        # One number of a vector, or all of them.
        spots = bad[..., None] & (on.flags(*x.shape, chance=0.3) | (torch.arange(x.shape[-1]) == 0))
        # Written in place, so that the layout stays; a vector with one such number is 0 for the oracle.
        tensors[name] = _written(x, spots, wild.to(x.dtype))
        clean[name] = _written(x, bad[..., None].expand(x.shape), torch.zeros_like(x))
    bad_keys = (nonfinite_k | bad_v).repeat_interleave(on.H // max(on.G, 1), 1)
    return tensors, allowed & (nonfinite_q[..., :, None] | bad_keys[..., None, :])


def _written(x: Tensor, spots: Tensor, values: Tensor) -> Tensor:
    if not spots.any():
        return x
    # A copy of the whole storage keeps offset and strides.
    copy = torch.as_strided(x, (x.untyped_storage().size() // x.element_size(),), (1,), 0).clone()
    copy = torch.as_strided(copy, x.shape, x.stride(), x.storage_offset())
    copy[spots] = values[spots]
    return copy
