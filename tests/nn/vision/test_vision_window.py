"""`WindowAttention2d` against loops over positions, and against the Swin of Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.feature_maps import B, C, H, W, close, randn, same, shaken, tokens
from torch import Tensor, nn
from transformers import SwinConfig
from transformers.models.swin.modeling_swin import SwinLayer

from regard import Summary, normalizer, score
from regard.nn.vision import WindowAttention2d


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def groups(length: int, window: int, shift: int) -> list[int]:
    """Return the window index of each row (or column) of a map. The first window ends after `shift` rows."""
    if length <= window:
        return [0] * length
    return [(i - shift) // window for i in range(length)]


def by_loops(layer: WindowAttention2d, x: Tensor, heads: int) -> Tensor:
    """x + W-MSA(LayerNorm(x)), position by position, without padding, rolling and masks."""
    maps, table = layer.attention, layer.bias.table
    (h, w), (down, right) = layer.window, layer.shift
    rows, columns = groups(x.shape[2], h, down), groups(x.shape[3], w, right)
    places = [(r, c) for r in range(x.shape[2]) for c in range(x.shape[3])]
    y = tokens(x)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + maps.norm.eps).sqrt()
    y = y * maps.norm.weight + maps.norm.bias
    q, k, v = (y @ maps.qkv.weight.T + maps.qkv.bias).split(C, -1)
    out = []
    for i, (r, c) in enumerate(places):
        shared = [j for j, (s, d) in enumerate(places) if rows[s] == rows[r] and columns[d] == columns[c]]
        index = [(r - places[j][0] + h - 1) * (2 * w - 1) + c - places[j][1] + w - 1 for j in shared]
        parts = []
        for n in range(heads):
            part = slice(n * C // heads, (n + 1) * C // heads)
            scores = (k[:, shared, part] @ q[:, i, part, None])[..., 0] / (C // heads) ** 0.5 + table[index, n]
            parts.append((torch.softmax(scores, -1)[..., None] * v[:, shared, part]).sum(1))
        out.append(torch.cat(parts, -1))
    z = torch.stack(out, 1) @ maps.out.weight.T + maps.out.bias
    return x + z.mT.reshape(x.shape)


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((6, 6), 3, 0),
        ((6, 6), 3, 1),
        ((6, 6), (2, 3), (1, 2)),
        ((5, 7), 3, 0),
        ((5, 7), 3, 2),
        ((5, 7), (4, 2), (3, 1)),
        ((5, 7), (5, 3), (2, 1)),  # one window along a side: nothing is shifted along it
        ((5, 7), (9, 4), 2),  # nor where the window is larger than the map
        ((2, 3), 7, 3),
        ((5, 1), 1, 0),
        ((1, 5), 2, 1),
    ],
)
def test_window_attention_matches_formula(size: Sequence[int], window: Any, shift: Any) -> None:
    layer, x = shaken(WindowAttention2d(C, 2, window, shift)), randn(2, C, *size)
    same(layer(x), by_loops(layer, x, 2), x, *layer.parameters())


def swin(heads: int, window: int, shift: int, side: int) -> SwinLayer:
    """Return the Hugging Face layer without its feed-forward part."""
    config = SwinConfig(window_size=window, embed_dim=C, hidden_dropout_prob=0.0, attn_implementation="eager")
    layer = SwinLayer(config, C, (side, side), heads, shift_size=shift)
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.3)
    for parameter in layer.mlp.fc2.parameters():
        nn.init.zeros_(parameter)
    return layer.double().eval()


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("heads", [1, 4])
def test_window_attention_matches_hugging_face_swin(heads: int, shift: int) -> None:
    window, side = 3, 9
    theirs, ours = swin(heads, window, shift, side), WindowAttention2d(C, heads, window, shift).double()
    a = theirs.attention
    with torch.no_grad():
        ours.bias.table.copy_(a.relative_position_bias.relative_position_bias_table)
        ours.attention.norm.load_state_dict(theirs.layernorm_before.state_dict())
        ours.attention.norm.eps = theirs.layernorm_before.eps
        ours.attention.out.load_state_dict(a.o_proj.state_dict())
        for name in ("weight", "bias"):
            parts = [getattr(linear, name) for linear in (a.q_proj, a.k_proj, a.v_proj)]
            getattr(ours.attention.qkv, name).copy_(torch.cat(parts))
    x = randn(B, C, side, side)
    expected, weights = theirs(tokens(x), (side, side))
    got, statistics = ours(x, summary=Summary(full=True))
    # Hugging Face computes the softmax in float32 for all dtypes, and masks by adding -100.
    limit = 16 * torch.finfo(torch.float32).eps
    assert (tokens(got) - expected).abs().max() <= limit * expected.abs().max()
    assert (statistics.full.flatten(0, 1) - weights).abs().max() <= limit
    dout = torch.randn_like(expected)
    mine = torch.autograd.grad((tokens(got) * dout).sum(), [x, ours.bias.table])
    right = torch.autograd.grad((expected * dout).sum(), [x, a.relative_position_bias.relative_position_bias_table])
    for one, other in zip(mine, right, strict=True):
        assert (one - other).abs().max() <= limit * other.abs().max()


def test_summary_is_per_window() -> None:
    layer = WindowAttention2d(C, 2, 3, 1).double()
    _, statistics = layer(randn(B, C, H, W), summary=Summary(full=True))
    assert statistics.full.shape == (B, 6, 2, 9, 9)
    # The last window holds row 4, a padded row, and row 0, which was rolled; two padded columns, and column 0.
    rows, columns = (4, None, 0), (None, None, 0)
    there = [None if r is None or c is None else (r, c) for r in rows for c in columns]
    for i, query in enumerate(there):
        for j, key in enumerate(there):
            assert bool(statistics.full[:, -1, :, i, j].any()) == (query == key)


def test_positions_affect_own_window_only() -> None:
    layer, x = shaken(WindowAttention2d(C, 2, (3, 4), (1, 2))), randn(1, C, H, W)
    rows, columns = groups(H, 3, 1), groups(W, 4, 2)
    for r in range(H):
        for c in range(W):
            other = x.detach().clone()
            other[:, 0, r, c] += 1.0  # one channel: LayerNorm forgets what is added to all
            moved = (layer(other) != layer(x)).any(1)[0]
            expected = [[rows[i] == rows[r] and columns[j] == columns[c] for j in range(W)] for i in range(H)]
            assert torch.equal(moved, torch.tensor(expected))


def test_score_and_normalizer_parameters_learn() -> None:
    temperature = nn.Parameter(torch.rand(2, dtype=torch.float64) + 0.1)
    layer = WindowAttention2d(C, 2, 3, score=score.Cosine(temperature), normalizer=normalizer.Sparsemax()).double()
    assert any(parameter is temperature for parameter in layer.parameters())
    x = randn(B, C, 3, 3)
    out, statistics = layer(x, summary=Summary(full=True))
    q, k, v = layer.attention.qkv(layer.attention.norm(tokens(x))).view(B, 9, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
    unit_q, unit_k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
    scores = unit_q @ unit_k.mT / temperature[:, None, None] + layer.bias(3, 3)
    # Sparsemax by definition: the threshold from the k largest scores.
    z = scores.sort(-1, descending=True).values
    total, rank = z.cumsum(-1) - 1, torch.arange(1, 10)
    support = (z * rank > total).sum(-1, keepdim=True)
    weights = (scores - total.gather(-1, support - 1) / support).clamp(min=0)
    close(statistics.full[:, 0], weights)
    y = (weights @ v).transpose(1, 2).flatten(2) @ layer.attention.out.weight.T + layer.attention.out.bias
    same(out, x + y.mT.reshape(x.shape), x, *layer.parameters())
