"""`KeyValueCache`: cached steps match a full pass for all components."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard import mask, position
from regard.nn.cache import KeyValueCache
from regard.nn.multihead import MultiheadAttention

B, L, S, E, H = 3, 11, 7, 24, 4
DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).detach().abs().max()) <= 1e-12 * float(expected.detach().abs().max())


def layer_of(**arguments: Any) -> MultiheadAttention:
    torch.manual_seed(1)
    layer = MultiheadAttention(E, H, **{"batch_first": True, "dtype": DOUBLE, **arguments})
    nn.init.normal_(layer.in_proj_bias)
    return layer


WORDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "Rotary": {"position": position.Rotary(4)},
    "ALiBi": {"position": position.ALiBi()},
    "T5": {"position": position.T5(nn.Parameter(randn(8, H)), bidirectional=False, max_distance=9)},
    "grouped": {"kv_heads": 2, "position": position.Rotary(6)},
    "own keys": {"add_bias_kv": True, "add_zero_attn": True, "position": position.ALiBi()},
    "length first": {"batch_first": False},
}
_CHUNKS = ([1] * L, [4, 1, 1, 3, 2], [L])


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("chunks", _CHUNKS, ids=str)
@pytest.mark.parametrize("name", WORDS)
def test_cached_steps_match_full_sequence(name: str, chunks: list[int], gradients: bool) -> None:
    layer = layer_of(**WORDS[name])
    lower, axis = mask.causal(), 1 if layer.batch_first else 0
    x = randn(B, L, E) if layer.batch_first else randn(L, B, E)
    x.requires_grad_(gradients)
    reference, _ = layer(x, mask=lower)
    cache, found, past = KeyValueCache(), [], 0
    with torch.set_grad_enabled(gradients):
        for part in x.split(chunks, axis):
            # A single query may attend to all cached keys, and needs no mask.
            out, weights = layer(part, mask=None if part.shape[axis] == 1 and past else lower, cache=cache)
            past += part.shape[axis]
            assert cache.length == past
            assert weights.shape[-1] == past + (2 if name == "own keys" else 0)
            found.append(out)
    got = torch.cat(found, axis)
    same(got, reference)
    if gradients:
        leaves, dout = [x, *layer.parameters()], randn(*reference.shape, seed=2)
        for one, other in zip(*(torch.autograd.grad(y, leaves, dout) for y in (got, reference)), strict=True):
            same(one, other)


@torch.no_grad()
def test_masks_count_keys_from_first_cached_key() -> None:
    layer, x = layer_of(position=position.ALiBi()), randn(B, L, E)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1, :3] = padding[2, :1] = True  # prompts of unequal length stand on the right
    near, lower = mask.causal() & mask.window(4), torch.ones(L, L).triu(1).bool()
    for whole, step in (
        ({"mask": near}, lambda a, b: {"mask": near}),
        ({"mask": mask.causal(), "key_padding_mask": padding},
         lambda a, b: {"mask": mask.causal(), "key_padding_mask": padding[:, :b]}),
        ({"attn_mask": lower}, lambda a, b: {"attn_mask": lower[a:b, :b]}),
        ({"attn_mask": lower}, lambda a, b: {"is_causal": True}),
    ):  # fmt: skip
        cache = KeyValueCache()
        reference, _ = layer(x, **whole)
        for start, end in ((0, 4), (4, 5), (5, 9), (9, L)):
            out, _ = layer(x[:, start:end], cache=cache, **step(start, end))
            same(out, reference[:, start:end])


@torch.no_grad()
@pytest.mark.parametrize("name", ["Rotary", "ALiBi", "T5", "grouped"])
def test_reorder_selects_batch_rows(name: str) -> None:
    """After each step, rows are dropped and repeated. The remaining ones match a full pass over their tokens."""
    layer, lower = layer_of(**WORDS[name]), mask.causal()
    x, cache = randn(B, 4, E), KeyValueCache()
    layer(x, mask=lower, cache=cache)
    for step, rows in enumerate(([0, 0, 1, 2, 2], [4, 1, 1, 0, 3], [2, 0])):
        cache.reorder(torch.tensor(rows))
        token = randn(len(rows), 1, E, seed=step)
        x = torch.cat([x[rows], token], 1)
        same(layer(token, cache=cache)[0], layer(x, mask=lower)[0][:, -1:])
    assert cache.length == 7


@pytest.mark.parametrize(
    "arguments", [{}, {"kdim": 5, "vdim": 9}, {"kv_heads": 2, "batch_first": False}, {"add_bias_kv": True}]
)
def test_fixed_cache_is_read_only(arguments: dict[str, Any]) -> None:
    layer = layer_of(**arguments)
    front = (S, B) if not layer.batch_first else (B, S)
    x = randn(*((L, B) if not layer.batch_first else (B, L)), E, seed=1)
    key, value = randn(*front, layer.kdim, seed=2), randn(*front, layer.vdim, seed=3)
    known = mask.lengths([S, 2, 4])
    memory = layer.remember(key, value)
    assert memory.fixed and memory.length == S
    for words in ({}, {"mask": known}):
        for _ in range(2):
            for got, expected in zip(layer(x, cache=memory, **words), layer(x, key, value, **words), strict=True):
                same(got, expected)
    assert memory.length == S
    rows = torch.tensor([2, 0, 0, 1])
    memory.reorder(rows)
    some = [y[rows] if layer.batch_first else y[:, rows] for y in (x, key, value)]
    same(layer(some[0], cache=memory)[0], layer(*some)[0])
    leaves, dout = list(layer.parameters()), randn(*x.shape, seed=4)
    found = [torch.autograd.grad(layer(x, **words)[0], leaves, dout) for words in (
        {"cache": layer.remember(key, value)}, {"key": key, "value": value})]  # fmt: skip
    for got, expected in zip(*found, strict=True):
        same(got, expected)


def test_cache_of_unbatched_sequence() -> None:
    layer, x, cache = layer_of(position=position.Rotary(4)), randn(L, E), KeyValueCache()
    reference, _ = layer(x, mask=mask.causal())
    found = [layer(x[i : i + 1], cache=cache)[0] for i in range(L)]
    same(torch.cat(found), reference)
    assert cache.keys.shape == (1, H, L, E // H)


@torch.no_grad()
def test_buffer_grows_by_doubling() -> None:
    cache, places = KeyValueCache(), []
    assert cache.keys is None and cache.values is None and cache.length == 0
    for step in range(100):
        keys, values = cache.append(randn(2, 3, 1, 5, seed=step), randn(2, 3, 1, 7, seed=step))
        assert keys.shape == (2, 3, step + 1, 5) and values.shape == (2, 3, step + 1, 7)
        places.append(keys.data_ptr())
    assert len(set(places)) <= 8  # 1, 2, 4, ..., 64, 128
    assert torch.equal(cache.keys[:, :, 37], randn(2, 3, 1, 5, seed=37)[:, :, 0])
    assert cache.keys.data_ptr() == keys.data_ptr()
    assert repr(cache) == "KeyValueCache(length=100, fixed=False)"


def test_saved_tensors_are_not_overwritten() -> None:
    """Steps without gradients before and after one with gradients, in and out of inference mode."""
    layer, x, cache = layer_of(), randn(B, L, E), KeyValueCache()
    reference, _ = layer(x, mask=mask.causal())
    found = []
    sealed, free, kept = torch.inference_mode, torch.no_grad, torch.enable_grad
    # After three steps, the buffer of four tokens that was allocated in inference mode has one free token.
    for step, mode in enumerate((sealed, sealed, sealed, free, free, kept, free, kept)):
        with mode():
            found.append(layer(x[:, step : step + 1], cache=cache)[0])
    same(torch.cat([y.clone() for y in found], 1), reference[:, : len(found)])
    for step in (5, 7):
        (got,) = torch.autograd.grad(found[step].sum(), layer.out_proj.weight, retain_graph=True)
        (expected,) = torch.autograd.grad(reference[:, step].sum(), layer.out_proj.weight, retain_graph=True)
        same(got, expected)
        found[step].sum().backward()
    frozen = layer_of().requires_grad_(False)
    prompt, cache = randn(B, 1, E).requires_grad_(), KeyValueCache()
    with torch.no_grad():
        frozen(x[:, :3], cache=cache)
    out, _ = frozen(prompt, cache=cache)
    with torch.no_grad():
        frozen(x[:, 3:5], cache=cache)
    out.sum().backward()
    assert prompt.grad is not None and prompt.grad.isfinite().all()


K, V = randn(2, 3, 5, 4), randn(2, 3, 5, 6)


@pytest.mark.parametrize(("kind", "given", "message"), [
    (TypeError, (None, None), r"keys is None; expected a float tensor of shape \(..., L, D\)"),
    (ValueError, (K[0, 0, 0], V), r"keys is a float64 tensor of shape \(4,\); expected a float tensor of shape \(..., L, D\)"),
    (TypeError, (K, V.long()), r"values is an int64 tensor of shape \(2, 3, 5, 6\); expected a float tensor of shape \(..., L, E\)"),
    (ValueError, (K, V[:, :, 1:]), r"keys has shape \(2, 3, 5, 4\) but values has \(2, 3, 4, 6\); expected the same, except for the"),
    (TypeError, (K.float(), V), "keys has dtype torch.float32; expected torch.float64, the dtype of the cache"),
    (ValueError, (K[:1], V[:1]), r"keys is a .* \(1, 3, 5, 4\); expected a float tensor of shape \(2, 3, L, 4\), as in the cache"),
    (ValueError, (K, V[..., 1:]), r"values is a .* \(2, 3, 5, 5\); expected a float tensor of shape \(2, 3, L, 6\), as in the cache"),
])  # fmt: skip
def test_append_rejects_mismatched_tensors(kind: type[Exception], given: tuple[Any, Any], message: str) -> None:
    with pytest.raises(kind, match=f"^KeyValueCache: {message}"):
        KeyValueCache(K, V).append(*given)


def test_invalid_cache_operations_raise() -> None:
    with pytest.raises(
        ValueError, match=r"^KeyValueCache: the cache is fixed; expected a growing one, KeyValueCache\(\)"
    ):
        KeyValueCache(K, V, fixed=True).append(K, V)
    with pytest.raises(TypeError, match=r"^KeyValueCache: keys is None; expected a float tensor"):
        KeyValueCache(fixed=True)
    for kind, rows in ((TypeError, [0]), (TypeError, torch.tensor([True])), (ValueError, torch.tensor(0))):
        with pytest.raises(kind, match=r"^KeyValueCache: rows is .*; expected an int64 tensor of shape"):
            KeyValueCache(K, V).reorder(rows)
