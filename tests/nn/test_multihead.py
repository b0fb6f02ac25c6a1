"""`MultiheadAttention` against `torch.nn.MultiheadAttention`, and its components against their formulas."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import mask, normalizer, position, score
from regard.nn.multihead import MultiheadAttention

B, L, S, E, H = 3, 5, 7, 12, 2
D = E // H
DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def same(got: Tensor, expected: Tensor, relative: float = 1e-12) -> None:
    assert got.shape == expected.shape
    assert not expected.isnan().any()
    got, expected = got.detach(), expected.detach()
    if not expected.numel():
        return
    assert float((got - expected).abs().max()) <= relative * max(1.0, float(expected.abs().max()))


def pair(**arguments: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """Return the layer of torch and ours with the same nonzero parameters."""
    theirs = nn.MultiheadAttention(E, H, dtype=DOUBLE, **arguments)
    for seed, parameter in enumerate(theirs.parameters()):
        parameter.data = randn(*parameter.shape, seed=seed + 10) / 3
    ours = MultiheadAttention(E, H, dtype=DOUBLE, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def results(layer: nn.Module, inputs: list[Tensor], words: dict[str, Any]) -> list[Tensor]:
    """Return the outputs, and the gradients of all inputs and parameters."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    given = {1: lambda x: (x, x, x), 2: lambda x, y: (x, y, y), 3: lambda x, y, z: (x, y, z)}[len(inputs)](*leaves)
    out, weights = layer(*given, **words)
    found = [out] if weights is None else [out, weights]
    total = sum((x * randn(*x.shape, seed=77)).sum() for x in found)
    layer.zero_grad()
    total.backward()
    parameters = [p.grad if p.grad is not None else torch.zeros_like(p) for p in layer.parameters()]
    return [*found, *(x.grad for x in leaves), *parameters]  # type: ignore[list-item]


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "widths": {"kdim": 4, "vdim": 11},
    "widths, no bias": {"kdim": 4, "vdim": 11, "bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 4, "batch_first": True},
}


def sequences(kind: str, batch: int | None, config: dict[str, Any]) -> list[Tensor]:
    """Return query, key and value as one, two or three distinct sequences."""
    widths = (E, config.get("kdim", E), config.get("vdim", E))
    shapes = {"self": [(S, E)], "memory": [(L, E), (S, E)], "three": list(zip((L, S, S), widths, strict=True))}[kind]
    found = []
    for seed, (length, width) in enumerate(shapes):
        lead = (length,) if batch is None else (batch, length) if config.get("batch_first") else (length, batch)
        found.append(randn(*lead, width, seed=seed))
    return found


def masks(batch: int, queries: int) -> dict[str, dict[str, Tensor]]:
    """Return masks of torch of all kinds, with at least one key per query."""
    forbid, forbid_heads = randn(queries, S, seed=5) > 0.3, randn(batch * H, queries, S, seed=6) > 0.3
    right, scattered = torch.arange(S) >= torch.tensor([S, 2, 4])[:batch, None], randn(batch, S, seed=7) > 0.4
    forbid[:, 0] = forbid_heads[:, :, 0] = scattered[:, 0] = False
    lower = torch.full((queries, S), -math.inf, dtype=DOUBLE).triu(1)
    floats, padding = randn(queries, S, seed=8), randn(batch, S, seed=9)
    return {
        "none": {},
        "bool": {"attn_mask": forbid},
        "bool per head": {"attn_mask": forbid_heads},
        "float": {"attn_mask": floats.masked_fill(forbid, -math.inf)},
        "float per head": {"attn_mask": randn(batch * H, queries, S, seed=8)},
        "0 and -inf": {"attn_mask": lower},
        "right": {"key_padding_mask": right},
        "scattered": {"key_padding_mask": scattered},
        "float padding": {"key_padding_mask": padding},
        "padding of -inf": {"key_padding_mask": torch.zeros(batch, S, dtype=DOUBLE).masked_fill(right, -math.inf)},
        "both": {"attn_mask": forbid, "key_padding_mask": right},
        "both float": {"attn_mask": floats, "key_padding_mask": padding},
    }


@pytest.mark.parametrize("named", masks(B, L))
@pytest.mark.parametrize("config", CONFIGS)
def test_outputs_and_gradients_match_torch(config: str, named: str) -> None:
    """Outputs, weights and gradients, for one to three sequences, with and without batch dimension."""
    theirs, ours = pair(**CONFIGS[config])
    for kind, batch, more in (
        ("self", B, {}),
        ("memory", B, _NO_WEIGHTS),
        ("three", B, _EACH_HEAD),
        ("self", None, _EACH_HEAD),
        ("three", None, {}),
    ):
        if kind != "three" and ours.in_proj_weight is None:
            continue
        inputs = sequences(kind, batch, CONFIGS[config])
        words = masks(batch or 1, S if kind == "self" else L)[named]
        if batch is None and "key_padding_mask" in words:
            words = {**words, "key_padding_mask": words["key_padding_mask"][0]}
        for got, expected in zip(*(results(x, inputs, {**words, **more}) for x in (ours, theirs)), strict=True):
            same(got, expected)


