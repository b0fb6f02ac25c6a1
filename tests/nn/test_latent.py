"""`LatentAttention` against its formula and against Hugging Face, with and without absorption."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from regard import Summary, mask, normalizer, position
from regard.nn.cache import KeyValueCache
from regard.nn.latent import LatentAttention

B, L, E, H, R = 2, 7, 21, 3, 4
RANK, HEAD, VALUE = 11, 6, 5
DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def same(got: Tensor, expected: Tensor, relative: float = 1e-12) -> None:
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= relative * expected.abs().max().clamp(min=1.0)).all()


def layer_of(interleaved: bool = True, **arguments: Any) -> LatentAttention:
    sizes: dict[str, Any] = {"head_dim": HEAD, "value_dim": VALUE, "dtype": DOUBLE, **arguments}
    layer = LatentAttention(E, H, RANK, position=position.Rotary(R, interleaved=interleaved), **sizes)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = randn(*parameter.shape, seed=seed + 10) / 2
    return layer


X = randn(B, L, E)
CAUSAL = mask.causal()


def rms(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    return x / torch.sqrt((x * x).mean() + 1e-6) * norm.weight


def turned(x: Tensor, place: int) -> Tensor:
    """Rotate pairs of adjacent elements, as complex numbers, by the position."""
    speed = 10000.0 ** (-torch.arange(R // 2, dtype=DOUBLE) * 2 / R)
    z = torch.complex(x[0::2], x[1::2]) * torch.polar(torch.ones(R // 2, dtype=DOUBLE), place * speed)
    return torch.view_as_real(z).flatten()


def plain(layer: LatentAttention, x: Tensor, causal: bool) -> Tensor:
    """The equations of the paper, token by token and head by head, for x (L, E)."""
    split = layer.kv_b_proj.weight.view(H, HEAD + VALUE, RANK)
    latents, keys, queries = [], [], []
    for place, token in enumerate(x):
        down = layer.kv_a_proj_with_mqa.weight @ token
        down = down if layer.kv_a_proj_with_mqa.bias is None else down + layer.kv_a_proj_with_mqa.bias
        c = rms(down[:RANK], layer.kv_a_layernorm)
        shared = turned(down[RANK:], place)
        latents.append(c)
        keys.append([torch.cat([split[h, :HEAD] @ c, shared]) for h in range(H)])
        if layer.query_rank is None:
            q = layer.q_proj.weight @ token
        else:
            q = layer.q_a_proj.weight @ token
            q = q if layer.q_a_proj.bias is None else q + layer.q_a_proj.bias
            q = layer.q_b_proj.weight @ rms(q, layer.q_a_layernorm)
        queries.append([torch.cat([part[:HEAD], turned(part[HEAD:], place)]) for part in q.view(H, -1)])
    out = []
    for i in range(len(x)):
        heads = []
        for h in range(H):
            last = i + 1 if causal else len(x)
            scores = torch.stack([queries[i][h] @ keys[j][h] / math.sqrt(HEAD + R) for j in range(last)])
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(w * (split[h, HEAD:] @ latents[j]) for j, w in enumerate(weights)))
        row = layer.o_proj.weight @ torch.cat(heads)
        out.append(row if layer.o_proj.bias is None else row + layer.o_proj.bias)
    return torch.stack(out)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "query rank": {"query_rank": 8},
    "bias": {"query_rank": 8, "bias": True},
}


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_latent_attention_matches_equations(
    form: str, causal: bool, absorbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without absorption, including the gradients of all parameters."""
    monkeypatch.setattr(LatentAttention, "_is_absorption_cheaper", lambda *_: absorbed)
    layer, x = layer_of(**FORMS[form]), X.clone().requires_grad_()
    out, reference = layer(x, CAUSAL if causal else None), torch.stack([plain(layer, row, causal) for row in x])
    same(out, reference)
    leaves, dout = [x, *layer.parameters()], randn(B, L, E, seed=3)
    for got, expected in zip(*(torch.autograd.grad(y, leaves, dout) for y in (out, reference)), strict=True):
        same(got, expected)


