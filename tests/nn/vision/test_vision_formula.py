"""The layers of `regard.nn.vision` against the formulas of their papers in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.feature_maps import B, C, H, W, close, image, randn, same, shaken, softmax_of, tokens
from torch import Tensor, nn

from regard import Summary
from regard.nn.vision import (
    CBAM,
    AttentionPool2d,
    Learned2d,
    NonLocalBlock,
    PatchAttention,
    RelativeBias2d,
    Rotary2d,
    Sinusoidal2d,
    SqueezeExcitation,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------------------
# Gates.


def test_squeeze_excitation_matches_formula() -> None:
    layer, x = shaken(SqueezeExcitation(C, 3)), randn(B, C, H, W)
    w1, b1, w2, b2 = layer.parameters()
    assert w1.shape == (2, C)
    z = torch.stack([x[:, c].sum((1, 2)) / (H * W) for c in range(C)], 1)
    s = 1 / (1 + torch.exp(-(torch.clamp(z @ w1.T + b1, min=0) @ w2.T + b2)))
    out, statistics = layer(x, summary=True)
    close(statistics.channels, s)
    assert statistics.places is None
    same(out, torch.einsum("bchw,bc->bchw", x, s), x, *layer.parameters())


def test_cbam_matches_formula() -> None:
    layer, x = shaken(CBAM(C, 2, 3)), randn(B, C, H, W)
    w1, b1, w2, b2, filters, offset = layer.parameters()

    def mlp(z: Tensor) -> Tensor:
        return torch.clamp(z @ w1.T + b1, min=0) @ w2.T + b2

    flat = x.reshape(B, C, -1)
    channels = 1 / (1 + torch.exp(-mlp(flat.mean(-1)) - mlp(flat.max(-1).values)))
    refined = x * channels.view(B, C, 1, 1)
    two = F.pad(torch.stack([refined.sum(1) / C, refined.max(1).values], 1), (1, 1, 1, 1))
    scores = torch.zeros(B, H, W, dtype=x.dtype) + offset
    for i in range(2):
        for r in range(3):
            for c in range(3):
                scores = scores + filters[0, i, r, c] * two[:, i, r : r + H, c : c + W]
    places = 1 / (1 + torch.exp(-scores))
    out, statistics = layer(x, summary=True)
    close(statistics.channels, channels)
    close(statistics.places, places)
    same(out, refined * places[:, None], x, *layer.parameters())


@pytest.mark.parametrize("make", [SqueezeExcitation, CBAM])
def test_gate_hidden_layer_has_at_least_one_channel(make: type[nn.Module]) -> None:
    assert next(make(C, 16).parameters()).shape == (1, C)


# ---------------------------------------------------------------------------------------------------------------------
# Non-local.


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", ["embedded_gaussian", "gaussian"])
@pytest.mark.parametrize("pool", [False, True])
def test_non_local_block_matches_formula(kind: Any, pool: bool, norm: bool) -> None:
    layer, x = shaken(NonLocalBlock(C, 3, kind, pool, norm)), randn(B, C, H, W)
    if norm:
        layer.norm.running_mean.normal_()
        layer.norm.running_var.uniform_(0.5, 2.0)
    layer.eval()

    def mapped(conv: nn.Module, y: Tensor) -> Tensor:
        return y if isinstance(conv, nn.Identity) else y @ conv.weight[:, :, 0, 0].T + conv.bias

    source = x
    if pool:  # the last row and column stand alone
        tiles = [x[:, :, r : r + 2, c : c + 2].amax((2, 3)) for r in range(0, H, 2) for c in range(0, W, 2)]
        source = torch.stack(tiles, -1).view(B, C, 3, 4)
    q, k = mapped(layer.theta, tokens(x)), mapped(layer.phi, tokens(source))
    weights = torch.exp(q @ k.mT)
    weights = weights / weights.sum(-1, keepdim=True)
    y = mapped(layer.w_z, weights @ mapped(layer.g, tokens(source)))
    if norm:
        unit = (y - layer.norm.running_mean) / (layer.norm.running_var + layer.norm.eps).sqrt()
        y = unit * layer.norm.weight + layer.norm.bias
    out, statistics = layer(x, summary=Summary(full=True))
    close(statistics.full, weights[:, None])
    same(out, x + image(y, H, W), x, *layer.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Patches.

POSITIONS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda patch: nn.Identity(),
    "sinusoidal": lambda patch: Sinusoidal2d(),
    "learned": lambda patch: Learned2d(C * patch**2, (H, W)),
    "relative": lambda patch: RelativeBias2d(2, (H + 1, W)),
    "rotary": lambda patch: Rotary2d(4, base=50.0),
}


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("kind", POSITIONS)
def test_patch_attention_matches_formula(kind: str, patch: int) -> None:
    width, heads = 12, 2
    position = POSITIONS[kind](patch)
    layer, x = shaken(PatchAttention(C, heads, patch, width=width, position=position)), randn(B, C, H, W)
    rows, columns = -(-H // patch), -(-W // patch)
    padded = F.pad(x, (0, columns * patch - W, 0, rows * patch - H))
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    p = torch.stack([padded[:, :, r * patch :, c * patch :][..., :patch, :patch].reshape(B, -1) for r, c in cells], 1)
    if kind in ("sinusoidal", "learned"):
        added = position(torch.zeros(1, p.shape[-1], rows, columns, dtype=x.dtype))
        p = p + tokens(added)
    n = layer.attention.norm
    p = (p - p.mean(-1, keepdim=True)) / (p.var(-1, correction=0, keepdim=True) + n.eps).sqrt() * n.weight + n.bias
    q, k, v = (p @ layer.attention.qkv.weight.T + layer.attention.qkv.bias).split(width, -1)
    bias = None
    if kind == "rotary":
        q, k = (
            torch.cat(
                [torch.stack([turned(y[:, i], r, c) for i, (r, c) in enumerate(cells)], 1) for y in z.chunk(2, -1)], -1
            )
            for z in (q, k)
        )
    if kind == "relative":
        bias = torch.stack([torch.stack([apart(position, i, j) for j in cells], -1) for i in cells], -2)
    y = softmax_of(q, k, v, heads, bias) @ layer.attention.out.weight.T + layer.attention.out.bias
    back = torch.zeros_like(padded)
    for i, (r, c) in enumerate(cells):
        back[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = y[:, i].view(B, C, patch, patch)
    same(layer(x), x + back[:, :, :H, :W], x, *layer.parameters())


def turned(x: Tensor, row: int, column: int) -> Tensor:
    """Rotate the first four elements of x (B, 6): two by the row, two by the column, with frequency 1."""
    angle = torch.tensor([float(row), float(column)], dtype=x.dtype)
    cos, sin = angle.cos(), angle.sin()
    a, b, c, d = x[:, 0], x[:, 1], x[:, 2], x[:, 3]
    pairs = [a * cos[0] - b * sin[0], b * cos[0] + a * sin[0], c * cos[1] - d * sin[1], d * cos[1] + c * sin[1]]
    return torch.cat([torch.stack(pairs, -1), x[:, 4:]], -1)


def apart(bias: RelativeBias2d, query: tuple[int, int], key: tuple[int, int]) -> Tensor:
    """Return the bias of each head for a pair of positions."""
    height, width = bias.size
    down, right = query[0] - key[0], query[1] - key[1]
    return bias.table[(down + height - 1) * (2 * width - 1) + right + width - 1]


# ---------------------------------------------------------------------------------------------------------------------
# Pooling.


@pytest.mark.parametrize("out", [None, 11])
def test_attention_pool_matches_clip(out: int | None) -> None:
    """Against torch's multi-head attention, as in CLIP: one table of positions, whose first row is for the mean."""
    heads = 2
    layer = shaken(AttentionPool2d(C, heads, out, position=Learned2d(C, (H, W))))
    x = randn(B, C, H, W)
    table = torch.cat([layer.query[None], tokens(layer.position.weight[None])[0]])
    places = tokens(x).transpose(0, 1)
    places = torch.cat([places.mean(0, keepdim=True), places]) + table[:, None]
    expected, weights = F.multi_head_attention_forward(
        places[:1], places, places, C, heads, None,
        torch.cat([layer.q.bias, layer.k.bias, layer.v.bias]), None, None, False, 0.0,
        layer.out.weight, layer.out.bias, use_separate_proj_weight=True, average_attn_weights=False,
        q_proj_weight=layer.q.weight, k_proj_weight=layer.k.weight, v_proj_weight=layer.v.weight,
    )  # fmt: skip
    got, statistics = layer(x, summary=Summary(full=True))
    close(statistics.full, weights)
    same(got, expected[0], x, *layer.parameters())


def test_attention_pool_with_learned_query_matches_formula() -> None:
    layer = shaken(AttentionPool2d(C, 4, 3, mean=False, position=nn.Identity()))
    x = randn(B, C, H, W)
    places = tokens(x)
    q, k, v = (
        y @ m.weight.T + m.bias
        for y, m in ((layer.query.expand(B, 1, C), layer.q), (places, layer.k), (places, layer.v))
    )
    expected = softmax_of(q, k, v, 4)[:, 0] @ layer.out.weight.T + layer.out.bias
    same(layer(x), expected, x, *layer.parameters())
