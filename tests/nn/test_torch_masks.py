"""Conversion of the masks of torch: single masks, combinations, and fully masked queries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard import mask, position, score
from regard.components.mask import Before, Dense
from regard.nn import multihead
from regard.nn.cache import KeyValueCache
from regard.nn.multihead import MultiheadAttention

B, L, S, E, H = 3, 5, 7, 12, 2
DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def layer_of(**arguments: Any) -> MultiheadAttention:
    layer = MultiheadAttention(E, H, **{"batch_first": True, "dtype": DOUBLE, **arguments})
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = randn(*parameter.shape, seed=seed + 10) / 3
    return layer


def same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert not expected.isnan().any()
    assert ((got - expected).abs() <= 1e-12 * expected.abs().clamp(min=1.0)).all()


X, Y = randn(B, L, E, seed=1), randn(B, S, E, seed=2)
RIGHT = torch.arange(S) >= torch.tensor([S, 2, 4])[:, None]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments that attention was called with."""
    calls: list[dict[str, Any]] = []
    attention = multihead.attention

    def note(*x: Tensor, **words: Any) -> Any:
        calls.append(words)
        return attention(*x, **words)

    monkeypatch.setattr(multihead, "attention", note)
    return calls


def floats(forbidden: Tensor) -> Tensor:
    return torch.zeros(forbidden.shape, dtype=DOUBLE).masked_fill(forbidden, -math.inf)


@pytest.mark.parametrize("as_given", [lambda x: x, floats])
def test_right_padding_becomes_lengths(asked: list[dict[str, Any]], as_given: Any) -> None:
    layer = layer_of()
    for padding in (RIGHT, RIGHT.flip(1), torch.zeros_like(RIGHT)):
        layer(X, Y, key_padding_mask=as_given(padding))
    first, second, third = (call["mask"] for call in asked)
    assert isinstance(first, Before) and first.n.tolist() == [S, 2, 4]
    assert isinstance(second, Dense) and torch.equal(second.table[:, 0, 0], ~RIGHT.flip(1))
    assert second.table.shape == (B, 1, 1, S)
    assert third is None
    assert all(call["bias"] is None for call in asked)


def test_float_masks_are_added_to_scores(asked: list[dict[str, Any]]) -> None:
    layer, lower = layer_of(), floats(torch.ones(L, S).triu(1).bool())
    layer(X, Y, attn_mask=lower)
    layer(X, Y, attn_mask=lower + 0.5)
    layer(X, Y, attn_mask=nn.Parameter(torch.zeros(L, S, dtype=DOUBLE)))  # requires grad
    assert [call["mask"] is None for call in asked] == [False, True, True]
    assert [call["bias"] is None for call in asked] == [True, False, False]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("words", [
    {"attn_mask": (torch.arange(L) == 2)[:, None].expand(L, S)},
    {"attn_mask": floats((torch.arange(L) == 2)[:, None].expand(L, S))},
    {"attn_mask": floats((torch.arange(L) == 2)[:, None].expand(L, S)) + 0.5},
    {"key_padding_mask": torch.ones(B, S).bool(), "attn_mask": torch.zeros(L, S).bool()},
    {"key_padding_mask": floats(torch.ones(B, S).bool())},
    {"mask": mask.lengths([0, 0, 0])},
])  # fmt: skip
def test_fully_masked_query_gives_projection_of_zero(words: dict[str, Any], need_weights: bool) -> None:
    """torch returns NaN in the output, the weights and all gradients."""
    layer = layer_of()
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    out, weights = layer(x, y, **words, need_weights=need_weights)
    same(out[:, 2], layer.out_proj.bias.expand(B, E))
    if need_weights:
        assert (weights[:, 2] == 0).all() and weights.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, y, *layer.parameters()))
    assert (x.grad[:, 2] == 0).all()


