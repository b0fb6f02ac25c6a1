"""`attention` and `explain`: check the arguments, choose a backend, run it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from regard.backends import choose
from regard.backends.choose import Explanation
from regard.backends.registry import are_finite
from regard.components.mask import Mask
from regard.components.normalizer import Normalizer
from regard.components.score import Score
from regard.components.summary import AttentionSummary, Summary
from regard.deprecated import resolve_backend
from regard.plan.assemble import AnyBias, make_problem

_NO_CONTEXT = nullcontext()
# Untyped: mypy would otherwise check calls against the signature of a single overload.
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
    bias: AnyBias | None = ...,
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
    bias: AnyBias | None = ...,
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
    bias: AnyBias | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    summary: Summary | None = None,
    backend: str | None = None,
    kernel: str | None = None,
) -> Tensor | tuple[Tensor, AttentionSummary]:
    """Compute attention in three stages: score, normalize, weighted sum.

        s_ij = score(q_i, k_j)        then softcap, bias and mask, in this order
        p_i  = normalizer(s_i)        then dropout
        o_i  = sum_j p_ij v_j

    Args:
        q: queries (B, H, L, D). Also (L, D), (B, L, D) for a single head, and more batch dimensions before H. Batch
            dimensions of q, k and v broadcast.
        k: keys (B, G, S, D), where H is a multiple of G: each key/value head serves H/G query heads.
        v: values (B, G, S, E).
        score: an object of `regard.score`, or a function (q, k) -> scores. The default, `ScaledDot()`, scales dot
            products by 1/sqrt(D).
        normalizer: an object of `regard.normalizer`; `Softmax()` by default.
        mask: an object of `regard.mask`; masks combine with `&`, `|` and `~`. True means that a query may attend to a
            key, as in `scaled_dot_product_attention`, and the opposite of `key_padding_mask` in
            `torch.nn.MultiheadAttention`. A query that may attend to no key has output 0. Masked keys and values never
            reach an output or a gradient, not even if they are NaN.
        bias: added to the scores after the softcap: a tensor that broadcasts to (B, H, L, S), `position.ALiBi`,
            `position.T5`, or a function (batch, head, query, key) -> floats of four index tensors, which broadcast to the
            shape of a tile, as does its result.
        softcap: replaces scores by softcap * tanh(score / softcap), before bias and mask.
        dropout: dropout probability of each weight after normalization; remaining weights are divided by 1 - dropout.
            It applies whenever it is not 0, so pass 0 in evaluation.
        seed: an int, or an int64 tensor of shape (), that determines which weights are dropped: the same ones on every
            backend. By default it is drawn from torch's default generator.
        summary: which statistics of the attention weights to return. It does not change the output. Statistics
            describe the weights before dropout.
        backend: "cpu", "sdpa", "triton", "tiled" or "reference"; raises if this backend does not support the call. By
            default the fastest one that does, see `explain`.
        kernel: deprecated name of `backend`.

    Returns:
        The output (B, H, L, E), with the leading dimensions and the dtype of q. With `summary`, a pair of the output
        and an `AttentionSummary`.

    Raises:
        ValueError, TypeError: an argument is invalid. The message contains its name, its value or shape, and what was
            expected.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1.

    >>> q, k, v = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 4)
    >>> out, stats = regard.attention(q, k, v, mask=mask.causal(), summary=Summary(lse=True, top=1))
    >>> out.shape, stats.lse.shape, stats.top.keys.shape
    (torch.Size([2, 8, 5, 4]), torch.Size([2, 8, 5]), torch.Size([2, 8, 5, 1]))
    >>> expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    >>> torch.allclose(out, expected, atol=1e-5)
    True
    """
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and torch._C._is_torch_function_mode_enabled():
        # Report this call to active modes of `__torch_function__`, like a function of torch.
        arguments: dict[str, Any] = {
            "score": score, "normalizer": normalizer, "mask": mask, "bias": bias, "softcap": softcap, "dropout": dropout,
            "seed": seed, "summary": summary, "backend": backend, "kernel": kernel,
        }  # fmt: skip
        return _as_torch_function(attention, (), q, k, v, **arguments)  # type: ignore[no-any-return]
    precision: AbstractContextManager[Any] = _NO_CONTEXT
    if isinstance(q, Tensor) and not q.is_meta and torch.is_autocast_enabled(q.device.type):
        # Autocast determines the dtype of q, k and v only; sums are accumulated in float32.
        q, k, v = _autocast(q), _autocast(k), _autocast(v)
        precision = torch.autocast(q.device.type, enabled=False)
    elif not is_compiling and (
        score is None and normalizer is None and mask is None and bias is None and softcap is None and seed is None
        and backend is None and kernel is None and dropout == 0.0
    ):  # fmt: skip
        plain = choose.run_plain(q, k, v, summary)
        if plain is not None:
            return plain[0] if summary is None else (plain[0], AttentionSummary.of(summary, plain[1:]))
    if backend is not None or kernel is not None:
        backend = resolve_backend(backend, kernel)
    with_summary = summary is not None
    with precision:
        problem = make_problem(
            q, k, v, score, normalizer, mask, bias, softcap, dropout, seed, summary,
            choose.masks_nonfinite(backend, q), are_finite,
        )  # fmt: skip
        outputs = choose.run(problem, backend)
    out = problem.restore(outputs[0])
    if not with_summary:
        return out
    return out, AttentionSummary.of(problem.plan.summary, map(problem.restore, outputs[1:]))


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: AnyScore | None = None,
    normalizer: Normalizer | None = None,
    mask: Mask | None = None,
    bias: AnyBias | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    summary: Summary | None = None,
) -> Explanation:
    """Return which backend `attention` chooses for these arguments, and why others do not support them. Runs nothing.

    Args: those of `attention`, without `backend`.

    >>> q = k = v = torch.zeros(2, 8, 64, 32)
    >>> explanation = regard.explain(q, k, v, softcap=30.0)
    >>> explanation.reasons["tiled"], explanation.reasons["sdpa"]
    (None, 'it does not support softcap')
    """
    return choose.explanation(make_problem(q, k, v, score, normalizer, mask, bias, softcap, dropout, seed, summary))


def _autocast(x: Tensor) -> Tensor:
    """Cast a tensor as autocast casts the inputs of `scaled_dot_product_attention`."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
