"""A checked call, in one frozen record. Every shape error is raised here, before anything runs.

The axis legend, used everywhere:

    B  batch rows            L  queries           D  width of a score (q and k)
    H  query heads           S  keys              E  width of a value
    G  key/value heads       H is a multiple of G: H/G query heads share each of them (grouped queries)

    q (B, H, L, D)    k (B, G, S, D)    v (B, G, S, E)    ->    output (B, H, L, E)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from regard import check
from regard.function import Python
from regard.mask import Mask
from regard.normalizer import Normalizer, Softmax
from regard.position import Added, Bias
from regard.score import Product, ScaledDot, Score, expand_heads
from regard.summary import Summary
from regard.tile import Align, Sizes
from regard.word import slots, split

_AXES = {"q": "(..., H, L, D)", "k": "(..., G, S, D)", "v": "(..., G, S, E)"}
# The words that stand where none is given: made once.
_SCALED_DOT, _SOFTMAX, _NO_SUMMARY = ScaledDot(), Softmax(), Summary()
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    bad_q: Any  # Slot, or bool (B, H, L): queries with NaN or inf, which were set to 0; None where there are none
    bad_k: Any  # the same for keys and their values, (B, G, S)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the tensors that a kernel gives, in order."""
        return ("out", *self.summary.outputs)


_PLAIN = Plan(Product(None), _SOFTMAX, None, None, None, 0.0, None, _NO_SUMMARY, None, None)


@dataclass(frozen=True)
class Problem:
    """A plan, and the tensors it speaks of: q (B, H, L, D), k (B, G, S, D), v (B, G, S, E), and the words' own."""

    plan: Plan
    tensors: tuple[Tensor, ...]
    lead: tuple[int, ...]  # the axes of the user's q before (L, D)
    given: str  # the class of the score that was asked for, before it was reduced

    def restore(self, x: Tensor) -> Tensor:
        """Give an output (B, H, ...) the leading axes that q came with."""
        if len(self.lead) == 2:
            return x
        return x.reshape(*self.lead, *x.shape[2:])


def sizes(q: Tensor, k: Tensor) -> Sizes:
    """The sizes of a problem in four axes."""
    return Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])


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
) -> Problem:
    """Check a call of `attention` and split it into plan and tensors. Raises ValueError or TypeError, by argument."""
    _check_tensors(q, k, v)
    lead = tuple(q.shape[:-2])
    q, k, v = _four_axes(q, k, v)
    size = sizes(q, k)
    if (
        score is None and normalizer is None and mask is None and bias is None and softcap is None and seed is None
        and summary is None and dropout == 0.0
    ):  # fmt: skip
        # The most common call: for a short sequence, taking the words apart would cost more than the kernel.
        _SCALED_DOT.check(size, q.shape[-1], k.shape[-1])
        return Problem(_PLAIN, (q, k, v), lead, "ScaledDot")
    if dropout != 0.0 or seed is not None:
        seed = _seed(dropout, seed, q.device)
    if softcap is not None:
        check.positive("softcap", softcap, ", or None")

    if score is None:
        score = _SCALED_DOT
    elif callable(score) and not isinstance(score, type | Score):
        score = Python.of(score, q, k)
    else:
        score = _word("score", score, Score, q.device)
    score.check(size, q.shape[-1], k.shape[-1])
    if normalizer is None:
        normalizer = _SOFTMAX
    else:
        _word("normalizer", normalizer, Normalizer, q.device).check(size)
    if summary is None:
        summary = _NO_SUMMARY
    else:
        _word("summary", summary, Summary, q.device).check(size)
    if mask is not None:
        _word("mask", mask, Mask, q.device).check(size, q.device)
    if bias is not None:
        bias = _bias(bias, lead, size)
        _word("bias", bias, Bias, q.device).check(size)

    bad_q = bad_k = None
    if mask is not None or bias is not None:
        mask, bias = _align(mask, bias, size)
    if mask is not None:
        q, k, v, bad_q, bad_k = _without_nonfinite(q, k, v)

    given = type(score).__name__
    q, k, score = score.reduce(q, k)
    if k.shape[1] != v.shape[1]:
        # A parameter per query head has made a key per query head: values go along.
        repeats = k.shape[1] // v.shape[1]
        v, bad_k = expand_heads(v, repeats), None if bad_k is None else expand_heads(bad_k, repeats)
    tensors = [q, k, v]
    plan = Plan(
        score, normalizer, mask, bias, softcap, float(dropout), seed if dropout else None, summary, bad_q, bad_k
    )
    plan = split(plan, tensors)
    if any(tensor.device != q.device for tensor in tensors):
        # Numbers in tensors of shape (); what a user's function holds stays where the function expects it.
        own = slots(plan.score) if isinstance(plan.score, Python) else []
        tensors = [tensor if i in own else tensor.to(q.device) for i, tensor in enumerate(tensors)]
    return Problem(plan, tuple(tensors), lead, given)


