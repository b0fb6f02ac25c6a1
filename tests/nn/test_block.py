"""`AttentionBlock` with pre- and post-norm against a reference implementation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard import Summary, mask, normalizer, position, score
from regard.nn.block import AttentionBlock
from regard.nn.cache import KeyValueCache

B, L, S, E, H = 3, 5, 7, 12, 2
D = E // H
DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert not expected.isnan().any()
    assert float((got - expected).detach().abs().max()) <= 1e-12 * max(1.0, float(expected.detach().abs().max()))


def block_of(norm: str = "post", **arguments: Any) -> AttentionBlock:
    block = AttentionBlock(E, H, 0.0, norm=norm, dtype=DOUBLE, **arguments)
    for seed, parameter in enumerate(block.parameters()):
        parameter.data = randn(*parameter.shape, seed=seed + 10) / 2
    return block


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def textbook(
    block: AttentionBlock, query: Tensor, key: Tensor, value: Tensor, table: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Maps, heads, scores / sqrt(D), -1e9 where the mask is 0, softmax, the weighted sum, the heads side by side, the output
    map, and the norm of its sum with the query.
    """
    layer = block.attention
    maps = zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), (query, key, value), strict=True)
    q, k, v = (nn.functional.linear(x, w, b).view(B, -1, H, D).transpose(1, 2) for w, b, x in maps)
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)
    if table is not None:
        scores = scores.masked_fill(table == 0, -1e9)
    weights = scores.softmax(-1)
    heads = (weights @ v).transpose(1, 2).reshape(B, -1, E)
    return heads @ layer.out_proj.weight.T + layer.out_proj.bias, weights


def tables(queries: int, keys: int) -> dict[str, Tensor | None]:
    lower, padding = torch.ones(queries, keys).tril(), torch.arange(keys) < torch.tensor([keys, 2, 4])[:, None]
    return {
        "none": None,
        "lower, bool": lower.bool(),
        "lower, int": lower.long(),
        "lower, float": lower,
        "padding": padding[:, None, None],
        "both": (padding[:, None, None] & lower.bool())[:, :].to(torch.uint8),
        "of heads": (randn(B, H, queries, keys) > 0).index_fill(-1, torch.tensor([0]), True),
    }


@pytest.mark.parametrize("named", tables(L, S))
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_attention_block_matches_reference(norm: str, named: str) -> None:
    """Self-attention, cross-attention, and separate keys and values: outputs, weights, and all gradients."""
    block = block_of(norm)
    x, y, z = randn(B, L, E, seed=1), randn(B, S, E, seed=2), randn(B, S, E, seed=3)
    for given in ((x,), (x, x, x), (x, y), (x, y, z), (x, None, 2 * x), (x, x + 1, x)):
        leaves = [one.requires_grad_() for one in (x, y, z)] + list(block.parameters())
        key = x if len(given) < 2 or given[1] is None else given[1]
        value = key if len(given) < 3 else given[2]
        table = tables(L, key.shape[1])[named]
        out, statistics = block(*given, mask=table, summary=Summary(full=True))
        inner = [normed(w, block.norm) if norm == "pre" and w is x else w for w in (x, key, value)]
        attended, weights = textbook(block, *inner, table)
        baseline = x + attended if norm == "pre" else normed(x + attended, block.norm)
        same(out, baseline)
        same(statistics.full, weights)
        same(block(*given, mask=table), baseline)
        dout = randn(*out.shape, seed=4)
        for got, expected in zip(
            *(torch.autograd.grad(w, leaves, dout, allow_unused=True) for w in (out, baseline)), strict=True
        ):
            assert (got is None) == (expected is None)
            if got is not None:
                same(got, expected)


def test_bool_and_numeric_masks_agree() -> None:
    block, x = block_of(), randn(B, L, E)
    same(block(x, mask=mask.causal()), block(x, mask=torch.ones(L, L).tril()))
    assert torch.equal(
        block(x, mask=mask.lengths([L, 2, 0])),
        block(x, mask=torch.arange(L) < torch.tensor([L, 2, 0])[:, None, None, None]),
    )
    # A fully masked query: the residual plus the output projection of 0.
    same(block(x, mask=mask.lengths([L, 2, 0]))[2], normed(x[2] + block.attention.out_proj.bias, block.norm))