_NO_WEIGHTS, _EACH_HEAD = {"need_weights": False}, {"average_attn_weights": False}


@pytest.mark.parametrize("more", [{}, _NO_WEIGHTS])
def test_is_causal_matches_torch(more: dict[str, Any]) -> None:
    theirs, ours = pair(batch_first=True)
    (x,) = sequences("self", B, {"batch_first": True})
    padding = torch.arange(S) >= torch.tensor([S, 2, 4])[:, None]
    for lower in (torch.ones(S, S).triu(1).bool(), nn.Transformer.generate_square_subsequent_mask(S, dtype=DOUBLE)):
        for words in ({"attn_mask": lower}, {"attn_mask": lower, "key_padding_mask": padding}):
            with warnings.catch_warnings():  # of torch's, about masks of two types
                warnings.simplefilter("ignore")
                reference = theirs(x, x, x, **words, is_causal=True, **more)
            found = ours(x, x, x, **words, is_causal=True, **more)
            for got, expected in zip(found, reference, strict=True):
                assert (got is None) == (expected is None)
                if got is not None:
                    same(got, expected)
    same(ours(x, is_causal=True)[0], theirs(x, x, x, attn_mask=lower)[0])  # torch needs the mask as well


@pytest.mark.parametrize("config", CONFIGS)
def test_initialization_and_state_dict_match_torch(config: str) -> None:
    layers = []
    for kind in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(3)
        layers.append(kind(E, H, **CONFIGS[config]))
    theirs, ours = (layer.state_dict() for layer in layers)
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    for one, other in (layers, layers[::-1]):
        nn.init.normal_(one.out_proj.weight)
        other.load_state_dict(one.state_dict())
        assert torch.equal(one.out_proj.weight, other.out_proj.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Within torch.nn.Transformer.


def swapped(model: nn.Module, **words: Any) -> nn.Module:
    """Return a copy in which the layers of torch are replaced by ours."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.MultiheadAttention:
                ours = MultiheadAttention(E, H, batch_first=child.batch_first, dtype=DOUBLE, **words)
                ours.load_state_dict(child.state_dict(), strict=not words)
                setattr(module, name, ours.train(child.training))
    return model


def transformer(kind: str, batch_first: bool, norm_first: bool) -> nn.Module:
    torch.manual_seed(0)
    words = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first, "dtype": DOUBLE}
    if kind == "decoder":
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 17, **words), 2)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 17, **words), 2, enable_nested_tensor=not norm_first)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested", "ignore:Support for mis")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_layer_in_torch_transformer(kind: str, batch_first: bool, norm_first: bool) -> None:
    """In training and in evaluation, with gradients and without: where torch takes a path of its own, which makes nested
    tensors of padded batches.
    """
    theirs = transformer(kind, batch_first, norm_first)
    ours, other = swapped(theirs), swapped(theirs, score=score.Cosine(0.2))
    x, memory = sequences("memory", B, {"batch_first": batch_first})
    padding = torch.arange(L) >= torch.tensor([L, 2, 4])[:, None]
    lower = nn.Transformer.generate_square_subsequent_mask(L, dtype=DOUBLE)
    real = (padding if batch_first else padding.T).logical_not()[..., None]
    names = ("mask", "src_key_padding_mask") if kind == "encoder" else ("tgt_mask", "tgt_key_padding_mask")
    given = (x,) if kind == "encoder" else (x, memory)
    for words in ({}, {names[0]: lower}, {names[1]: padding}, {names[0]: lower, names[1]: padding}):
        found = []
        for model in (theirs, ours, other):
            trained = model.train()(*given, **words)
            evaluated = model.eval()(*given, **words)
            with torch.no_grad():
                quick = model(*given, **words)
            where = real if names[1] in words else torch.ones_like(real)
            same(evaluated * where, trained * where)
            same(quick * where, trained * where)
            found.append(trained * where)
        same(found[1], found[0])
        assert (found[2] - found[0]).abs().max() > 0.01


def test_nested_tensors_match_single_sequences() -> None:
    layer = pair(batch_first=True)[1]
    rows = [randn(n, E, seed=n) for n in (5, 1, 3)]
    nested = torch.nested.nested_tensor(rows)
    out, weights = layer(nested, nested, nested, mask=mask.causal())
    for got, attended, row in zip(out.unbind(), weights, rows, strict=True):
        alone, reference = layer(row, mask=mask.causal())
        same(got, alone)
        same(attended[: len(row), : len(row)], reference)
    causal, _ = layer(nested, nested, nested, is_causal=True)
    for got, expected in zip(causal.unbind(), out.unbind(), strict=True):
        same(got, expected)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize(
    "lengths", [((5, 1, 3), (2, 4, 6)), ((5, 0, 3), (2, 4, 0)), ((0, 0), (3, 1)), ((2, 3), (0, 0))]
)
def test_nested_cross_attention_matches_single_sequences(
    lengths: tuple[tuple[int, ...], tuple[int, ...]], layout: torch.layout
) -> None:
    layer = pair(batch_first=True)[1]
    sides = [[randn(n, E, seed=10 * n + side).requires_grad_() for n in lengths[side]] for side in (0, 1)]
    query, memory = (torch.nested.as_nested_tensor(rows, layout=layout) for rows in sides)
    out, weights = layer(query, memory, memory)
    assert out.is_nested
    assert out.layout == layout
    rows = [*zip(*sides, strict=True)]
    expected = [layer(x[None], y[None], y[None]) for x, y in rows]
    for got, attended, (alone, reference) in zip(out.unbind(), weights, expected, strict=True):
        same(got, alone[0])
        same(attended[: reference.shape[1], : reference.shape[2]], reference[0])
        assert not bool(attended[reference.shape[1] :].any())
        assert not bool(attended[:, reference.shape[2] :].any())
    leaves = [x for rows in sides for x in rows]
    found = torch.autograd.grad(sum(x.square().sum() for x in out.unbind()), leaves)  # type: ignore[arg-type]
    alone = torch.autograd.grad(sum(x.square().sum() for x, _ in expected), leaves)  # type: ignore[arg-type]
    for x, y in zip(found, alone, strict=True):
        same(x, y)


def test_nested_keys_of_dense_queries() -> None:
    layer = pair(batch_first=True)[1]
    query, rows = randn(3, 4, E), [randn(n, E, seed=n) for n in (5, 1, 3)]
    out, _ = layer(query, torch.nested.nested_tensor(rows))
    for got, x, y in zip(out, query, rows, strict=True):
        same(got, layer(x, y)[0])


def test_unsupported_nested_arguments_raise() -> None:
    layer = pair(batch_first=True)[1]
    rows = [randn(n, E, seed=n) for n in (5, 1, 3)]
    nested, other = torch.nested.nested_tensor(rows), torch.nested.nested_tensor([x[:1] for x in rows])
    words: dict[str, Any]
    for words in ({"key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}, {"attn_mask": torch.zeros(5, 5)}):
        with pytest.raises(
            ValueError, match=r"^MultiheadAttention: query, key or value is nested; expected batch_first"
        ):
            layer(nested, **words)
    with pytest.raises(ValueError, match="query, key or value is nested; expected batch_first=True"):
        pair()[1](nested)
    with pytest.raises(ValueError, match="key has 2 sequences; expected 3"):
        layer(nested, torch.nested.nested_tensor(rows[:2]))
    with pytest.raises(ValueError, match="the sequences of value are not as long as those of key"):
        layer(nested, nested, other)
    for words in ({"is_causal": True}, {"mask": mask.causal("end")}):
        with pytest.raises(ValueError, match="different lengths and a mask is given; expected no mask"):
            layer(nested, other, **words)
    with pytest.raises(ValueError, match="key has another form; expected sequences of vectors"):
        layer(nested, rows[0])


# ---------------------------------------------------------------------------------------------------------------------
# Components.


def plain(
    layer: MultiheadAttention, x: Tensor, y: Tensor, pair_score: Callable[[Tensor, Tensor, int, int, int], Any],
    weigh: Callable[[Tensor, int], Tensor] = lambda s, h: s.softmax(0), kv_heads: int = H,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Query by query: x (L, E) attends to y (S, E); `pair_score` of q, k, head, i and j, None where it may not attend."""
    width = kv_heads * D
    w_q, w_k, w_v = layer.in_proj_weight.split([E, width, width])
    b_q, b_k, b_v = layer.in_proj_bias.split([E, width, width])
    q, k, v = x @ w_q.T + b_q, y @ w_k.T + b_k, y @ w_v.T + b_v
    rows, all_weights = [], torch.zeros(H, len(x), len(y), dtype=DOUBLE)
    for i in range(len(x)):
        heads = []
        for h in range(H):
            g = h * kv_heads // H
            part, other = slice(h * D, h * D + D), slice(g * D, g * D + D)
            scores = {j: pair_score(q[i, part], k[j, other], h, i, j) for j in range(len(y))}
            keys = [j for j, s in scores.items() if s is not None]
            if not keys:
                heads.append(torch.zeros(D, dtype=DOUBLE))
                continue
            weights = weigh(torch.stack([scores[j] for j in keys]), h)
            all_weights[h, i, keys] = weights
            heads.append(sum(w * v[j, other] for w, j in zip(weights, keys, strict=True)))
        rows.append(torch.cat(heads) @ layer.out_proj.weight.T + layer.out_proj.bias)
    return torch.stack(rows), all_weights


def dot(q: Tensor, k: Tensor) -> Tensor:
    return (q * k).sum() / math.sqrt(D)


def turned(x: Tensor, place: int) -> Tensor:
    """By the complex numbers of RoFormer: entries i and i + width/2 are one, of width 4; the rest stays."""
    speed = 10000.0 ** (-torch.arange(2, dtype=DOUBLE) / 2)
    z = torch.complex(x[:2], x[2:4]) * torch.polar(torch.ones(2, dtype=DOUBLE), place * speed)
    return torch.cat([z.real, z.imag, x[4:]])


def learned(*shape: int) -> nn.Parameter:
    return nn.Parameter(randn(*shape, seed=40).abs() + 0.5)


def bucket(distance: int) -> int:
    """Return the T5 bucket of a distance: 8 unidirectional buckets, up to a distance of 16."""
    far = 4 + int(math.log(max(distance, 1) / 4) / math.log(16 / 4) * 4)
    return distance if distance < 4 else min(far, 7)


def cases() -> dict[str, tuple[dict[str, Any], Any, Any]]:
    """Return the arguments of a layer, and formulas of the score of a pair and of the weights of a query."""
    alone = lambda s, h, p: s.softmax(0)  # noqa: E731
    return {
        "cosine": (
            {"score": score.Cosine(learned(H))},
            lambda q, k, h, i, j, p: F.cosine_similarity(q, k, 0) / p[h],
            alone,
        ),
        "function": (
            {"score": lambda q, k: -torch.cdist(q, k, p=1)},
            lambda q, k, h, i, j, p: -(q - k).abs().sum(),
            alone,
        ),
        "additive": (
            {"score": score.Additive(learned(D))},
            lambda q, k, h, i, j, p: (p * torch.tanh(q + k)).sum(),
            alone,
        ),
        "sink": (
            {"normalizer": normalizer.Softmax(learned(H))},
            lambda q, k, h, i, j, p: dot(q, k),
            lambda s, h, p: s.exp() / (s.exp().sum() + p[h].exp()),
        ),
        "sigmoid": (
            {"normalizer": normalizer.Sigmoid(-1.5)},
            lambda q, k, h, i, j, p: dot(q, k),
            lambda s, h, p: 1 / (1 + (1.5 - s).exp()),
        ),
        "softcap": ({"softcap": 0.7}, lambda q, k, h, i, j, p: 0.7 * torch.tanh(dot(q, k) / 0.7), alone),
        "ALiBi": (
            {"position": position.ALiBi(learned(H))},
            lambda q, k, h, i, j, p: dot(q, k) - p[h] * abs(i - j),
            alone,
        ),
        "T5": (
            {"position": position.T5(learned(8, H), bidirectional=False, max_distance=16)},
            lambda q, k, h, i, j, p: dot(q, k) + p[bucket(max(i - j, 0)), h],
            alone,
        ),
        "Rotary": (
            {"position": position.Rotary(4)},
            lambda q, k, h, i, j, p: dot(turned(q, i), turned(k, j)),
            alone,
        ),
        "grouped": ({"kv_heads": 1}, lambda q, k, h, i, j, p: dot(q, k), alone),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", cases())
def test_components_match_direct_attention(name: str, causal: bool) -> None:
    """Output, weights, and the gradients of all parameters, including those of the components."""
    words, pair_score, weigh = cases()[name]
    layer = MultiheadAttention(E, H, batch_first=True, dtype=DOUBLE, **words)
    for seed, part in enumerate((layer.in_proj_weight, layer.in_proj_bias, layer.out_proj.weight, layer.out_proj.bias)):
        part.data = randn(*part.shape, seed=seed + 10) / 3
    own = [p for n, p in layer.named_parameters() if n.startswith(("score.", "normalizer.", "position."))]
    x, p = randn(B, S, E, seed=1).requires_grad_(), own[0] if own else None
    out, weights = layer(x, mask=mask.causal() if causal else None, average_attn_weights=False)

    def scored(q: Tensor, k: Tensor, h: int, i: int, j: int) -> Tensor | None:
        return None if causal and j > i else pair_score(q, k, h, i, j, p)

    pairs = [plain(layer, r, r, scored, lambda s, h: weigh(s, h, p), words.get("kv_heads", H)) for r in x]
    reference, reference_weights = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    same(out, reference)
    same(weights, reference_weights)
    leaves, dout = [x, *layer.parameters()], randn(*out.shape, seed=3)
    for got, expected in zip(*(torch.autograd.grad(y, leaves, dout) for y in (out, reference)), strict=True):
        same(got, expected)