W = TypeVar("W", Score, Normalizer, Summary, Mask, Bias)

_WORDS: dict[type[Any], str] = {
    Score: "one of regard.score, such as score.Dot(), or a function (q, k) -> scores",
    Normalizer: "one of regard.normalizer, such as normalizer.Softmax()",
    Mask: "one of regard.mask, such as mask.causal()",
    Bias: "a float tensor that broadcasts to (B, H, L, S), position.ALiBi or position.T5",
    Summary: "a regard.Summary, such as Summary(lse=True)",
}
_ABSTRACT = (Score, Normalizer, Mask, Bias)


def _word(name: str, word: Any, kind: type[W], device: torch.device) -> W:
    """Raise unless it is a word of its kind, with its tensors beside q."""
    if not isinstance(word, kind) or type(word) in _ABSTRACT:
        raise check.wrong(name, word, _WORDS[kind] + _hint(word, kind), False)
    _beside(name, word, device)
    return word


def _hint(value: object, kind: type[Any]) -> str:
    """What may have been meant."""
    if isinstance(value, type) and issubclass(value, kind) and value not in _ABSTRACT:
        return f" (an object of this class: {value.__name__}(...))"
    if kind is Mask and check.is_floats(value):
        return " (what is added to the scores goes into bias=)"
    if kind is Mask and isinstance(value, Tensor):
        return ", or mask.dense(tensor) for a tensor of bools, True = may attend"
    if kind is Bias and check.is_bools(value):
        return " (bools go into mask=mask.dense(tensor), True = may attend)"
    if kind is Bias and isinstance(value, torch.nn.Module):
        return " (the modules of regard.position are called before, on the input or on q and k)"
    return ""


def _beside(name: str, word: Any, device: torch.device) -> None:
    """Raise where a tensor of a word is on another device than q: to move it would cost a copy in every call. As
    everywhere in torch, a number in a tensor of shape () on the CPU goes with any device.
    """
    for field, value in vars(word).items():
        if isinstance(value, Tensor):
            if value.device != device and (value.dim() or value.device.type != "cpu"):
                raise ValueError(f"{name}: {field} is on {value.device} but q is on {device}; expected the same")
        elif dataclasses.is_dataclass(value):
            _beside(name, value, device)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided:
            nested = isinstance(x, Tensor) and x.is_nested
            hint = " (pad it and give mask.lengths, or pack it and give mask.documents)" if nested else ""
            raise check.wrong(name, x, f"an ordinary dense tensor {_AXES[name]}{hint}", False)
        if x.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected at least two axes, {_AXES[name]}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}; expected float32, float64, bfloat16 or float16")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype} but q has {q.dtype}; expected the same")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; expected the same")
        if x.dim() != q.dim():
            raise ValueError(f"{name} has shape {tuple(x.shape)} but q has {tuple(q.shape)}; expected as many axes")
        batch = slice(None, -3) if q.dim() > 3 else slice(None, -2)
        for got, expected in zip(x.shape[batch], q.shape[batch], strict=True):
            if got not in (1, expected):
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; expected the batch axes of q, {tuple(q.shape[batch])}, or 1"
                )
    if q.dim() > 3:
        H, G = q.shape[-3], k.shape[-3]
        if H != G and (G == 0 or H % G):
            raise ValueError(
                f"k has {G} heads (shape {tuple(k.shape)}) but q has {H} (shape {tuple(q.shape)}); expected k "
                f"{_AXES['k']} with as many heads, or a divisor of them (grouped queries)"
            )
        if v.shape[-3] != G:
            raise ValueError(
                f"v has {v.shape[-3]} heads (shape {tuple(v.shape)}) but k has {G} (shape {tuple(k.shape)}); "
                "expected as many"
            )
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"v has {v.shape[-2]} keys (shape {tuple(v.shape)}) but k has {k.shape[-2]} (shape {tuple(k.shape)}); "
            f"expected as many, v {_AXES['v']} for k {_AXES['k']}"
        )


