"""Pooling layers against their formulas and against the attention of torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import budget
from support.formulas import close, lengths_allow, randn, same, shaken, softmax
from torch import Tensor, nn

from regard import Summary, mask, record_backends
from regard.nn.pooling import AdditivePooling, AttentionPooling, KernelPooling

B, S, WIDTH, HIDDEN = 3, 7, 12, 5
N = torch.tensor([7, 0, 4])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def by_heads(layer: Any, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pooled vectors (B, queries, WIDTH) and the weights (B, H, queries, S)."""
    rows, weights = [], []
    width = WIDTH // layer.num_heads
    k, v = x @ layer.key_map.weight.T, x @ layer.value_map.weight.T + layer.value_map.bias
    for h in range(layer.num_heads):
        part = slice(h * width, (h + 1) * width)
        scores = layer.queries[:, part] @ k[..., part].mT / math.sqrt(width)
        weights.append(softmax(scores, lengths_allow(n, len(layer.queries), x.shape[1])))
        rows.append(weights[-1] @ v[..., part])
    return torch.cat(rows, -1), torch.stack(weights, 1)


def by_words(layer: Any, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 5 to 7 of Yang et al. (2016): return (B, queries, WIDTH) and the weights (B, queries, 1, S)."""
    u = torch.tanh(x @ layer.map.weight.T + layer.map.bias)
    p = softmax((u @ layer.u.T).mT, lengths_allow(n, len(layer.u), x.shape[1]))
    return p @ x, p[:, :, None]


LAYERS: dict[str, Any] = {
    "one": (lambda: AttentionPooling(WIDTH), by_heads),
    "heads": (lambda: AttentionPooling(WIDTH, num_heads=3), by_heads),
    "queries": (lambda: AttentionPooling(WIDTH, 5, 2), by_heads),
    "additive": (lambda: AdditivePooling(WIDTH), by_words),
    "narrow": (lambda: AdditivePooling(WIDTH, HIDDEN), by_words),
    "several": (lambda: AdditivePooling(WIDTH, HIDDEN, 2), by_words),
}
EVERY = pytest.mark.parametrize("name", LAYERS)


def make(name: str) -> Any:
    return shaken(LAYERS[name][0]())


@EVERY
@pytest.mark.parametrize("padded", [False, True])
def test_pooling_matches_formula(name: str, padded: bool) -> None:
    layer, x = make(name), randn(B, S, WIDTH)
    expected, p = LAYERS[name][1](layer, x, N if padded else torch.full((B,), S))
    if expected.shape[1] == 1:
        expected = expected[:, 0]
    given = mask.lengths(N) if padded else None
    got = layer(x, given)
    same([got], [expected], [x, *layer.parameters()])
    reference, statistics = layer(x, given, summary=Summary(full=True, max=True))
    close([reference, statistics.full, statistics.max], [got, p, p.amax(-1)])
    if padded:
        assert not got[1].any()


@EVERY
def test_pooling_is_independent_of_batch_padding_and_order(name: str) -> None:
    layer, x = make(name), randn(B, S, WIDTH)
    out = layer(x, mask.lengths(N))
    for b in (0, 2):
        close([out[b : b + 1]], [layer(x[b : b + 1, : N[b]])])
        close([out[b : b + 1]], [layer(x[b : b + 1, : N[b]].flip(1))])
    spoiled = x.detach().clone()
    spoiled[1], spoiled[2, 4:] = torch.nan, torch.nan
    assert torch.equal(layer(spoiled, mask.lengths(N)), out)


@EVERY
def test_float32_error_is_within_that_of_formula(name: str) -> None:
    layer, x = make(name).float(), torch.randn(B, 37, WIDTH)
    with record_backends() as ran:
        got = layer(x, mask.lengths(N))
        reference, _ = layer(x, mask.lengths(N), summary=Summary(top=2))
    assert ran == ["cpu"] * 2
    assert torch.equal(reference, got)
    straight = LAYERS[name][1](layer, x, N)[0].view_as(got)
    exact = LAYERS[name][1](layer.double(), x.double(), N)[0].view_as(got)
    budget.assert_within_budget(name, got, budget.ErrorBudget(exact, straight))


@EVERY
def test_dropout_applies_in_training_only(name: str) -> None:
    layer, x = make(name), randn(B, S, WIDTH)
    whole, layer.dropout = layer(x), 0.5
    torch.manual_seed(1)
    dropped = layer(x)
    assert not torch.equal(dropped, whole)
    torch.manual_seed(1)
    assert torch.equal(layer(x), dropped)
    assert torch.equal(layer.eval()(x), whole)


@EVERY
def test_state_dict_round_trip(name: str) -> None:
    layer, other, x = make(name), make(name), randn(B, S, WIDTH)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


@EVERY
def test_pooling_passes_gradcheck(name: str) -> None:
    layer, x = make(name), randn(2, 3, WIDTH)
    assert torch.autograd.gradcheck(lambda x: layer(x, mask.lengths(torch.tensor([3, 2]))), (x,))


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_pooling_matches_torch_multihead_attention(heads: int) -> None:
    layer, x = shaken(AttentionPooling(WIDTH, 5, heads)), randn(B, S, WIDTH)
    theirs = nn.MultiheadAttention(WIDTH, heads, batch_first=True).double()
    eye, zero = torch.eye(WIDTH), torch.zeros(WIDTH)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([eye, layer.key_map.weight, layer.value_map.weight]))
        theirs.in_proj_bias.copy_(torch.cat([zero, zero, layer.value_map.bias]))
        theirs.out_proj.weight.copy_(eye)
    n = torch.tensor([7, 1, 4])
    pad = torch.arange(S) >= n[:, None]
    out, weights = theirs(layer.queries.expand(B, -1, -1), x, x, pad, average_attn_weights=False)
    got, statistics = layer(x, mask.lengths(n), summary=Summary(full=True))
    close([got, statistics.full], [out, weights])


# ---------------------------------------------------------------------------------------------------------------------
# KernelPooling.


def regression(sigma: Tensor, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Return the regression by normal densities, point by point."""
    rows = []
    for b in range(len(query)):
        for i, q in enumerate(query[b]):
            density = [torch.exp(-((q - k) ** 2).sum() / (2 * sigma**2)) for k in key[b]]
            kept = [(d, v) for d, v, may in zip(density, value[b], allowed[b, i], strict=True) if may]
            rows.append(sum(d * v for d, v in kept) / sum(d for d, _ in kept) if kept else 0 * value[b, 0])
    return torch.stack(rows).view(*query.shape[:2], -1)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_kernel_pooling_matches_nadaraya_watson(width: int, padded: bool) -> None:
    layer = KernelPooling(0.7).double()
    assert layer.sigma.item() == pytest.approx(0.7, rel=1e-6)
    query, key, value = randn(B, 5, width), randn(B, S, width), randn(B, S, 2)
    n = N if padded else torch.full((B,), S)
    expected = regression(layer.log_sigma.exp(), query, key, value, lengths_allow(n, 5, S))
    got = layer(query, key, value, mask.lengths(n))
    same([got], [expected], [query, key, value, layer.log_sigma])
    # Without batch dimension.
    close([layer(query[0], key[0], value[0])], [layer(query[:1], key[:1], value[:1])[0]])
    reference, statistics = layer(query, key, value, mask.lengths(n), summary=Summary(full=True))
    assert torch.equal(reference, got)
    close([statistics.full @ value], [expected])


def test_masked_point_has_no_weight() -> None:
    layer, x, y = KernelPooling(0.5).double(), randn(1, S, 2), randn(1, S, 1)
    others = ~torch.eye(S, dtype=torch.bool)[None]
    expected = regression(layer.log_sigma.exp(), x, x, y, others)
    same([layer(x, x, y, ~mask.window(0, 0))], [expected], [x, y, layer.log_sigma])


def test_sigma_is_learned_if_requested() -> None:
    x = torch.linspace(0, 1, 41)[:, None]
    y = torch.sin(12 * x)
    layer = KernelPooling(1.0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = (layer(x, x, y, ~mask.window(0, 0)) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert layer.sigma < 0.1
    fixed = KernelPooling(2.0, learned=False)
    assert not fixed.sigma.requires_grad
    assert not any(p.requires_grad for p in fixed.parameters())
    assert fixed.sigma.item() == pytest.approx(2.0, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Invalid arguments.


@pytest.mark.parametrize(
    ("layer", "given", "error", "message"),
    [
        (AttentionPooling, {"width": 0}, ValueError, r"width is 0; expected an integer >= 1"),
        (AttentionPooling, {"width": 4, "queries": None}, TypeError, r"queries is None; expected an integer >= 1"),
        (
            AttentionPooling,
            {"width": 4, "num_heads": 3},
            ValueError,
            r"num_heads is 3; expected a divisor of the width, 4",
        ),
        (AttentionPooling, {"width": 4, "num_heads": 0}, ValueError, r"num_heads is 0; expected an integer >= 1"),
        (
            AttentionPooling,
            {"width": 4, "dropout": -0.1},
            ValueError,
            r"dropout is -0.1; expected a number from 0 to 1",
        ),
        (AdditivePooling, {"width": 4.0}, TypeError, r"width is 4.0; expected an integer >= 1"),
        (
            AdditivePooling,
            {"width": 4, "hidden_width": 0},
            ValueError,
            r"hidden_width is 0; expected .*, or None for the width",
        ),
        (AdditivePooling, {"width": 4, "queries": 0}, ValueError, r"queries is 0; expected an integer >= 1"),
        (AdditivePooling, {"width": 4, "dropout": "0"}, TypeError, r"dropout is '0'; expected a number from 0 to 1"),
        (KernelPooling, {"sigma": 0.0}, ValueError, r"sigma is 0.0; expected a finite number > 0"),
        (KernelPooling, {"sigma": None}, TypeError, r"sigma is None; expected a finite number > 0"),
    ],
)
def test_invalid_constructor_arguments_raise(
    layer: Any, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{layer.__name__}: {message}$"):
        layer(**given)


@pytest.mark.parametrize("layer", [AttentionPooling, AdditivePooling])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            (torch.zeros(B, S, 3),),
            ValueError,
            r"x is a float32 tensor of shape \(3, 7, 3\); expected a float tensor of shape \(B, S, 12\)",
        ),
        (
            (torch.zeros(S, 12),),
            ValueError,
            r"x is a float32 tensor of shape \(7, 12\); expected a float tensor of shape \(B, S, 12\)",
        ),
        (
            (torch.zeros(B, S, 12).long(),),
            TypeError,
            r"x is an int64 tensor .*; expected a float tensor of shape \(B, S, 12\)",
        ),
        (
            (torch.zeros(B, S, 12), N),
            TypeError,
            r"mask is an int64 tensor of shape \(3,\); expected one of regard.mask, .*",
        ),
    ],
)
def test_invalid_forward_arguments_raise(layer: Any, given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{layer.__name__}: {message}$"):
        layer(WIDTH)(*given)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            ((5,), (S, 2), (S, 1)),
            r"query is a float32 tensor of shape \(5,\); expected a float tensor of shape \(B, L, D\) or \(L, D\)",
        ),
        (
            ((B, 5, 2), (B, S, 3), (B, S, 1)),
            r"key is a float32 tensor of shape \(3, 7, 3\); expected a float tensor of shape \(3, S, 2\), as query has \(3, 5, 2\)",
        ),
        (
            ((5, 2), (B, S, 2), (B, S, 1)),
            r"key is a float32 tensor of shape \(3, 7, 2\); expected a float tensor of shape \(S, 2\), as query has \(5, 2\)",
        ),
        (
            ((B, 5, 2), (B, S, 2), (B, S)),
            r"value is a float32 tensor of shape \(3, 7\); expected a float tensor of shape \(3, 7, E\), as key has \(3, 7, 2\)",
        ),
    ],
)
def test_kernel_pooling_rejects_mismatched_points(shapes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^KernelPooling: {message}$"):
        KernelPooling()(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(TypeError, match=r"^KernelPooling: mask is True; expected one of regard.mask"):
        KernelPooling()(*(torch.zeros(3, 2) for _ in range(3)), True)
