"""Build the `Problem` of a call: check the arguments, reduce the score, split into plan and tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from regard import check
from regard.components.component import slots, split
from regard.components.function import FunctionBias, FunctionScore, captured_slots
from regard.components.mask import Mask
from regard.components.normalizer import Normalizer, Softmax
from regard.components.position import Bias, Learned, Rotary, TensorBias
from regard.components.score import ScaledDot, Score
from regard.components.summary import Summary
from regard.components.tensor_ops import expand_heads
from regard.components.tile import Sizes
from regard.plan import cache, nonfinite
from regard.plan.arguments import (
    check_component,
    check_seed,
    check_tensors,
    expand_queries,
    four_axes,
    four_axis_bias,
    resolve_alignment,
    with_batch_tables,
)
from regard.plan.nonfinite import AllFinite
from regard.plan.problem import Plan, Problem, sizes
from regard.tracing import is_eager

AnyBias = Tensor | Bias | Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Default components, created once.
_SCALED_DOT, _SOFTMAX, _NO_SUMMARY = ScaledDot(), Softmax(), Summary()


def make_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Score | Callable[[Tensor, Tensor], Tensor] | None,
    normalizer: Normalizer | None,
    mask: Mask | None,
    bias: AnyBias | None,
    softcap: float | None,
    dropout: float,
    seed: int | Tensor | None,
    summary: Summary | None,
    masks_nonfinite: bool = False,
    quick: AllFinite | None = None,
    origin: tuple[int, int, int, int] | None = None,
) -> Problem:
    """Check the arguments of `attention` and split them into a plan and tensors.

    Args:
        masks_nonfinite: whether the backend that runs the problem masks nonfinite values itself.
        quick: a fast check that q, k and v are finite.
        origin: of a part of a problem, see `Plan`.

    Raises:
        ValueError, TypeError: an argument is invalid.
    """
    q = expand_queries(q, k)
    if mask is not None and isinstance(q, Tensor) and q.dim() == 3:
        mask = with_batch_tables(mask)
    # The bias comes directly before the summary, so a bias tensor is the last one before `Entry.stop`.
    components: tuple[Any, ...] = (softcap, dropout, score, normalizer, mask, bias, summary)
    if origin is not None:
        components = (origin, *components)
    eager = isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and is_eager(q, k, v)
    key, call_tensors = cache.make_key(q, k, v, components, bias, eager)
    entry = cache.get(key)
    if entry is None:
        check_tensors(q, k, v)
    lead = q.shape[:-2]
    x: Sequence[Tensor] = (q, k, v) if entry is not None and entry.is_unchanged else four_axes(q, k, v)
    if dropout != 0.0 or seed is not None:
        seed = check_seed(dropout, seed, q.device)
    is_finite = (
        mask is None or (masks_nonfinite and nonfinite.can_be_left(score)) or nonfinite.are_finite(x, quick, eager)
    )
    if not is_finite:
        entry = None  # plans with flags are not cached

    if entry is None:
        size = sizes(*x[:2])
        score, normalizer, summary = check_components(x, size, score, normalizer, summary, softcap)
        mask, bias = check_positions(mask, bias, score, q, size)
        component_tensors, summary_tensors = _tensors_of((normalizer, mask, bias)), _tensors_of(summary)
    else:
        score = score if isinstance(score, Score) else _SCALED_DOT
        component_tensors, summary_tensors = call_tensors[entry.start : entry.stop], call_tensors[entry.stop :]
        if isinstance(bias, Tensor):
            component_tensors[-1] = four_axis_bias(bias, lead, sizes(*x[:2]))
    flags: tuple[Tensor, ...] = ()
    if not is_finite:
        flag_q, flag_k, flag_v = nonfinite.find(*x)
        x, flags = nonfinite.clear(score, x, (flag_q, flag_k, flag_v)), (flag_q, flag_k | flag_v)
    reduced: Score = score
    score_tensors: list[Tensor] = []
    if entry is None or not entry.is_unchanged:
        new_q, new_k, reduced = score.reduce(x[0], x[1])
        x = (new_q, new_k, _with_heads_of(new_k, x[2]))
        flags = (*flags[:1], *[_with_heads_of(new_k, y) for y in flags[1:]])
        score_tensors = _tensors_of(reduced)
    seeds = [seed] if isinstance(seed, Tensor) and dropout else []
    tensors = [*x, *score_tensors, *component_tensors, *seeds, *summary_tensors, *flags]

    if entry is not None:
        return Problem(entry.plan, _move_scalars(entry.plan, tensors), lead, eager)
    assert normalizer is not None and summary is not None and (bias is None or isinstance(bias, Bias))
    plan = Plan(
        reduced,
        normalizer,
        mask,
        bias,
        softcap,
        float(dropout),
        seed if dropout else None,
        summary,
        flags[0] if flags else None,
        flags[1] if flags else None,
        origin or (0, 0, 0, 0),
    )
    plan = split(plan, list(x))
    if key is not None and not flags:
        is_unchanged = all(a is b for a, b in zip(x, (q, k, v), strict=True)) and not slots(plan.score)
        start, stop = 3 + len(_tensors_of(score)), len(call_tensors) - len(summary_tensors)
        cache.put(key, cache.Entry(plan, is_unchanged, start, stop))
    return Problem(plan, _move_scalars(plan, tensors), lead, eager)


def check_components(
    x: Sequence[Tensor], size: Sizes, score: Any, normalizer: Any, summary: Any, softcap: Any
) -> tuple[Score, Normalizer, Summary]:
    """Check score, normalizer, summary and softcap for the sizes of a problem, and return them with their defaults."""
    q, k = x[:2]
    if softcap is not None:
        check.positive("softcap", softcap, ", or None")
    if score is None:
        score = _SCALED_DOT
    elif callable(score) and not isinstance(score, type | Score):
        score = FunctionScore.of(score, q, k)
    else:
        score = check_component("score", score, Score, q.device)
    score.check(size, q.shape[-1], k.shape[-1])
    if normalizer is None:
        normalizer = _SOFTMAX
    else:
        check_component("normalizer", normalizer, Normalizer, q.device).check(size)
    if summary is None:
        summary = _NO_SUMMARY
    else:
        check_component("summary", summary, Summary, q.device).check(size)
    return score, normalizer, summary


def check_positions(mask: Any, bias: Any, score: Score, q: Tensor, size: Sizes) -> tuple[Mask | None, Bias | None]:
    """Check mask and bias for the sizes of a problem, and return them as components with an alignment."""
    if callable(bias) and not isinstance(bias, type | Bias | Tensor | Rotary | Learned):
        bias = FunctionBias.of(bias, size, q, score)
    if mask is not None:
        check_component("mask", mask, Mask, q.device).check(size, q.device)
    if bias is not None:
        bias = bias if isinstance(bias, Bias) else TensorBias(four_axis_bias(bias, q.shape[:-2], size))
        check_component("bias", bias, Bias, q.device).check(size)
    return (mask, bias) if mask is None and bias is None else resolve_alignment(mask, bias, size)


def _tensors_of(component: Any) -> list[Tensor]:
    """Return the tensors of a component, or of a tuple of components, in the order of `split`."""
    tensors: list[Tensor] = []
    split(component, tensors)
    return tensors


def _with_heads_of(k: Tensor, x: Tensor) -> Tensor:
    """Repeat the heads of x (B, G, ...) to match k: a score with parameters per query head makes keys per query
    head.
    """
    return x if x.shape[1] == k.shape[1] else expand_heads(x, k.shape[1] // x.shape[1])


def _move_scalars(plan: Plan, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Move tensors of shape () to the device of q, except those captured by a function of the user."""
    if len(tensors) == 3:
        return tuple(tensors)
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors[3:]):
        own = captured_slots(plan.score, plan.bias)
        tensors = [tensor if i in own else tensor.to(device) for i, tensor in enumerate(tensors)]
    return tuple(tensors)