@pytest.mark.parametrize("chunks", [[1] * L, [3, 1, 2, 1], [L]], ids=str)
@pytest.mark.parametrize("query_rank", [None, 8])
@torch.no_grad()
def test_cached_steps_match_full_sequence(
    query_rank: int | None, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds only the latent and the rotary part of a key per token."""
    layer, cache, found = layer_of(query_rank=query_rank), KeyValueCache(), []
    ways: list[bool] = []
    chosen = LatentAttention._is_absorption_cheaper
    monkeypatch.setattr(LatentAttention, "_is_absorption_cheaper", lambda *x: ways.append(chosen(*x)) or ways[-1])
    reference, statistics = layer(X, CAUSAL, summary=Summary(full=True))
    past = 0
    for part in X.split(chunks, 1):
        out, step = layer(part, None if part.shape[1] == 1 else CAUSAL, cache=cache, summary=Summary(full=True))
        found.append(out)
        past += part.shape[1]
        same(step.full, statistics.full[:, :, past - part.shape[1] : past, :past])
    same(torch.cat(found, 1), reference)
    assert cache.length == L
    assert cache.keys.shape == (B, 1, L, RANK + R) and cache.values.numel() == 0
    assert ways[0] is False  # as many queries as keys
    if chunks == [1] * L:
        assert ways[-1] is True
    cache.reorder(torch.tensor([1, 1, 0]))
    token, rows = randn(3, 1, E, seed=5), torch.tensor([1, 1, 0])
    same(layer(token, cache=cache), layer(torch.cat([X[rows], token], 1), CAUSAL)[:, -1:])


def test_cached_decoding_with_gradients_and_masks() -> None:
    layer, x, padding = (
        layer_of(),
        X.clone().requires_grad_(),
        mask.dense(torch.arange(L)[None, None, None] >= torch.tensor([0, 2]).view(2, 1, 1, 1)),
    )
    reference = layer(x, CAUSAL & padding)
    cache = KeyValueCache()
    steps = []
    for i in range(L):
        known = mask.dense(torch.arange(i + 1)[None, None, None] >= torch.tensor([0, 2]).view(2, 1, 1, 1))
        steps.append(layer(x[:, i : i + 1], known & CAUSAL, cache=cache))
    got = torch.cat(steps, 1)
    same(got, reference)
    assert (got[1, :2] == 0).all()  # no key is left, and the output map has no bias
    leaves, dout = [x, *layer.parameters()], randn(B, L, E, seed=3)
    for one, other in zip(*(torch.autograd.grad(y, leaves, dout) for y in (got, reference)), strict=True):
        same(one, other)


def theirs_of(kind: type, config: type, query_rank: int | None) -> nn.Module:
    """Return the Hugging Face layer with SDPA, and with norms that do not round to float32."""
    sizes = {
        "hidden_size": E,
        "num_attention_heads": H,
        "kv_lora_rank": RANK,
        "qk_rope_head_dim": R,
        "v_head_dim": VALUE,
    }
    reference = config(
        **sizes, q_lora_rank=query_rank, qk_nope_head_dim=HEAD, num_key_value_heads=H, attn_implementation="sdpa"
    )
    theirs = kind(reference, 0).to(DOUBLE)
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        if getattr(theirs, name) is not None:
            setattr(theirs, name, nn.RMSNorm(getattr(theirs, name).weight.shape[0], 1e-6, dtype=DOUBLE))
    return theirs


@pytest.mark.parametrize("query_rank", [None, 8])
@pytest.mark.parametrize("version", [2, 3])
def test_matches_deepseek_implementation(version: int, query_rank: int | None) -> None:
    """Its parameters load under their own names."""
    layer = layer_of(query_rank=query_rank)
    kinds = {2: (DeepseekV2Attention, hf.DeepseekV2Config), 3: (DeepseekV3Attention, hf.DeepseekV3Config)}[version]
    theirs = theirs_of(*kinds, query_rank)
    theirs.load_state_dict(layer.state_dict())
    angle = torch.arange(L, dtype=DOUBLE)[:, None] * 10000.0 ** (-torch.arange(R // 2, dtype=DOUBLE) * 2 / R)
    both = torch.cat([angle, angle], -1)[None]
    where = torch.polar(torch.ones_like(angle), angle)[None] if version == 2 else (both.cos(), both.sin())
    reference, _ = theirs(X, attention_mask=None, position_embeddings=where)
    # Version 2 rotates in float32.
    same(layer(X, CAUSAL), reference, 8 * torch.finfo(torch.float32).eps if version == 2 else 1e-12)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of torch's own norm, under autocast
def test_component_arguments() -> None:
    """Half-split rotary pairs, a sink, a scale, dropout, default widths, and several batch dimensions."""
    layer = layer_of(
        False, normalizer=normalizer.Softmax(nn.Parameter(torch.zeros(H, dtype=DOUBLE))), scale=0.1, dropout=0.5
    )
    nn.init.zeros_(layer.normalizer.sink)
    assert not torch.equal(layer(X), layer(X))
    layer.eval()
    _, statistics = layer(X, summary=Summary(full=True))
    assert (statistics.full.sum(-1) < 1).all()
    order = torch.cat([torch.arange(0, R, 2), torch.arange(1, R, 2)])
    other = layer_of(True, normalizer=normalizer.Softmax(0.0), scale=0.1).eval()
    state = copy.deepcopy(layer.state_dict())
    del state["normalizer.sink"]
    # The same pairs, permuted from half-split to adjacent elements.
    inverse = order.argsort()
    q = state["q_proj.weight"].view(H, HEAD + R, E)
    q[:, HEAD:] = q[:, HEAD:][:, inverse]
    state["kv_a_proj_with_mqa.weight"][RANK:] = state["kv_a_proj_with_mqa.weight"][RANK:][inverse]
    other.load_state_dict(state)
    same(other(X), layer(X))
    wide = X[:, None].expand(-1, 2, -1, -1)
    same(layer(wide, CAUSAL), layer(X, CAUSAL)[:, None].expand(-1, 2, -1, -1))
    plain = LatentAttention(E, H, RANK, position=position.Rotary(R))
    assert (plain.head_dim, plain.value_dim, plain.scale) == (7, 7, 11**-0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(X.float(), CAUSAL).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "given", "message"), [
    (ValueError, {"num_heads": 4}, "embed_dim is 21; expected a multiple of num_heads, 4, or head_dim"),
    (ValueError, {"kv_rank": 0}, "kv_rank is 0; expected an integer >= 1"),
    (ValueError, {"query_rank": 0}, "query_rank is 0; expected an integer >= 1"),
    (ValueError, {"head_dim": 0}, "head_dim is 0; expected an integer >= 1"),
    (TypeError, {"value_dim": 2.0}, "value_dim is 2.0; expected an integer >= 1"),
    (TypeError, {"position": position.ALiBi()}, "position is an object of class ALiBi; expected a position.Rotary"),
    (TypeError, {"normalizer": 3}, "normalizer is 3; expected one of regard.normalizer"),
    (TypeError, {"scale": "big"}, "scale is 'big'; expected a finite number, or None"),
])  # fmt: skip
def test_invalid_constructor_arguments_raise(kind: type[Exception], given: dict[str, Any], message: str) -> None:
    words = {"embed_dim": E, "num_heads": H, "kv_rank": RANK, "position": position.Rotary(R)}
    with pytest.raises(kind, match=f"^LatentAttention: {message}"):
        LatentAttention(**{**words, **given})


def test_invalid_forward_arguments_raise() -> None:
    layer = layer_of()
    for kind, x in ((ValueError, X[0]), (ValueError, X[..., 1:]), (TypeError, X.long()), (TypeError, [1])):
        with pytest.raises(kind, match=r"^LatentAttention: x is .*; expected a float tensor of shape \(B, L, 21\)"):
            layer(x)
    with pytest.raises(TypeError, match=r"^LatentAttention: x has dtype torch.float32 but the layer has torch.float64"):
        layer(X.float())
    with pytest.raises(ValueError, match=r"^KeyValueCache: the cache is fixed"):
        layer(X, cache=KeyValueCache(X, X, fixed=True))