def by_torch(layer: MultiheadAttention, allowed: Tensor, added: Tensor) -> Tensor:
    """Run the layer of torch with all masks in one float tensor (B, H, L, S)."""
    theirs = nn.MultiheadAttention(E, H, batch_first=True, dtype=DOUBLE, add_zero_attn=layer.add_zero_attn)
    theirs.load_state_dict({k: v for k, v in layer.state_dict().items() if "position" not in k})
    table = (added + floats(~allowed)).expand(B, H, L, S).flatten(0, 1)
    return theirs(X, Y, Y, attn_mask=table)[0]


@pytest.mark.parametrize("zero", [False, True])
def test_masks_are_combined_by_and(zero: bool) -> None:
    slopes = nn.Parameter(randn(H, seed=3).abs())
    layer = layer_of(position=position.ALiBi(slopes, align="end"), add_zero_attn=zero)
    layer.position.slopes.data = slopes.data  # as it was before all parameters were drawn
    window = mask.window(3, 1, align="end")
    behind = torch.arange(L)[:, None] + S - L - torch.arange(S)
    near = (behind <= 3) & (behind >= -1)
    forbid, more = randn(L, S, seed=4) > 0.8, randn(L, S, seed=5)
    distance = -slopes.detach()[:, None, None] * behind.abs()
    for torchs, allowed, added in (
        ({}, near, distance),
        ({"attn_mask": forbid}, near & ~forbid, distance),
        ({"attn_mask": more}, near, distance + more),
        ({"attn_mask": forbid, "key_padding_mask": ~RIGHT}, near & ~forbid & RIGHT[:, None, None], distance),
        ({"attn_mask": more, "key_padding_mask": ~RIGHT}, near & RIGHT[:, None, None], distance + more),
        ({"key_padding_mask": Y[..., 0]}, near, distance + Y[:, None, None, :, 0]),
    ):
        out, _ = layer(X, Y, **torchs, mask=window)
        rows = zero | (allowed & torch.ones(B, H, L, S).bool()).any(-1).all(1)
        reference = by_torch(layer, allowed, added)
        same(out[rows], reference[rows])
        same(out[~rows], layer.out_proj.bias.expand_as(out[~rows]))