def test_dropout_of_weights_and_output() -> None:
    """Dropout of the attention weights and of the attention output, in training only."""
    block, x = AttentionBlock(E, H, 0.4), torch.randn(B, 64, E)
    assert (block.attention.dropout, block.dropout.p) == (0.4, 0.4)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
    block.train().attention.dropout, block.norm = 0.0, nn.Identity()  # type: ignore[assignment]
    added = block(x) - x
    share = float((added == 0).float().mean())
    assert abs(share - 0.4) < 4 * math.sqrt(0.24 / added.numel())
    torch.manual_seed(0)
    first = block(x)
    torch.manual_seed(0)
    assert torch.equal(first, block(x))


@torch.no_grad()
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_components_and_cached_steps(norm: str) -> None:
    """All components are passed on, and cached steps match a full pass."""
    arguments = {"score": score.Cosine(0.3), "normalizer": normalizer.Softmax(0.0), "softcap": 2.0, "kv_heads": 1}
    own, cross = block_of(norm, **arguments, position=position.ALiBi()), block_of(norm, **arguments)
    plain = block_of(norm, kv_heads=1)
    x, y, known = randn(B, L, E), randn(B, S, E), mask.lengths([S, 2, 4])
    baseline = cross(own(x, mask=mask.causal()), y, mask=known)
    assert float((baseline - plain(plain(x, mask=mask.causal()), y, mask=known)).abs().max()) > 0.01
    cache, memory = KeyValueCache(), cross.attention.remember(y)
    for step in range(L):
        out, statistics = cross(
            own(x[:, step : step + 1], cache=cache), mask=known, cache=memory, summary=Summary(top=2)
        )
        same(out, baseline[:, step : step + 1])
        assert statistics.top.weights.shape == (B, H, 1, 2)


def test_state_dict_round_trip() -> None:
    block = block_of(position=position.T5(nn.Parameter(randn(8, H))))
    other = AttentionBlock(E, H, dtype=DOUBLE, position=position.T5(nn.Parameter(randn(8, H, seed=1)))).eval()
    other.load_state_dict(block.state_dict())
    assert set(block.state_dict()) == {
        "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight", "attention.out_proj.bias",
        "attention.position.table", "norm.weight", "norm.bias",
    }  # fmt: skip
    x = randn(B, L, E)
    assert torch.equal(block(x), other(x))
    assert AttentionBlock(E, H, dtype=torch.bfloat16, device="meta").norm.weight.device.type == "meta"


@pytest.mark.parametrize(("kind", "given", "message"), [
    (ValueError, {"mask": torch.full((L, L), -math.inf)}, r"mask has elements other than 0 and 1; expected .* of 0 and 1 \(True or 1 = may attend\)"),
    (TypeError, {"mask": [[1, 0]]}, r"mask is \[\[1, 0\]\]; expected one of regard.mask, or a tensor of bools"),
    (ValueError, {"mask": torch.ones(1, B, 1, L, L)}, r"mask is a float32 tensor of shape \(1, 3, 1, 5, 5\); expected one of"),
])  # fmt: skip
def test_invalid_masks_raise(kind: type[Exception], given: dict[str, Any], message: str) -> None:
    with pytest.raises(kind, match=f"^AttentionBlock: {message}"):
        block_of()(randn(B, L, E), **given)


def test_invalid_constructor_arguments_raise() -> None:
    with pytest.raises(ValueError, match=r'^AttentionBlock: norm is \'both\'; expected "post" or "pre"'):
        AttentionBlock(E, H, norm="both")
    with pytest.raises(ValueError, match=r"^MultiheadAttention: embed_dim is 12; expected a multiple of num_heads, 5"):
        AttentionBlock(E, 5)
    with pytest.raises(
        ValueError, match=r"^mask: the dense mask has shape \(3, 5, 7\); expected one that broadcasts to"
    ):
        block_of()(randn(B, L, E), randn(B, S, E), mask=torch.ones(B, L, S))
