"""A checked call, in one frozen record. What is wrong with it is said before anything runs.

The axis legend, used everywhere:

    B  batch rows            L  queries           D  width of a score (q and k)
    H  query heads           S  keys              E  width of a value
    G  key/value heads       H is a multiple of G: H/G query heads share each of them (grouped queries)

    q (B, H, L, D)    k (B, G, S, D)    v (B, G, S, E)    ->    output (B, H, L, E)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard import check
from regard.arguments import KINDS, added, align, check_seed, check_tensors, check_word, four_axes
from regard.function import Python
from regard.mask import Mask
from regard.normalizer import Normalizer, Softmax
from regard.position import Added, Bias
from regard.score import Dot, ScaledDot, Score, expand_heads
from regard.summary import Summary
from regard.tile import Sizes
from regard.word import Slot, read, slots, split

# The words that stand where none is given: made once.
_SCALED_DOT, _SOFTMAX, _NO_SUMMARY = ScaledDot(), Softmax(), Summary()


@dataclass(frozen=True)
class Plan:
    """What a call asks for, tensors aside: frozen, hashable, and writable as text."""

    score: Score
    normalizer: Normalizer
    mask: Mask | None
    bias: Bias | None
    softcap: float | None
    dropout: float
    seed: Any  # Slot, or int64 of shape () once filled; None without dropout
    summary: Summary
    bad_q: Any  # Slot, or bool (B, H, L): queries with NaN or inf, see `without_nonfinite`; None where there are none
    bad_k: Any  # the same for keys and their values, (B, G, S)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the tensors that a kernel gives, in order."""
        return ("out", *self.summary.outputs)

    def named(self, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """The gradients of the outputs by name, without those that are zero; numbers of keys have none."""
        pairs = zip(self.outputs, gradients, strict=True)
        return {name: g for name, g in pairs if g is not None and name != "top_keys"}

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Kernels look up in every call what they know of a plan: its words are hashed once.
        return hash(tuple([getattr(self, name) for name in self.__dataclass_fields__]))


class Problem(NamedTuple):
    """A plan, and the tensors it speaks of: q (B, H, L, D), k (B, G, S, D), v (B, G, S, E), and the words' own."""

    plan: Plan
    tensors: tuple[Tensor, ...]
    lead: Sequence[int]  # the axes of the user's q before (L, D)
    given: str  # the class of the score that was asked for, before it was reduced

    def restore(self, x: Tensor) -> Tensor:
        """Give an output (B, H, ...) the leading axes that q came with."""
        if len(self.lead) == 2:
            return x
        return x.reshape(*self.lead, *x.shape[2:])


def sizes(q: Tensor, k: Tensor) -> Sizes:
    """The sizes of a problem in four axes."""
    return Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])


# Do three tensors hold neither NaN nor inf? False where that is not known.
Finite = Callable[[Tensor, Tensor, Tensor], bool]


class _Known(NamedTuple):
    """What a call came to that was checked before."""

    plan: Plan
    given: str
    unchanged: bool  # q, k and v are those of the call, and the score holds no tensor
    start: int  # of all tensors of the call, those from here on are of the words after the score
    stop: int  # and from here on, of the summary


# By all that a call says but the numbers in its tensors: for a short sequence, to check takes longer than to compute.
_known: dict[tuple[Any, ...], _Known] = {}
_MOST_KNOWN = 1024