def _four_axes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(L, D) -> (1, 1, L, D); (B, L, D) -> (B, 1, L, D); (X, Y, H, L, D) -> (X*Y, H, L, D). Batch axes of 1 expand."""
    if q.dim() == 2:
        return q[None, None], k[None, None], v[None, None]
    if q.dim() == 3:
        q, k, v = q[:, None], k[:, None], v[:, None]
    batch = q.shape[:-3]
    if k.shape[:-3] != batch:
        k = k.expand(*batch, *k.shape[-3:])
    if v.shape[:-3] != batch:
        v = v.expand(*batch, *v.shape[-3:])
    return (q, k, v) if q.dim() == 4 else (q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4))


def _seed(dropout: float, seed: int | Tensor | None, device: torch.device) -> Tensor:
    if not check.is_number(dropout) or not 0.0 <= dropout <= 1.0:
        expected = "the chance that a weight is dropped, a number from 0 to 1"
        raise check.wrong("dropout", dropout, expected, check.is_number(dropout))
    if seed is None:
        return torch.randint(-(1 << 63), (1 << 63) - 1, (), device=device)
    expected = "an int of 64 bits, an int64 tensor of shape (), or None to draw one"
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim():
            raise check.wrong("seed", seed, expected, seed.dtype == torch.int64)
        if seed.device != device and seed.device.type != "cpu":
            raise ValueError(f"seed is on {seed.device} but q is on {device}; expected the same")
        return seed
    if not check.is_int(seed) or not -(1 << 63) <= seed < 1 << 63:
        raise check.wrong("seed", seed, expected, check.is_int(seed))
    return torch.tensor(seed, device=device)


def _bias(bias: Tensor | Bias, lead: tuple[int, ...], size: Sizes) -> Bias:
    if isinstance(bias, Bias):
        return bias
    if not check.is_floats(bias):
        raise check.wrong("bias", bias, _WORDS[Bias] + _hint(bias, Bias), False)
    axes = (*lead, size.L, size.S)
    if bias.dim() > max(4, len(axes)) or (bias.dim() > len(axes) and bias.shape[0] not in (1, size.B)):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected one that broadcasts to {axes}")
    if len(axes) == 3 and bias.dim() == 3:
        bias = bias[:, None]
    elif len(axes) > 4 and bias.dim() > 4:
        if any(got not in (1, expected) for got, expected in zip(bias.shape, axes, strict=True)):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; expected one that broadcasts to {axes}")
        batch = [1] * len(lead[:-1]) if all(n == 1 for n in bias.shape[:-3]) else list(lead[:-1])
        bias = bias.expand(*batch, *bias.shape[-3:]).flatten(0, -4)
    return Added(bias[(None,) * (4 - bias.dim())])


def _align(mask: Mask | None, bias: Bias | None, size: Sizes) -> tuple[Mask | None, Bias | None]:
    """Give words without an alignment the one that the others name; refuse to guess where it matters."""
    found: list[Align] = []
    for word in (mask, bias):
        _aligns(word, found)
    if None not in found:
        return mask, bias
    named = [align for align in found if align is not None]
    if size.L == size.S and not named:
        return mask, bias
    name = "mask" if mask is not None and None in _aligns(mask, []) else "bias"
    if any(align != named[0] for align in named):
        raise ValueError(
            f"{name}: a part of it has no align, and the others name {', '.join(sorted(map(repr, set(named))))}; "
            "expected an align in each part, or the same in all that name one"
        )
    if not named:
        raise ValueError(
            f'{name}: with L = {size.L} queries and S = {size.S} keys, say where the queries stand: align="start" puts '
            'query 0 beside key 0 (as is_causal of torch), align="end" the last query beside the last key (decoding '
            "with a cache), and an int n puts query 0 beside key n"
        )
    return _with_align(mask, named[0]), _with_align(bias, named[0])


def _aligns(word: Any, found: list[Align]) -> list[Align]:
    if dataclasses.is_dataclass(word) and not isinstance(word, type):
        for field in dataclasses.fields(word):
            value = getattr(word, field.name)
            if field.name == "align":
                found.append(value)
            else:
                _aligns(value, found)
    return found


def _with_align(word: Any, align: Align) -> Any:
    if not dataclasses.is_dataclass(word) or isinstance(word, type):
        return word
    parts = {}
    for field in dataclasses.fields(word):
        value = getattr(word, field.name)
        missing = field.name == "align" and value is None
        parts[field.name] = align if missing else _with_align(value, align)
    return type(word)(**parts)


def _without_nonfinite(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Set queries, keys and values that hold NaN or inf to 0, and tell which they were.

    What is masked out must not leak, and 0 * NaN is NaN, in the output and in every gradient. So no kernel sees them;
    it makes the *scores* of pairs that may attend NaN instead, and the row is NaN as it should be.
    """
    if _all_finite(q) and _all_finite(k) and _all_finite(v):
        return q, k, v, None, None
    bad_q, bad_k, bad_v = (~x.detach().isfinite().all(-1) for x in (q, k, v))
    q, k, v = (x.masked_fill(bad[..., None], 0.0) for x, bad in ((q, bad_q), (k, bad_k), (v, bad_v)))
    return q, k, v, bad_q, bad_k | bad_v


def _all_finite(x: Tensor) -> bool:
    """True only if x holds no NaN and no inf, and that is cheap to find out. One sum tells: NaN and inf stay in it. A
    sum that overflows says False, which costs time and nothing else.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    try:
        return math.isfinite(float(x.detach().sum()))
    except RuntimeError:  # inside torch.func.vmap no number can be read
        return False
