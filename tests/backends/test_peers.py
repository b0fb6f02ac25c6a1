"""The same results as peers, where they compute the same problem, in float64: only rounding differs."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import entmax
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss

import regard
from regard import mask, normalizer, position, score

B, H, G, L, S, D, E = 2, 6, 3, 7, 11, 5, 3
KERNELS = pytest.mark.parametrize("kernel", [None, "tiled", "reference"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def close(got: Tensor, expected: Tensor) -> None:
    """Assert equality within some hundred roundings of float64."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert (got - expected).abs().max() <= 1e-13 * max(expected.abs().max().item(), 1.0)


def same(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Assert equal outputs and equal gradients for a random gradient of the output."""
    close(got, expected)
    pull = torch.randn_like(expected)
    gradients = (torch.autograd.grad(out, inputs, pull, retain_graph=True) for out in (got, expected))
    for mine, theirs in zip(*gradients, strict=True):
        close(mine, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# F.scaled_dot_product_attention

some = torch.rand(B, H, L, S, generator=torch.Generator().manual_seed(0)) < 0.6
some[..., 0] = True
SDPA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "scale": ({"scale": 0.3}, {"score": score.ScaledDot(0.3)}),
    "no scale": ({"scale": 1.0}, {"score": score.Dot()}),
    "negative scale": ({"scale": -2.0}, {"score": score.ScaledDot(-2.0)}),
    "causal from the start": ({"is_causal": True}, {"mask": mask.causal("start")}),
    "causal to the end": ({"attn_mask": causal_lower_right(L, S)}, {"mask": mask.causal("end")}),
    "bool mask": ({"attn_mask": some}, {"mask": mask.dense(some)}),
    "mask of all heads": ({"attn_mask": some[:, :1]}, {"mask": mask.dense(some[:, :1])}),
    "mask of keys": ({"attn_mask": some[:, :1, :1]}, {"mask": mask.dense(some[:, :1, :1])}),
    "mask of pairs": ({"attn_mask": some[0, 0]}, {"mask": mask.dense(some[0, 0])}),
    "padding": (
        {"attn_mask": (torch.arange(S) < torch.tensor([4, S])[:, None])[:, None, None]},
        {"mask": mask.lengths([4, S])},
    ),
}


@KERNELS
@pytest.mark.parametrize("name", SDPA)
@pytest.mark.parametrize("heads", [H, G, 1])
def test_scaled_dot_product_attention(name: str, heads: int, kernel: str | None) -> None:
    theirs, ours = SDPA[name]
    q, k, v = randn(B, H, L, D), randn(B, heads, S, D), randn(B, heads, S, E)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != H, **theirs)
    same(regard.attention(q, k, v, backend=kernel, **ours), expected, q, k, v)


@KERNELS
@pytest.mark.parametrize("shape", [(B, H, L, S), (H, L, S), (B, 1, 1, S), (L, 1), (1, H, 1, S)])
def test_float_mask_is_bias(shape: tuple[int, ...], kernel: str | None) -> None:
    q, k, v, bias = randn(B, H, L, D), randn(B, H, S, D), randn(B, H, S, E), randn(*shape)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    same(regard.attention(q, k, v, bias=bias, backend=kernel), expected, q, k, v, bias)


def test_minus_infinity_in_float_mask_masks() -> None:
    q, k, v = randn(B, H, L, D), randn(B, H, S, D), randn(B, H, S, E)
    forbidding = torch.zeros(B, H, L, S, dtype=torch.float64).masked_fill(~some, -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=forbidding)
    same(regard.attention(q, k, v, bias=forbidding), expected, q, k, v)
    close(regard.attention(q, k, v, mask=mask.dense(some)), expected)


@pytest.mark.parametrize("lead", [(), (B,), (2, 3, H), (1, 2, 2, H)])
def test_leading_axes_equal_torch(lead: tuple[int, ...]) -> None:
    q, k, v = randn(*lead, L, D), randn(*lead, S, D), randn(*lead, S, E)
    same(regard.attention(q, k, v), F.scaled_dot_product_attention(q, k, v), q, k, v)
    bias = randn(*lead, L, S)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    same(regard.attention(q, k, v, bias=bias), expected, q, k, v, bias)


# ---------------------------------------------------------------------------------------------------------------------
# FlexAttention, eager: its backward pass does not exist on the CPU.

SLOPES = torch.tensor(position.alibi_slopes(H), dtype=torch.float64)
TABLE, REAL = torch.linspace(-2, 2, 4 * H, dtype=torch.float64).sin().view(4, H), torch.tensor([4, S])
IDS = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2], [5, 5, 5, 5, 5, 7, 7, 7, 7, 7, 7]])


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i + S - L >= j


def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i + S - L - j).abs() <= 2


def real(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j < REAL[b]


def same_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return IDS[b, i] == IDS[b, j]


def cap(s: Tensor, *_: Tensor) -> Tensor:
    return 2.0 * torch.tanh(s / 2.0)


def alibi(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s - SLOPES[h] * (i + S - L - j).abs()


def capped_alibi(s: Tensor, *at: Tensor) -> Tensor:
    return alibi(cap(s), *at)


def relative(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + TABLE[(i + S - L - j).clamp(0, 3), h]


FLEX: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "plain": (None, None, {}),
    "softcap": (cap, None, {"softcap": 2.0}),
    "alibi": (alibi, None, {"bias": position.ALiBi(align="end")}),
    "alibi after a softcap": (capped_alibi, None, {"softcap": 2.0, "bias": position.ALiBi(SLOPES, "end")}),
    # Buckets for the distances 0 and 1, for 2, and for 3 and more.
    "t5": (relative, None, {"bias": position.T5(TABLE, False, 3, "end")}),
    "causal": (None, causal, {"mask": mask.causal("end")}),
    "window": (None, near, {"mask": mask.window(2, 2, "end")}),
    "padding": (None, real, {"mask": mask.lengths(REAL)}),
    "documents": (None, same_document, {"mask": mask.documents((IDS[:, :L], IDS))}),
    "all at once": (
        capped_alibi,
        and_masks(causal, same_document, real),
        {
            "softcap": 2.0,
            "bias": position.ALiBi(),
            "mask": mask.causal(S - L) & mask.documents((IDS[:, :L], IDS)) & mask.lengths(REAL),
        },
    ),
}


@pytest.mark.parametrize("name", FLEX)
@pytest.mark.parametrize("kernel", ["tiled", "reference"])
def test_flex_attention(name: str, kernel: str) -> None:
    score_mod, mask_mod, ours = FLEX[name]
    q, k, v = randn(B, H, L, D, grad=False), randn(B, G, S, D, grad=False), randn(B, G, S, E, grad=False)
    blocks = mask_mod and create_block_mask(mask_mod, B, H, L, S, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it is not compiled
        out, lse = flex_attention(q, k, v, score_mod, blocks, enable_gqa=True, return_lse=True)
    got, seen = regard.attention(q, k, v, backend=kernel, summary=regard.Summary(lse=True), **ours)
    close(got, out)
    there = lse > -torch.inf
    assert torch.equal(seen.lse > -torch.inf, there)
    close(seen.lse[there], lse[there])


# ---------------------------------------------------------------------------------------------------------------------
# nn.MultiheadAttention


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@KERNELS
def test_multihead_attention(masked: bool, zero: bool, kernel: str | None) -> None:
    """Output and weights. `add_zero_attn` adds one key and value of zeros: a sink at score 0."""
    width = 6 * H
    layer = nn.MultiheadAttention(width, H, batch_first=True, add_zero_attn=zero, dtype=torch.float64)
    nn.init.normal_(layer.in_proj_bias)
    x, y = randn(B, L, width), randn(B, S, width)
    # There, True = may not attend.
    padding = torch.arange(S) >= torch.tensor([4, S])[:, None]
    late = torch.ones(L, S).triu(1).bool()
    theirs = {"key_padding_mask": padding, "attn_mask": late} if masked else {}
    expected, weights = layer(x, y, y, need_weights=True, average_attn_weights=False, **theirs)

    w, b = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    q, k, v = (F.linear(z, w[i], b[i]).unflatten(-1, (H, -1)).transpose(1, 2) for i, z in enumerate((x, y, y)))
    out, seen = regard.attention(
        q, k, v,
        mask=mask.lengths([4, S]) & mask.causal("start") if masked else None,
        normalizer=normalizer.Softmax(0.0 if zero else None),
        summary=regard.Summary(full=True, max=True, received=True, rows=(0, -1)),
        backend=kernel,
    )  # fmt: skip
    same(layer.out_proj(out.transpose(1, 2).flatten(2)), expected, x, y, layer.in_proj_weight, layer.in_proj_bias)
    weights = weights[..., :S]
    same(seen.full, weights, x, layer.in_proj_weight)
    close(seen.max, weights.amax(-1))
    close(seen.received, weights.sum(-2))
    close(seen.rows, weights[:, :, [0, -1]])


# ---------------------------------------------------------------------------------------------------------------------
# Keras: its formulas are written out, since its back end may not be installed.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@KERNELS
def test_keras_additive_attention(masked: bool, scaled: bool, kernel: str | None) -> None:
    """`AdditiveAttention._calculate_scores`: sum(scale * tanh(q + k)); masked scores less 1e9."""
    q, k, v = randn(B, L, D), randn(B, S, D), randn(B, S, E)
    scale = randn(D) if scaled else torch.ones(D, dtype=torch.float64, requires_grad=True)
    scores = (scale * torch.tanh(q[:, :, None] + k[:, None])).sum(-1)
    if masked:
        allowed = (torch.arange(S) < torch.tensor([4, S])[:, None])[:, None] & torch.ones(L, S).tril().bool()
        scores = scores - 1e9 * ~allowed
    words = mask.lengths([4, S]) & mask.causal("start") if masked else None
    out = regard.attention(q, k, v, score=score.Additive(scale), mask=words, backend=kernel)
    same(out, torch.softmax(scores, -1) @ v, q, k, v, scale)


def test_keras_attention_by_concat() -> None:
    """`Attention(score_mode="concat")`: concat_score_weight * sum(tanh(scale * (q + k)))."""
    q, k, v, scale, weight = randn(B, L, D), randn(B, S, D), randn(B, S, E), randn(), randn()
    scores = weight * torch.tanh(scale * (q[:, :, None] + k[:, None])).sum(-1)
    out = regard.attention(q * scale, k * scale, v, score=score.Additive(weight.expand(D)))
    same(out, torch.softmax(scores, -1) @ v, q, k, v, scale, weight)


# ---------------------------------------------------------------------------------------------------------------------
# gpt-oss, of Hugging Face, and the package entmax.


@KERNELS
def test_learned_sinks_equal_gpt_oss(kernel: str | None) -> None:
    q, k, v, sinks = randn(B, H, L, D), randn(B, G, S, D), randn(B, G, S, E), randn(H)
    module = SimpleNamespace(num_key_value_groups=H // G, sinks=sinks, training=False)
    late = torch.zeros(L, S, dtype=torch.float64).masked_fill(~torch.ones(L, S).tril(S - L).bool(), -1e30)
    expected, weights = gpt_oss(module, q, k, v, late[None, None], scaling=0.4)
    words = {"score": score.ScaledDot(0.4), "normalizer": normalizer.Softmax(sinks), "mask": mask.causal("end")}
    out, seen = regard.attention(q, k, v, backend=kernel, summary=regard.Summary(full=True), **words)
    same(out.transpose(1, 2), expected, q, k, v, sinks)
    same(seen.full, weights, q, k, sinks)


ENTMAX = {
    "sparsemax": (lambda s: entmax.sparsemax(s, -1), normalizer.Sparsemax()),
    "entmax 2": (lambda s: entmax.sparsemax(s, -1), normalizer.Entmax(2.0)),
    "entmax 1.5": (lambda s: entmax.entmax15(s, -1), normalizer.Entmax()),
    # A bisection gains one bit a step.
    "entmax 1.2": (lambda s: entmax.entmax_bisect(s, 1.2, -1, n_iter=80), normalizer.Entmax(1.2)),
    "entmax 1.7": (lambda s: entmax.entmax_bisect(s, 1.7, -1, n_iter=80), normalizer.Entmax(1.7)),
}


@pytest.mark.parametrize("name", ENTMAX)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
@KERNELS
def test_entmax(name: str, masked: bool, scale: float, kernel: str | None) -> None:
    theirs, ours = ENTMAX[name]
    q, k, v = randn(B, H, L, D), randn(B, H, S, D), randn(B, H, S, E)
    scores = (q @ k.mT) * scale
    if masked:
        scores = scores.masked_fill(~some, -1e9)
    weights = theirs(scores)
    words = {"score": score.ScaledDot(scale), "mask": mask.dense(some) if masked else None}
    summary = regard.Summary(full=True)
    out, seen = regard.attention(q, k, v, normalizer=ours, summary=summary, backend=kernel, **words)
    assert torch.equal(seen.full > 0, weights > 0)
    same(seen.full, weights, q, k)
    same(out, weights @ v, q, k, v)