def test_learned_keys_follow_end_aligned_mask() -> None:
    """Masks are aligned with the S given keys, before the learned keys are appended."""
    layer = layer_of(add_bias_kv=True, add_zero_attn=True)
    lower = torch.ones(L, S).triu(S - L + 1).bool()
    for word, reference in (
        (mask.causal(align="end"), {"attn_mask": lower}),
        (mask.causal(align=S - L) & mask.lengths([S, 2, 4]), {"attn_mask": lower, "key_padding_mask": RIGHT}),
        (
            mask.documents((torch.zeros(L).long(), torch.arange(S) // 4)),
            {"attn_mask": (torch.arange(S) > 3).expand(L, S)},
        ),
        (mask.dense((torch.arange(L) > 1)[:, None]), {"attn_mask": (torch.arange(L) < 2)[:, None].expand(L, S)}),
    ):
        for got, expected in zip(layer(X, Y, mask=word), layer(X, Y, **reference), strict=True):
            assert got.shape[-1] in (E, S + 2)
            same(got, expected)


FIXED = KeyValueCache(Y, Y, fixed=True)
_AXES = r"expected a float tensor of shape \(B, L, 12\), or \(L, 12\) for one sequence"


@pytest.mark.parametrize(("kind", "words", "given", "message"), [
    (ValueError, {}, {"query": X[0, 0]}, rf"query is a float64 tensor of shape \(12,\); {_AXES}"),
    (ValueError, {}, {"query": X[..., :5]}, rf"query is a float64 tensor of shape \(3, 5, 5\); {_AXES}"),
    (TypeError, {}, {"query": X.long()}, rf"query is an int64 tensor of shape \(3, 5, 12\); {_AXES}"),
    (TypeError, {}, {"query": [X]}, rf"query is \[a float64 tensor of shape \(3, 5, 12\)\]; {_AXES}"),
    (TypeError, {}, {"query": X.float()}, "query has dtype torch.float32 but the layer has torch.float64; expected the same"),
    (ValueError, {"batch_first": False}, {"query": X[None]}, r"query is .* \(1, 3, 5, 12\); expected a float tensor of shape \(L, B, 12\)"),
    (ValueError, {"kdim": 4}, {"key": Y}, r"key is a float64 tensor of shape \(3, 7, 12\); expected a float tensor of shape \(B, S, 4\)"),
    (ValueError, {"vdim": 4}, {"key": Y}, r"value is a float64 tensor of shape \(3, 7, 12\); expected a float tensor of shape \(B, S, 4\)"),
    (ValueError, {}, {"key": Y, "value": Y[:, 1:]}, r"value has shape \(3, 6, 12\) but key has \(3, 7, 12\); expected the same length and batch"),
    (ValueError, {}, {"key": Y[1:]}, r"key has shape \(2, 7, 12\) but query has \(3, 5, 12\); expected the same batch"),
    (ValueError, {}, {"key": Y[0]}, r"key has shape \(7, 12\) but query has \(3, 5, 12\); expected the same batch"),
    (ValueError, {}, {"key": Y, "attn_mask": torch.ones(S, L).bool()},
     r"attn_mask is a bool tensor of shape \(7, 5\); expected a bool \(True = may not attend\) or float tensor of shape \(5, 7\) or \(6, 5, 7\)"),
    (TypeError, {}, {"key": Y, "attn_mask": torch.ones(L, S).long()}, r"attn_mask is an int64 tensor of shape \(5, 7\); expected a bool"),
    (ValueError, {}, {"key": Y, "key_padding_mask": RIGHT[0]}, r"key_padding_mask is a bool .* \(7,\); .* or float tensor of shape \(3, 7\)"),
    (TypeError, {}, {"mask": RIGHT}, r"mask is a bool tensor of shape \(3, 7\); expected one of regard.mask \(pass a tensor as attn_mask"),
    (ValueError, {}, {"key": Y, "cache": FIXED}, "cache is fixed and key or value is given; expected one or the other"),
    (ValueError, {"position": position.Rotary(4)}, {"cache": FIXED}, "cache is fixed and position is Rotary; expected a growing cache"),
])  # fmt: skip
def test_invalid_forward_arguments_raise(
    kind: type[Exception], words: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(kind, match=f"^MultiheadAttention: {message}"):
        layer_of(**words)(**{"query": X, **given})


@pytest.mark.parametrize(("kind", "words", "message"), [
    (ValueError, {"embed_dim": 0}, "embed_dim is 0; expected an integer >= 1"),
    (ValueError, {"num_heads": 5}, "embed_dim is 12; expected a multiple of num_heads, 5"),
    (TypeError, {"score": 3}, r"score is 3; expected one of regard.score, or a function \(q, k\) -> scores"),
    (TypeError, {"score": score.Dot}, "score is the class Dot; expected one of regard.score"),
    (TypeError, {"normalizer": torch.softmax}, "normalizer is the function softmax; expected one of regard.normalizer"),
    (TypeError, {"position": mask.causal()}, "position is an object of class Band; expected a position.Rotary, position.ALiBi or"),
    (ValueError, {"position": position.Rotary(8)}, "position rotates 8 elements; expected at most 6, the width of a head"),
    (ValueError, {"softcap": 0.0}, "softcap is 0.0; expected a finite number > 0, or None"),
    (ValueError, {"kv_heads": 0}, "kv_heads is 0; expected an integer >= 1"),
    (ValueError, {"kv_heads": 3}, "kv_heads is 3; expected a divisor of num_heads, 2"),
])  # fmt: skip
def test_invalid_constructor_arguments_raise(kind: type[Exception], words: dict[str, Any], message: str) -> None:
    with pytest.raises(kind, match=f"^MultiheadAttention: {message}"):
        MultiheadAttention(**{"embed_dim": E, "num_heads": H, **words})
