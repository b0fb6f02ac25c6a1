"""Position encodings match the formulas of their papers and the code of Hugging Face Transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.t5.modeling_t5 import T5Attention

import regard
from regard import mask, position
from regard.components.position import NTK, T5, ALiBi, Learned, Linear, Llama3, Rotary, YaRN

F32 = 2.0**-24  # half a unit in the last place of 1, relative
B, H, G, L, S, D = 2, 6, 3, 5, 11, 16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def weights(L: int, S: int, bias: Any, heads: int = H, dtype: torch.dtype = torch.float64, **more: Any) -> Tensor:
    """Return the log weights (H, L, S) for scores that consist of the bias only, minus those of key 0."""
    q, k = (torch.zeros(1, heads, n, 1, dtype=dtype) for n in (L, S))
    _, stats = regard.attention(q, k, k, bias=bias, summary=regard.Summary(full=True), **more)
    log = stats.full[0].log()
    return log - log[..., :1]


# ---------------------------------------------------------------------------------------------------------------------
# Encodings of the input.


@pytest.mark.parametrize(("length", "width", "base", "start"), [(13, 6, 1e4, 0), (7, 10, 500.0, 9), (0, 2, 10.0, 0)])
def test_sinusoidal_matches_formula(length: int, width: int, base: float, start: int) -> None:
    got = position.sinusoidal(length, width, base=base, start=start)
    assert got.shape == (length, width)
    assert got.dtype == torch.float32
    for pos in range(length):
        for i in range(width // 2):
            angle = (start + pos) / base ** (2 * i / width)
            # The exact value, rounded once to float32.
            assert abs(got[pos, 2 * i].item() - math.sin(angle)) <= F32
            assert abs(got[pos, 2 * i + 1].item() - math.cos(angle)) <= F32


def test_learned_adds_vector_per_position() -> None:
    layer = Learned(9, 4)
    x = torch.randn(2, 3, 4)
    for start in (0, 6):
        out = layer(x, start=start)
        for i in range(3):
            assert torch.equal(out[:, i], x[:, i] + layer.weight[start + i])
    layer(x, start=6).sum().backward()
    assert torch.equal(layer.weight.grad, torch.tensor([0.0] * 6 + [2.0] * 3)[:, None].expand(9, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Rotary.

SCALINGS = {
    "default": ({}, None),
    "linear": ({"factor": 4.0}, Linear(4.0)),
    "yarn": ({"factor": 8.0, "original_max_position_embeddings": 64}, YaRN(8.0, length=64)),
    "yarn with other parameters": (
        {
            **{"factor": 2.5, "original_max_position_embeddings": 999},
            **{"beta_fast": 9, "beta_slow": 3, "attention_factor": 1.5},
        },
        YaRN(2.5, length=999, fast=9, slow=3, magnitude=1.5),
    ),
    "llama3": (
        {"factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        Llama3(8.0, length=64),
    ),
    # The base depends on the sequence length: 256 positions, with a training length of 64.
    "dynamic": ({"factor": 2.0}, NTK(2.0 * 256 / 64 - 1.0)),
}


def llama_rotary(kind: str, width: int, base: float) -> llama.LlamaRotaryEmbedding:
    parameters = {"rope_type": kind.split()[0], "rope_theta": base, **SCALINGS[kind][0]}
    config = LlamaConfig(
        hidden_size=4 * width, num_attention_heads=4, max_position_embeddings=64, rope_parameters=parameters
    )
    return llama.LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize(("width", "base"), [(16, 10000.0), (64, 500000.0)])
def test_rotary_matches_llama(kind: str, width: int, base: float) -> None:
    theirs, ours = llama_rotary(kind, width, base), Rotary(width, base=base, scaling=SCALINGS[kind][1])
    positions = torch.arange(256)[None]
    x = torch.randn(1, 4, 256, width)
    cos, sin = theirs(x, positions)
    # Theirs are powers and quotients in float32, which round once or twice each.
    assert torch.allclose(ours.speed, theirs.inv_freq.double(), rtol=6 * F32, atol=0)
    assert ours.magnitude == pytest.approx(theirs.attention_scaling, rel=1e-15)
    # This is the error of their angles at the last position; the error of a rotated unit vector is as large.
    off = 255 * 8 * F32 + 4 * F32
    rotated = llama.apply_rotary_pos_emb(x, x, cos, sin)
    for got, expected in zip(ours(x, x), rotated, strict=True):
        assert (got - expected).abs().max() <= off * ours.magnitude * 2 * x.abs().max()
    # With the same angles in float64, the results are the same.
    angle = positions[..., None].double() * torch.cat([ours.speed, ours.speed])
    x = x.double()
    cos, sin = (f(angle) * theirs.attention_scaling for f in (torch.cos, torch.sin))
    for got, expected in zip(ours(x, x), llama.apply_rotary_pos_emb(x, x, cos, sin), strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-13)


def rotate_by_loops(x: Tensor, positions: Tensor, width: int, interleaved: bool) -> Tensor:
    """Rotate x (N, D) by positions (N,) in float64, by equation 34 of the paper."""
    out = x.clone()
    for n in range(x.shape[0]):
        for i in range(width // 2):
            angle = positions[n].item() * 10000.0 ** (-2 * i / width)
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
            out[n, a] = x[n, a] * math.cos(angle) - x[n, b] * math.sin(angle)
            out[n, b] = x[n, b] * math.cos(angle) + x[n, a] * math.sin(angle)
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [2, 6, D])
def test_rotary_matches_formula(width: int, interleaved: bool) -> None:
    rotary = Rotary(width, interleaved=interleaved)
    x = torch.randn(B, H, S, D, dtype=torch.float64)
    shared, own = torch.randperm(50)[:S], torch.stack([torch.randperm(50)[:S] - 7 for _ in range(B)])
    for positions, x_ in ((shared, x), (own, x), (own[:1], x), (own, x[:, 0]), (shared, x[:, 0]), (shared, x[0, 0])):
        got = rotary.rotate(x_, positions)
        rows = positions.expand(B, S)
        for b in range(x_.shape[0] if x_.dim() > 2 else 1):
            for h in range(H if x_.dim() == 4 else 1):
                at = (b, h)[: x_.dim() - 2]
                assert torch.allclose(got[at], rotate_by_loops(x_[at], rows[b], width, interleaved), rtol=0, atol=1e-13)
    assert torch.equal(rotary.rotate(x, shared)[..., width:], x[..., width:])


def test_rotary_interleaved_matches_gpt_j() -> None:
    """GPT-J rotates adjacent pairs, and only the first elements of each head."""
    width, rotary = 8, Rotary(8, interleaved=True)
    x = torch.randn(B, S, H, D, dtype=torch.float64)
    table = gptj.create_sinusoidal_positions(S, width)
    sine = (torch.arange(S)[:, None] * rotary.speed).sin()
    assert torch.allclose(table[:, : width // 2].double(), sine, rtol=0, atol=S * 4 * F32)
    angle = torch.arange(S)[None, :, None] * rotary.speed
    rotated = gptj.apply_rotary_pos_emb(x[..., :width], angle.sin(), angle.cos())
    got = rotary.rotate(x.transpose(1, 2), torch.arange(S)).transpose(1, 2)
    assert torch.allclose(got, torch.cat([rotated, x[..., width:]], -1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rotary_products_depend_on_distance_only(interleaved: bool, dtype: torch.dtype) -> None:
    """Also at positions near a million: angles are not rounded to the precision of the input."""
    rotary = Rotary(D, interleaved=interleaved)
    q, k = (torch.randn(1, 1, 1, D, dtype=dtype) for _ in range(2))
    near = {
        n: (rotary.rotate(q, torch.tensor([n])) * rotary.rotate(k, torch.tensor([0]))).sum() for n in (0, 1, 9, 130)
    }
    off = (D * q.norm() * k.norm() * torch.finfo(dtype).eps).item() + 2e6 * 2.0**-52 * q.norm() * k.norm()
    for distance, expected in near.items():
        for at in (3, 77, 4096, 999_983):
            rotated = rotary.rotate(q, torch.tensor([at + distance])), rotary.rotate(k, torch.tensor([at]))
            assert abs((rotated[0] * rotated[1]).sum() - expected) <= off
    assert abs(near[0] - (q * k).sum()) <= off


@pytest.mark.parametrize("step", [1, 3, S])
def test_rotary_decoding_with_cache(step: int) -> None:
    """The last queries have the positions of the last keys; keys that were rotated before do not change."""
    rotary = Rotary(12)
    q, k = torch.randn(B, H, S, D), torch.randn(B, G, S, D)
    rotated_q, rotated_k = rotary(q, k)
    late_q, all_k = rotary(q[:, :, -step:], k)
    assert torch.equal(late_q, rotated_q[:, :, -step:])
    assert torch.equal(all_k, rotated_k)
    late_q, late_k = rotary(q[:, :, -step:], k[:, :, -step:], start=S - step)
    assert torch.equal(late_q, rotated_q[:, :, -step:])
    assert torch.equal(late_k, rotated_k[:, :, -step:])
    # Left padding: positions of each batch row start at its own first token.
    own = torch.stack([torch.arange(S), torch.arange(S) - 4]).clamp(min=0)
    late_q, all_k = rotary(q[:, :, -step:], k, positions=own)
    for b in range(B):
        assert torch.equal(all_k[b], rotary.rotate(k[b], own[b]))
        assert torch.equal(late_q[b], rotary.rotate(q[b, :, -step:], own[b, -step:]))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_empty_inputs(interleaved: bool) -> None:
    q, k = torch.zeros(0, 2, 3, 8), torch.zeros(0, 2, 5, 8)
    got = position.Rotary(6, interleaved=interleaved)(q, k)
    assert [x.shape for x in got] == [q.shape, k.shape]
    assert position.Rotary(8, interleaved=interleaved).rotate(torch.zeros(2, 0, 8), torch.arange(0)).shape == (2, 0, 8)


def test_rotary_speeds_stay_float64() -> None:
    """Neither `.half()` nor creation on the meta device changes the speeds; in Hugging Face Transformers both do."""
    expected = Rotary(D, scaling=YaRN(4.0)).speed
    assert torch.equal(Rotary(D, scaling=YaRN(4.0)).bfloat16().speed, expected)
    assert torch.equal(torch.nn.Sequential(Rotary(D, scaling=YaRN(4.0))).half().to(torch.float16)[0].speed, expected)
    with torch.device("meta"):
        on_meta = Rotary(D, scaling=YaRN(4.0))
    assert torch.equal(on_meta.to_empty(device="cpu").speed, expected)
    assert not Rotary(D).state_dict()
    q = torch.randn(1, 1, 3, D, dtype=torch.bfloat16)
    assert Rotary(D)(q, q)[0].dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# ALiBi.


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 32, 64])
def test_alibi_slopes_for_power_of_two(heads: int) -> None:
    """A geometric sequence that starts at 2^(-8/H), with this ratio."""
    ratio = 2 ** (-8 / heads)
    assert position.alibi_slopes(heads) == pytest.approx([ratio**h for h in range(1, heads + 1)], rel=1e-14)


@pytest.mark.parametrize("heads", [*range(1, 41), 71, 112])
def test_alibi_matches_bloom(heads: int) -> None:
    slopes = position.alibi_slopes(heads)
    theirs = build_alibi_tensor(torch.ones(1, 5), heads, torch.float32)[:, 0]
    # Theirs are powers in float32, of exponents up to 8 heads.
    assert torch.allclose(torch.tensor(slopes), theirs[:, 1], rtol=4 * heads * F32, atol=0)
    if heads > 8:
        return
    # Theirs count from key 0, which shifts each row by a constant. Under a causal mask, softmax is invariant to it.
    causal = mask.causal("end")
    got = weights(3, 5, ALiBi(), heads, mask=causal, dtype=torch.float32)
    expected = weights(3, 5, theirs[None, :, None, :], heads, mask=causal, dtype=torch.float32)
    stats = torch.ones(3, 5).tril(2).bool()
    assert torch.allclose(got[:, stats], expected[:, stats], rtol=0, atol=4 * heads * F32 + 32 * F32)


@pytest.mark.parametrize("align", ["start", "end", 2])
def test_alibi_is_negative_slope_times_distance(align: Any) -> None:
    first = {"start": 0, "end": S - L}.get(align, align)
    heads = 12  # not a power of two: most slopes are not exact in float32
    learned = torch.rand(heads, dtype=torch.float64)
    for slopes, given in ((position.alibi_slopes(heads), None), (learned.tolist(), learned)):
        got = weights(L, S, ALiBi(given, align), heads)
        for h in range(heads):
            for i in range(L):
                expected = [-slopes[h] * (abs(i + first - j) - abs(i + first)) for j in range(S)]
                # Slopes are float64 for float64 scores; in float32 the error would be 1e-7.
                assert got[h, i].tolist() == pytest.approx(expected, abs=1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# T5.


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("buckets", "reach"),
    [
        *[(32, 128), (32, 20), (8, 16), (64, 256), (16, 100), (128, 512), (40, 129), (4, 9), (256, 2048), (32, 1000)],
        # The rounding of the logarithm decides where a bucket ends: another order of the products shifts it by one key.
        *[(12, 294), (24, 294), (128, 100)],
    ],
)
def test_t5_buckets_match_hugging_face(buckets: int, reach: int, bidirectional: bool) -> None:
    distance = torch.arange(-5000, 5001)
    theirs = T5Attention._relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=buckets, max_distance=reach
    )
    bias = T5(torch.zeros(buckets, 1), bidirectional, reach)
    # A key n positions before the query has the relative position -n.
    for part in (slice(None), slice(4990, 5011), slice(4871, 5140, 2)):
        assert torch.equal(bias._bucket(-distance[part].clone()), theirs[part])
    assert torch.equal(bias._bucket(-distance.view(73, 137).mT), theirs.view(73, 137).mT)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("align", ["start", "end", 2])
def test_t5_adds_table_entry_of_bucket(bidirectional: bool, align: Any) -> None:
    first = {"start": 0, "end": S - L}.get(align, align)
    table = torch.randn(8, H, dtype=torch.float64, requires_grad=True)
    got = weights(L, S, T5(table, bidirectional, 12, align))
    relative = torch.arange(S)[None, :] - (torch.arange(L)[:, None] + first)
    bucket = T5Attention._relative_position_bucket(relative, bidirectional, num_buckets=8, max_distance=12)
    expected = table[bucket].permute(2, 0, 1)
    assert torch.allclose(got, expected - expected[..., :1], rtol=0, atol=1e-13)
    dout = torch.randn_like(got)
    (gradient,) = torch.autograd.grad((got * dout).sum(), table)
    (right,) = torch.autograd.grad(((expected - expected[..., :1]) * dout).sum(), table)
    assert torch.allclose(gradient, right, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", [None, "tiled", "reference"])
def test_alibi_slopes_per_batch_row(backend: str | None) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(3, 4, 70, 8), torch.randn(3, 2, 90, 8)
    slopes = torch.rand(3, 4, requires_grad=True)
    out = regard.attention(q, k, k, bias=position.ALiBi(slopes, align="end"), backend=backend)
    rows = [
        regard.attention(q[b : b + 1], k[b : b + 1], k[b : b + 1], bias=position.ALiBi(slopes[b], align="end"))
        for b in range(3)
    ]
    torch.testing.assert_close(out, torch.cat(rows), rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(out)
    got, expected = (torch.autograd.grad((x * weights).sum(), slopes)[0] for x in (out, torch.cat(rows)))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    reasons = regard.explain(q, k, k, bias=position.ALiBi(slopes, align="end")).reasons
    assert reasons["cpu"] == "it supports ALiBi slopes (H,), not (B, H)"
    with pytest.raises(ValueError, match=r"expected a float tensor of shape \(H,\) = \(4,\) or \(B, H\) = \(3, 4\)"):
        regard.attention(q, k, k, bias=position.ALiBi(slopes.T, align="end"))
