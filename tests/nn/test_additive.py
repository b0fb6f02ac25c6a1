"""`AdditiveAttention` against its formula, and `Memory`, which all layers with projected keys share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import budget
from support.formulas import additive, close, lengths_allow, randn, same, shaken, softmax
from torch import Tensor, nn

from regard import Summary, mask, normalizer, record_backends
from regard.components.mask import Mask
from regard.nn.additive import AdditiveAttention
from regard.nn.memory import Memory

B, L, S, DQ, DK, A, E = 3, 2, 7, 5, 11, 13, 3
N = torch.tensor([7, 0, 4])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(**arguments: Any) -> Any:
    return shaken(AdditiveAttention(DQ, DK, A, **arguments))


# ---------------------------------------------------------------------------------------------------------------------
# The formula.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("one", [False, True])
def test_additive_attention_matches_formula(bias: bool, padded: bool, one: bool) -> None:
    """A single query takes another code path than several."""
    layer = make(bias=bias)
    query, key, value = randn(B, DQ) if one else randn(B, L, DQ), randn(B, S, DK), randn(B, S, E)
    rows = query[:, None] if one else query
    allowed = lengths_allow(N if padded else torch.full((B,), S), rows.shape[1], S)
    p = softmax(additive(layer, rows, key), allowed)
    context = p @ value
    got = layer(query, key, value, mask.lengths(N) if padded else None)
    same([got], [context[:, 0] if one else context], [query, key, value, *layer.parameters()])
    if padded:
        assert not got[1].any()
    reference, statistics = layer(
        query, key, value, mask.lengths(N) if padded else None, summary=Summary(full=True, received=True)
    )
    assert torch.equal(reference, got)
    close([statistics.full, statistics.received], [p, p.sum(1)])


def test_gradients_of_attention_weights_match_formula() -> None:
    layer, key = make(), randn(B, S, DK)
    for query in (randn(B, 1, DQ), randn(B, L, DQ)):
        p = softmax(additive(layer, query, key), lengths_allow(N, query.shape[1], S))
        _, statistics = layer(query, key, mask=mask.lengths(N), summary=Summary(full=True))
        same([statistics.full], [p], [query, key, *layer.parameters()])


def test_values_default_to_keys() -> None:
    layer, query, key = make(), randn(B, L, DQ), randn(B, S, DK)
    assert torch.equal(layer(query, key), layer(query, key, key))


@pytest.mark.parametrize("L", [1, 5])
@pytest.mark.parametrize("width", [16, 61])
def test_float32_error_is_within_that_of_formula(L: int, width: int) -> None:
    layer = AdditiveAttention(DQ, DK, width)
    query, key, n = torch.randn(B, L, DQ), torch.randn(B, 37, DK), torch.tensor([37, 5, 20])
    allowed = lengths_allow(n, L, 37)
    found = []
    with record_backends() as ran:
        found.append(layer(query, key, mask=mask.lengths(n)))
    assert set(ran) == {"cpu"}
    found.append(softmax(additive(layer, query, key), allowed) @ key)
    dout = torch.randn_like(found[0])
    for i in range(2):
        found[i] = [found[i], *torch.autograd.grad(found[i], [*layer.parameters()], dout)]
    layer.double()
    exact = softmax(additive(layer, query.double(), key.double()), allowed) @ key.double()
    exact = [exact, *torch.autograd.grad(exact, [*layer.parameters()], dout.double())]
    for got, straight, truth in zip(*found, exact, strict=True):
        budget.assert_within_budget("additive", got, budget.ErrorBudget(truth, straight))


@pytest.mark.parametrize("one", [False, True])
def test_normalizer_and_summary_arguments(one: bool) -> None:
    query, key = randn(B, 1 if one else L, DQ), randn(B, S, DK)
    layer = make(normalizer=normalizer.Sparsemax())
    _, statistics = layer(query, key, summary=Summary(full=True))
    s = additive(layer, query, key)
    # Sparsemax: the nearest point of the simplex, by trying every size of the support.
    order = s.sort(-1, descending=True).values
    tau = ((order.cumsum(-1) - 1) / torch.arange(1, S + 1)).amax(-1, keepdim=True)
    close([statistics.full], [(s - tau).clamp(min=0)])

    layer = make(normalizer=normalizer.Softmax(sink=nn.Parameter(torch.tensor(0.5))))
    assert "normalizer.sink" in layer.state_dict()
    weights = torch.softmax(
        torch.cat([additive(layer, query, key), layer.normalizer.sink.expand(*query.shape[:2], 1)], -1), -1
    )
    same([layer(query, key)], [weights[..., :-1] @ key], [query, key, *layer.parameters()])


def test_dropout_applies_in_training_only() -> None:
    layer, query = make(dropout=0.4), randn(B, L, DQ)
    key, value = randn(B, 500, DK), torch.ones(B, 500, 1, dtype=torch.float64)
    torch.manual_seed(1)
    first = layer(query, key, value)
    assert not torch.equal(first, layer(query, key, value))
    torch.manual_seed(1)
    assert torch.equal(first, layer(query, key, value))
    close([layer.eval()(query, key, value)], [torch.ones(B, L, 1, dtype=torch.float64)])
    layer.train().dropout = 1.0
    assert not layer(query, key, value).any()


def test_additive_attention_passes_gradcheck() -> None:
    layer = shaken(AdditiveAttention(2, 3, 2))
    n = torch.tensor([3, 1])
    for query in (randn(2, 2), randn(2, 2, 2)):
        key, value = randn(2, 3, 3), randn(2, 3, 1)
        assert torch.autograd.gradcheck(lambda *given: layer(*given, mask.lengths(n)), (query, key, value))


def test_additive_attention_passes_gradgradcheck() -> None:
    layer = shaken(AdditiveAttention(2, 3, 2))
    for query in (randn(1, 2), randn(1, 2, 2)):
        given = (query, randn(1, 3, 3), randn(1, 3, 1))
        assert torch.autograd.gradgradcheck(lambda *x: layer(*x, mask.lengths([2])), given)


def test_additive_attention_compiles_without_graph_breaks() -> None:
    layer = AdditiveAttention(DQ, DK, A)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for b, s in ((3, 7), (5, 11)):  # the second time with sizes that are left open
        query, key, given = torch.randn(b, DQ), torch.randn(b, s, DK), mask.lengths(torch.randint(1, s, (b,)))
        torch.testing.assert_close(compiled(query, key, mask=given), layer(query, key, mask=given))


def test_state_dict_round_trip() -> None:
    layer, other = make(), make()
    query, key = randn(B, L, DQ), randn(B, S, DK)
    assert not torch.equal(layer(query, key), other(query, key))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(query, key), other(query, key))
    assert {*layer.state_dict()} == {"query_map.weight", "query_map.bias", "key_map.weight", "v"}


# ---------------------------------------------------------------------------------------------------------------------
# Memories.


def test_memory_gives_same_result_as_keys() -> None:
    layer, key, value = make(), randn(B, S, DK), randn(B, S, E)
    memory = layer.remember(key, value, mask.lengths(N))
    for query in (randn(B, L, DQ), randn(B, DQ)):
        assert torch.equal(layer(query, memory), layer(query, key, value, mask.lengths(N)))
        first = mask.prefix(2)
        assert torch.equal(layer(query, memory, mask=first), layer(query, key, value, mask.lengths(N) & first))
    assert torch.equal(memory.keys, layer.key_map(key))
    assert memory.values is value
    assert layer.remember(key).values is key


def test_memory_of_batch_size_one_broadcasts() -> None:
    layer, key = make(), randn(1, S, DK)
    for query in (randn(B, L, DQ), randn(B, DQ)):
        same([layer(query, layer.remember(key))], [layer(query, key.expand(B, -1, -1))], [query, key])


def test_batch_rows_and_padding_are_independent() -> None:
    layer, key = make(), randn(B, S, DK)
    for query in (randn(B, L, DQ), randn(B, DQ)):
        out = layer(query, key, mask=mask.lengths(N))
        for b in (0, 2):
            close([out[b : b + 1]], [layer(query[b : b + 1], key[b : b + 1, : N[b]])])
        spoiled = key.detach().clone()
        spoiled[1], spoiled[2, 4:] = torch.nan, torch.nan
        assert torch.equal(layer(query, spoiled, mask=mask.lengths(N)), out)


MASKS: dict[str, Mask | None] = {
    "none": None,
    "lengths": mask.lengths(N),
    "one length": mask.prefix(3),
    "dense": mask.dense(torch.rand(B, 1, 1, S, generator=torch.Generator().manual_seed(0)) < 0.5),
    "one table": mask.dense(torch.arange(S) % 2 == 0),
    "documents": mask.documents((torch.tensor([[0], [1], [2]]), torch.arange(S).expand(B, S) % 3)),
    "a predicate": mask.where(lambda b, h, q, k: k > b),
    "all": mask.lengths(N) & ~mask.where(lambda b, h, q, k: k == b) | mask.prefix(1),
}


@pytest.mark.parametrize("name", MASKS)
def test_memory_reorder_selects_rows_of_mask(name: str) -> None:
    layer, query, rows = make(), randn(5, DQ), torch.tensor([2, 2, 0, 1, 0])
    memory = layer.remember(randn(B, S, DK), randn(B, S, E), MASKS[name])
    got = layer(query, memory.reorder(rows))
    for i, row in enumerate(rows):
        all_alike = query[i].expand(B, -1)
        close([got[i]], [layer(all_alike, memory)[row]])


# ---------------------------------------------------------------------------------------------------------------------
# Invalid arguments.


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"query_width": 0}, ValueError, r"AdditiveAttention: query_width is 0; expected an integer >= 1"),
        ({"key_width": 2.0}, TypeError, r"AdditiveAttention: key_width is 2.0; expected an integer >= 1"),
        ({"width": -1}, ValueError, r"AdditiveAttention: width is -1; expected an integer >= 1"),
        ({"dropout": 1.5}, ValueError, r"AdditiveAttention: dropout is 1.5; expected a number from 0 to 1"),
        ({"dropout": None}, TypeError, r"AdditiveAttention: dropout is None; expected a number from 0 to 1"),
        (
            {"normalizer": normalizer.Sparsemax},
            TypeError,
            r"AdditiveAttention: normalizer is the class Sparsemax; expected one of regard.normalizer, such as "
            r"normalizer.Softmax\(\), or None",
        ),
    ],
)
def test_invalid_constructor_arguments_raise(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        AdditiveAttention(**{"query_width": DQ, "key_width": DK, "width": A, **given})


def _f32(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, r"query is \[1.0\]; expected a float tensor of shape \(B, L, 5\)"),
        (
            {"query": _f32(B, L, 4)},
            ValueError,
            r"query is a float32 tensor of shape \(3, 2, 4\); expected a float tensor of shape \(B, L, 5\)",
        ),
        (
            {"query": _f32(B, 4)},
            ValueError,
            r"query is a float32 tensor of shape \(3, 4\); expected a float tensor of shape \(B, 5\)",
        ),
        (
            {"query": _f32(2, 5)},
            ValueError,
            r"query is a float32 tensor of shape \(2, 5\); expected the batch size of key, 3",
        ),
        (
            {"key": _f32(S, DK)},
            ValueError,
            r"key is a float32 tensor of shape \(7, 11\); expected a float tensor of shape \(B, S, 11\)",
        ),
        (
            {"value": _f32(B, S - 1, E)},
            ValueError,
            r"value is a float32 tensor of shape \(3, 6, 3\); expected a float tensor of shape \(B, S, E\), with \(B, S\) = "
            r"\(3, 7\) as in key",
        ),
        (
            {"mask": torch.ones(B, S).bool()},
            TypeError,
            r"mask is a bool tensor of shape \(3, 7\); expected one of regard.mask, such as mask.lengths\(n\), "
            r"True = may attend",
        ),
        (
            {"key": Memory(_f32(B, S, A), _f32(B, S, E)), "mask": N},
            TypeError,
            r"mask is an int64 tensor of shape \(3,\); expected one of regard.mask, such as mask.lengths\(n\), "
            r"True = may attend",
        ),
        (
            {"key": Memory(_f32(B, S, A), _f32(B, S, E)), "value": _f32(B, S, E)},
            ValueError,
            r"value is given with a Memory, which has its own values; expected None",
        ),
        (
            {"key": Memory(_f32(B, S, DK), _f32(B, S, E))},
            ValueError,
            r"the keys of the memory is a float32 tensor of shape \(3, 7, 11\); expected \(B, S, 13\), from `remember` of "
            r"this layer",
        ),
    ],
)
def test_invalid_forward_arguments_raise(given: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = AdditiveAttention(DQ, DK, A)
    with pytest.raises(error, match=f"^AdditiveAttention: {message}$"):
        layer(**{"query": _f32(B, L, DQ), "key": _f32(B, S, DK), **given})


def test_memory_reorder_rejects_float_indices() -> None:
    memory = Memory(_f32(B, S, A), _f32(B, S, E))
    message = r"^Memory.reorder: rows is a float32 tensor of shape \(2,\); expected an integer tensor of shape \(N,\), batch indices$"
    with pytest.raises(TypeError, match=message):
        memory.reorder(_f32(2))
