"""`MultiheadAttention` in different modes: dtypes, dropout, batches, compiled, copied."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard import Summary, mask, normalizer, position, score
from regard.backends.dropout import keep
from regard.components.tile import Sizes, Tile
from regard.nn.cache import KeyValueCache
from regard.nn.multihead import MultiheadAttention

B, L, S, E, H = 3, 5, 7, 24, 4
D = E // H
DOUBLE = torch.float64
EVERY: dict[str, Any] = {
    "score": score.Cosine(0.3),
    "normalizer": normalizer.Softmax(0.0),
    "position": position.ALiBi(),
    "softcap": 3.0,
    "kv_heads": 2,
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def same(got: Tensor, expected: Tensor, relative: float = 1e-12) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).detach().abs().max()
    assert float(error) <= relative * float(expected.detach().abs().max())


def layer_of(dtype: torch.dtype = DOUBLE, **arguments: Any) -> MultiheadAttention:
    torch.manual_seed(1)
    layer = MultiheadAttention(E, H, **{"batch_first": True, **arguments})
    nn.init.normal_(layer.in_proj_bias)
    return layer.to(dtype)


@pytest.mark.parametrize("words", [{}, {**EVERY, "dropout": 0.3}], ids=["plain", "every"])
def test_weights_and_summaries_do_not_change_output(words: dict[str, Any]) -> None:
    layer, x, lower = layer_of(torch.float32, **words), randn(B, 67, E, dtype=torch.float32), mask.causal()
    found = []
    for more in ({"need_weights": False}, {}, {"average_attn_weights": False}, {"summary": Summary(top=3)}):
        torch.manual_seed(0)
        found.append(layer(x, mask=lower, **more))
    (first, nothing), (_, mean), (_, weights), (_, statistics) = found
    assert nothing is None
    assert all(torch.equal(first, out) for out, _ in found)
    assert mean.shape == (B, 67, 67) and weights.shape == (B, H, 67, 67)
    # Weights are float32, before dropout.
    epsilon = torch.finfo(torch.float32).eps
    same(mean, weights.double().mean(1), epsilon)
    same(weights, layer.eval()(x, mask=lower, average_attn_weights=False)[1], epsilon)
    same(statistics.top.weights, weights.topk(3).values, epsilon)
    assert layer.bfloat16()(x.bfloat16())[1].dtype == torch.bfloat16


def test_summary_of_unbatched_sequence() -> None:
    asked = Summary(lse=True, max=True, entropy=True, top=2, received=True, rows=(0, -1), full=True)
    layer, x = layer_of(), randn(L, E)
    (out, statistics), (outs, all_seen) = layer(x, summary=asked), layer(x[None], summary=asked)
    assert torch.equal(out, outs[0])
    assert statistics.full.shape == (H, L, L) and statistics.top.keys.shape == (H, L, 2) and statistics.mass is None
    assert torch.equal(statistics.top.weights, all_seen.top.weights[0]) and torch.equal(
        statistics.rows, all_seen.rows[0]
    )


def test_batch_rows_are_independent() -> None:
    """The number of batch dimensions does not matter either."""
    layer, padding = layer_of(**EVERY), torch.arange(S) >= torch.tensor([S, 2, 4])[:, None]
    x, y = randn(B, L, E, seed=1), randn(B, S, E, seed=2)
    words = {"mask": mask.causal(align="start")}
    out, weights = layer(x, y, key_padding_mask=padding, **words)
    for row in range(B):
        same(layer(x[row], y[row], key_padding_mask=padding[row], **words)[0], out[row])
    wide = [t[:, None].expand(-1, 2, *t.shape[1:]) for t in (x, y, padding)]
    outs, all_weights = layer(wide[0], wide[1], key_padding_mask=wide[2], **words)
    assert outs.shape == (B, 2, L, E) and all_weights.shape == (B, 2, L, S)
    same(outs, out[:, None].expand(-1, 2, -1, -1))
    same(all_weights, weights[:, None].expand(-1, 2, -1, -1))
    cache = KeyValueCache()
    steps = [layer(wide[0][..., i : i + 1, :], cache=cache)[0] for i in range(L)]
    same(torch.cat(steps, -2), layer(wide[0], mask=mask.causal())[0])
    assert layer(x[:0])[0].shape == (0, L, E)
    assert layer(x[:, :0])[0].shape == (B, 0, E)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_applies_in_training_only(training: bool) -> None:
    """Each weight is dropped, or scaled by 1 / (1 - p), according to the seed from torch's generator."""
    layer, x = layer_of(dropout=0.4).train(training), randn(B, L, E)
    torch.manual_seed(5)
    out, weights = layer(x, average_attn_weights=False)
    torch.manual_seed(5)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, ())
    tile = Tile((0, B), (0, H), (0, L), (0, L), Sizes(B, H, H, L, L), x.device)
    kept = weights * keep(tile, seed, 0.4) / 0.6 if training else weights
    v = F.linear(x, layer.in_proj_weight[2 * E :], layer.in_proj_bias[2 * E :]).view(B, L, H, D).transpose(1, 2)
    same(out, layer.out_proj((kept @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_kv", [False, True])
def test_reduced_precision_error(dtype: torch.dtype, bias_kv: bool) -> None:
    """The error is at most twice that of the layer of torch, both relative to float64."""
    arguments = {"batch_first": True, "add_bias_kv": bias_kv}
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, **arguments, dtype=dtype)
    ours = MultiheadAttention(E, H, **arguments, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x, reference = randn(B, 131, E, dtype=dtype), copy.deepcopy(theirs).double()
    exact, exact_weights = reference(*[x.double()] * 3)
    for got, plain, true in zip(ours(x), theirs(x, x, x), (exact, exact_weights), strict=True):
        assert got.dtype == dtype
        assert (got - true).abs().max() <= 2 * (plain - true).abs().max()


@pytest.mark.parametrize("arguments", [{}, {"add_bias_kv": True, "kdim": 10}])
def test_multihead_under_autocast(arguments: dict[str, Any]) -> None:
    theirs = nn.MultiheadAttention(E, H, **arguments, batch_first=True)
    ours = MultiheadAttention(E, H, **arguments, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x, y, z = (randn(B, n, w, dtype=torch.float32) for n, w in ((L, E), (S, ours.kdim), (S, E)))
    exact, _ = copy.deepcopy(theirs).double()(x.double(), y.double(), z.double())
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = ours(x, y, z)[0], theirs(x, y, z)[0]
    assert got.dtype == plain.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("name", ["plain", "every", "own keys"])
def test_multihead_compiles_without_graph_breaks(name: str) -> None:
    """The layer compiles to one graph, with correct gradients."""
    words = {"every": EVERY, "own keys": {"add_bias_kv": True, "position": position.Rotary(4)}}.get(name, {})
    layer, x = layer_of(**words), randn(B, L, E).requires_grad_()
    padding = torch.arange(L) >= torch.tensor([L, 2, 4])[:, None]
    given: dict[str, Any] = {"key_padding_mask": padding, "mask": mask.causal(), "need_weights": name != "plain"}
    if name != "every":
        given["attn_mask"] = torch.zeros(L, L, dtype=DOUBLE).masked_fill(torch.eye(L).bool(), -torch.inf)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, reference = compiled(x, **given), layer(x, **given)
    leaves = [x, *layer.parameters()]
    same(found[0], reference[0])
    if name != "plain":
        same(found[1], reference[1])
    dout = randn(B, L, E, seed=3)
    for got, expected in zip(*(torch.autograd.grad(y[0], leaves, dout) for y in (found, reference)), strict=True):
        same(got, expected)


def test_gradients_pass_gradcheck() -> None:
    layer = layer_of(score=score.Additive(nn.Parameter(randn(D))), position=position.Rotary(4), kv_heads=1)
    parameters = dict(layer.named_parameters())
    x = randn(2, 3, E).requires_grad_()

    def call(x: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(
            layer, dict(zip(parameters, values, strict=True)), (x,), {"mask": mask.causal()}
        )

    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)


def test_copied_and_pickled_layers_match() -> None:
    """Component parameters are saved, loaded, copied and pickled; grouped heads have narrower projections."""
    words = {"score": score.Cosine(nn.Parameter(torch.rand(H) + 0.2)), "normalizer": normalizer.Softmax(torch.zeros(H))}
    layer, x = layer_of(**words, position=position.Rotary(4), kv_heads=2, add_bias_kv=True), randn(B, L, E)
    reference = layer(x)[0]
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "in_proj_weight": (E + 4 * D, E), "in_proj_bias": (E + 4 * D,), "bias_k": (1, 1, 2 * D), "bias_v": (1, 1, 2 * D),
        "out_proj.weight": (E, E), "out_proj.bias": (E,), "score.temperature": (H,), "normalizer.sink": (H,),
    }  # fmt: skip
    assert {"score.temperature"} == {
        name for name, _ in layer.named_parameters() if "proj" not in name and "_" not in name
    }
    assert torch.equal(copy.deepcopy(layer)(x)[0], reference)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x)[0], reference)
    other = layer_of(
        **{**words, "score": score.Cosine(nn.Parameter(torch.ones(H)))},
        position=position.Rotary(4),
        kv_heads=2,
        add_bias_kv=True,
    )
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], reference)
    narrow = MultiheadAttention(E, H, kdim=5, vdim=7, kv_heads=1)
    assert narrow.k_proj_weight.shape == (D, 5) and narrow.v_proj_weight.shape == (D, 7)
    assert narrow.k_proj_weight.abs().max() > 0  # initialized randomly


def test_selected_backends() -> None:
    """A fused backend runs, without materializing the weights."""
    layer, x = layer_of(torch.float32, **EVERY), randn(B, L, E, dtype=torch.float32)
    with regard.record_backends() as ran:
        layer(x, need_weights=False, mask=mask.causal())
    assert ran in (["cpu"], ["tiled"])