def pose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Score | Callable[[Tensor, Tensor], Tensor] | None,
    normalizer: Normalizer | None,
    mask: Mask | None,
    bias: Tensor | Bias | None,
    softcap: float | None,
    dropout: float,
    seed: int | Tensor | None,
    summary: Summary | None,
    kernel: str | None = None,
    quick: Finite | None = None,
) -> Problem:
    """Check a call of `attention` and split it into plan and tensors. Raises ValueError or TypeError, by argument.

    `kernel` is the one that is forced, if any; `quick` may tell, faster than torch can, that q, k and v hold neither NaN
    nor inf.
    """
    text: list[Any] = []
    found: list[Tensor] = []
    words = (q, k, v, softcap, dropout, score, normalizer, mask, bias, summary)
    # Where sizes are symbols, or tensors, they are good for this call alone.
    readable = not torch.compiler.is_compiling() and not torch._C._is_tracing() and read(words, KINDS, text, found)
    key = tuple(text)
    known = _known.get(key) if readable else None
    if known is not None:
        if dropout != 0.0 or seed is not None:
            seed = check_seed(dropout, seed, q.device)
        new_q, new_k, new_v = (q, k, v) if known.unchanged else four_axes(q, k, v)
        if mask is None or _is_left_to(kernel, q, score) or _are_finite(new_q, new_k, new_v, quick):
            tensors = found[known.start : known.stop]
            if isinstance(bias, Tensor):
                tensors[-1] = added(bias, q.shape[:-2], sizes(new_q, new_k))
            if isinstance(seed, Tensor) and dropout:
                tensors.append(seed)
            tensors += found[known.stop :]
            if not known.unchanged:
                new_q, new_k, reduced = (score if isinstance(score, Score) else _SCALED_DOT).reduce(new_q, new_k)
                new_v = _with_keys(new_v, new_k)
                tensors = [*_held(reduced), *tensors]
            tensors = [new_q, new_k, new_v, *tensors]
            return Problem(known.plan, _beside_q(known.plan, tensors), q.shape[:-2], known.given)
    problem = _pose(q, k, v, score, normalizer, mask, bias, softcap, dropout, seed, summary, kernel, quick)
    if readable and problem.plan.bad_q is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        same = all(x is y for x, y in zip(problem.tensors, (q, k, v), strict=False))
        unchanged = same and not slots(problem.plan.score)
        start, stop = 3 + len(_held(score)), len(found) - len(_held(summary))
        _known[key] = _Known(problem.plan, problem.given, unchanged, start, stop)
    return problem


def _pose(
    q: Tensor, k: Tensor, v: Tensor, score: Any, normalizer: Any, mask: Any, bias: Any, softcap: Any, dropout: Any,
    seed: Any, summary: Any, kernel: str | None, quick: Finite | None,
) -> Problem:  # fmt: skip
    """The same for a call that is not known."""
    check_tensors(q, k, v)
    lead = q.shape[:-2]
    q, k, v = four_axes(q, k, v)
    size = sizes(q, k)
    if dropout != 0.0 or seed is not None:
        seed = check_seed(dropout, seed, q.device)
    if softcap is not None:
        check.positive("softcap", softcap, ", or None")

    if score is None:
        score = _SCALED_DOT
    elif callable(score) and not isinstance(score, type | Score):
        score = Python.of(score, q, k)
    else:
        score = check_word("score", score, Score, q.device)
    score.check(size, q.shape[-1], k.shape[-1])
    if normalizer is None:
        normalizer = _SOFTMAX
    else:
        check_word("normalizer", normalizer, Normalizer, q.device).check(size)
    if summary is None:
        summary = _NO_SUMMARY
    else:
        check_word("summary", summary, Summary, q.device).check(size)
    if mask is not None:
        check_word("mask", mask, Mask, q.device).check(size, q.device)
    if bias is not None:
        bias = bias if isinstance(bias, Bias) else Added(added(bias, lead, size))
        check_word("bias", bias, Bias, q.device).check(size)

    bad_q = bad_k = None
    if mask is not None or bias is not None:
        mask, bias = align(mask, bias, size)
    if mask is not None and not _is_left_to(kernel, q, score) and not _are_finite(q, k, v, quick):
        bad_q, bad_k, bad_v = (_holds_nonfinite(x.detach()) for x in (q, k, v))
        if type(score) not in _AS_THEY_ARE:
            q, k, v = (x.masked_fill(bad[..., None], 0.0) for x, bad in ((q, bad_q), (k, bad_k), (v, bad_v)))
        bad_k = bad_k | bad_v

    given = type(score).__name__
    q, k, score = score.reduce(q, k)
    v, bad_k = _with_keys(v, k), None if bad_k is None else _with_keys(bad_k, k)
    tensors = [q, k, v]
    plan = Plan(
        score, normalizer, mask, bias, softcap, float(dropout), seed if dropout else None, summary, bad_q, bad_k
    )
    plan = split(plan, tensors)
    return Problem(plan, _beside_q(plan, tensors), lead, given)


