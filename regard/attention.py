"""The one call: check, plan, run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from regard.backends import choose
from regard.backends.choose import Explanation
from regard.backends.cpu import extension
from regard.components.mask import Mask
from regard.components.normalizer import Normalizer
from regard.components.position import Bias
from regard.components.score import Score
from regard.components.summary import AttentionSummary, Summary, Top
from regard.deprecated import resolve_backend
from regard.plan.assemble import make_problem

_NO_CONTEXT = nullcontext()
# Of no type: it takes the signature of one overload for that of all.
_as_torch_function: Any = handle_torch_function

AnyScore = Score | Callable[[Tensor, Tensor], Tensor]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: AnyScore | None = ...,
    normalizer: Normalizer | None = ...,
    mask: Mask | None = ...,
    bias: Tensor | Bias | None = ...,
    softcap: float | None = ...,
    dropout: float = ...,
    seed: int | Tensor | None = ...,
    summary: Literal[None] = ...,
    backend: str | None = ...,
    kernel: str | None = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: AnyScore | None = ...,
    normalizer: Normalizer | None = ...,
    mask: Mask | None = ...,
    bias: Tensor | Bias | None = ...,
    softcap: float | None = ...,
    dropout: float = ...,
    seed: int | Tensor | None = ...,
    summary: Summary,
    backend: str | None = ...,
    kernel: str | None = ...,
) -> tuple[Tensor, AttentionSummary]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: AnyScore | None = None,
    normalizer: Normalizer | None = None,
    mask: Mask | None = None,
    bias: Tensor | Bias | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    summary: Summary | None = None,
    backend: str | None = None,
    kernel: str | None = None,
) -> Tensor | tuple[Tensor, AttentionSummary]:
    """Attention in three stages: score, normalise, weighted sum.

        s_ij = score(q_i, k_j)        then softcap, bias and mask
        p_i  = normalizer(s_i)        then dropout
        o_i  = sum_j p_ij v_j

    Args:
        q: queries (B, H, L, D). Also (L, D), (B, L, D) for one head, and more batch axes before H.
        k: keys (B, G, S, D), H a multiple of G: each key/value head serves H/G query heads.
        v: values (B, G, S, E).
        score: one of `regard.score`, or a function (q, k) -> scores; `ScaledDot()` by default.
        normalizer: one of `regard.normalizer`; `Softmax()` by default.
        mask: one of `regard.mask`, joined by `&`, `|` and `~`. True = may attend. A row that may attend to nothing
            gives 0, and what is masked out never leaks, not even NaN.
        bias: added to the scores after the softcap: a tensor that broadcasts to (B, H, L, S), `position.ALiBi` or
            `position.T5`.
        softcap: scores become softcap * tanh(score / softcap).
        dropout: the chance that a weight is dropped; the others are divided by 1 - dropout. It is dropped whenever this
            is not 0: pass 0 in evaluation.
        seed: an int, or int64 of shape (), that fixes which weights are dropped; drawn from torch's generator by
            default. The same seed drops the same weights on every kernel.
        summary: what else to tell about the weights, without the weights. It never changes the output.
        backend: force "cpu", "sdpa", "triton", "tiled" or "reference"; raises if that one cannot serve.
        kernel: the name of `backend` in version 0.1.

    Returns:
        The output (B, H, L, E), with the leading axes of q and the dtype of v; with `summary`, a pair of it and `AttentionSummary`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, its shape, and what was expected.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1; each word names its own.

    >>> out, seen = regard.attention(q, k, v, mask=regard.mask.causal(), summary=regard.Summary(entropy=True, top=8))
    """
    if torch._C._is_torch_function_mode_enabled() and not torch.compiler.is_compiling():
        # As a function of torch: whoever watches these sees this one too.
        arguments: dict[str, Any] = {
            "score": score, "normalizer": normalizer, "mask": mask, "bias": bias, "softcap": softcap, "dropout": dropout,
            "seed": seed, "summary": summary, "backend": backend, "kernel": kernel,
        }  # fmt: skip
        return _as_torch_function(attention, (), q, k, v, **arguments)  # type: ignore[no-any-return]
    precision: AbstractContextManager[Any] = _NO_CONTEXT
    if isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
        # It chooses the precision of q, k and v; all that follows keeps its sums in float32.
        q, k, v = _autocast(q), _autocast(k), _autocast(v)
        precision = torch.autocast(q.device.type, enabled=False)
    elif (
        score is None and normalizer is None and mask is None and bias is None and softcap is None and seed is None
        and summary is None and backend is None and kernel is None and dropout == 0.0
    ):  # fmt: skip
        out = choose.run_plain(q, k, v)
        if out is not None:
            return out
    if backend is not None or kernel is not None:
        backend = resolve_backend(backend, kernel)
    with_summary = summary is not None
    with precision:
        problem = make_problem(
            q, k, v, score, normalizer, mask, bias, softcap, dropout, seed, summary,
            choose.masks_nonfinite(backend, q), extension.are_finite,
        )  # fmt: skip
        outputs = choose.run(problem, backend)
    out = problem.restore(outputs[0])
    if not with_summary:
        return out
    named: dict[str, Any] = {
        name: problem.restore(x) for name, x in zip(problem.plan.summary.outputs, outputs[1:], strict=True)
    }
    if "top_keys" in named:
        named["top"] = Top(named.pop("top_weights"), named.pop("top_keys"))
    return out, AttentionSummary(**named)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: AnyScore | None = None,
    normalizer: Normalizer | None = None,
    mask: Mask | None = None,
    bias: Tensor | Bias | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    summary: Summary | None = None,
) -> Explanation:
    """Which kernel `attention` would take for these arguments, and why every other one refuses. Runs nothing.

    >>> print(regard.explain(q, k, v, softcap=30.0))
    -> cpu        can serve
       torch      no: it has no softcap
       tiled      can serve
       reference  can serve, when asked for by name
    """
    return choose.explanation(make_problem(q, k, v, score, normalizer, mask, bias, softcap, dropout, seed, summary))


def _autocast(x: Tensor) -> Tensor:
    """What autocast does to the inputs of torch's own attention."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