def _held(word: Any) -> list[Tensor]:
    """The tensors that a score or a summary holds."""
    return [] if word is None else [x for x in vars(word).values() if isinstance(x, Tensor)]


def _with_keys(x: Tensor, k: Tensor) -> Tensor:
    """What there is per key/value head, (B, G, ...): where a parameter per query head has made a key per query head, values
    go along.
    """
    return x if x.shape[1] == k.shape[1] else expand_heads(x, k.shape[1] // x.shape[1])


def _beside_q(plan: Plan, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Numbers in tensors of shape () go where q is; what a user's function holds stays where the function expects it."""
    if len(tensors) == 3:
        return tuple(tensors)
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors[3:]):
        own = slots(plan.score) if isinstance(plan.score, Python) else []
        tensors = [tensor if i in own else tensor.to(device) for i, tensor in enumerate(tensors)]
    return tuple(tensors)


# Scores that take q and k as they come: there a kernel may let NaN be where it does no harm.
_AS_THEY_ARE = (ScaledDot, Dot)


def _is_left_to(kernel: str | None, q: Tensor, score: Any) -> bool:
    """Does a kernel keep NaN and inf from leaking by itself, with no pass over q, k and v before? Those of the GPU do; where
    they do not serve, the problem is `flagged`.
    """
    return (score is None or type(score) in _AS_THEY_ARE) and (q.device.type == "cuda" or kernel == "gpu")


def flagged(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Plan, Sequence[Tensor]]:
    """The same problem, with flags at the queries, keys and values that hold NaN or inf, if those were left to a kernel."""
    if plan.mask is None or plan.bad_q is not None:
        return plan, tensors
    bad_q, bad_k, bad_v = (_holds_nonfinite(x.detach()) for x in tensors[:3])
    plan = replace(plan, bad_q=Slot(len(tensors)), bad_k=Slot(len(tensors) + 1))
    return plan, (*tensors, bad_q, bad_k | bad_v)


def without_nonfinite(plan: Plan, tensors: Sequence[Tensor], given: Sequence[Any] | None = None) -> Sequence[Any]:
    """The tensors of a problem with 0 for queries, keys and values that hold NaN or inf; or what is `given` in their places,
    such as gradients.

    What is masked out must not leak, and 0 * NaN is NaN, in the output and in every gradient. So no product may see them; a
    kernel makes the *scores* of pairs that may attend NaN instead, and the row is NaN as it should be.
    """
    if plan.bad_q is None:
        return tensors if given is None else given
    bad_q, bad_k = (tensors[slot.index][..., None] for slot in (plan.bad_q, plan.bad_k))
    given = tensors if given is None else given
    cleared = [
        None if x is None else x.masked_fill(bad, 0.0) for x, bad in zip(given, (bad_q, bad_k, bad_k), strict=False)
    ]
    return *cleared, *given[3:]


def _holds_nonfinite(x: Tensor) -> Tensor:
    """Which vectors (..., D) hold NaN or inf. The largest size tells: one pass, where to ask each number takes three."""
    if not x.shape[-1]:
        return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    size: Tensor = torch.linalg.vector_norm(x, torch.inf, -1)
    return ~size.isfinite()


def _are_finite(q: Tensor, k: Tensor, v: Tensor, quick: Finite | None) -> bool:
    """True only if they hold no NaN and no inf, and that is cheap to find out. One sum tells: NaN and inf stay in it. A
    sum that overflows says False, which costs time and nothing else.
    """
    if quick is not None and quick(q, k, v):
        return True
    if torch.compiler.is_compiling() or q.device.type != "cpu":
        return False
    try:
        return all(math.isfinite(float(x.detach().sum())) for x in (q, k, v))
    except RuntimeError:  # inside torch.func.vmap no number can be read
        return False
