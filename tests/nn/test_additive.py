"""Additive attention against its formula, key by key; and memories, which all layers read that map their keys once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import budget
from support.formulas import additive, close, lengths_allow, randn, same, shaken, softmax
from torch import Tensor, nn

from regard import Summary, chosen, mask, normalizer
from regard.components.mask import Mask
from regard.nn.additive import AdditiveAttention
from regard.nn.memory import Memory

B, L, S, DQ, DK, A, E = 3, 2, 7, 5, 11, 13, 3
N = torch.tensor([7, 0, 4])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(**words: Any) -> Any:
    return shaken(AdditiveAttention(DQ, DK, A, **words))


# ---------------------------------------------------------------------------------------------------------------------
# The formula.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("one", [False, True])
def test_it_is_the_formula_of_the_paper(bias: bool, padded: bool, one: bool) -> None:
    """One query goes another way than several."""
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
    told, seen = layer(
        query, key, value, mask.lengths(N) if padded else None, summary=Summary(full=True, received=True)
    )
    assert torch.equal(told, got)
    close([seen.full, seen.received], [p, p.sum(1)])


def test_gradients_of_the_weights_themselves() -> None:
    layer, key = make(), randn(B, S, DK)
    for query in (randn(B, 1, DQ), randn(B, L, DQ)):
        p = softmax(additive(layer, query, key), lengths_allow(N, query.shape[1], S))
        _, seen = layer(query, key, mask=mask.lengths(N), summary=Summary(full=True))
        same([seen.full], [p], [query, key, *layer.parameters()])


def test_keys_are_the_values_by_default() -> None:
    layer, query, key = make(), randn(B, L, DQ), randn(B, S, DK)
    assert torch.equal(layer(query, key), layer(query, key, key))


@pytest.mark.parametrize("L", [1, 5])
@pytest.mark.parametrize("width", [16, 61])
def test_float32_is_as_precise_as_the_formula(L: int, width: int) -> None:
    layer = AdditiveAttention(DQ, DK, width)
    query, key, n = torch.randn(B, L, DQ), torch.randn(B, 37, DK), torch.tensor([37, 5, 20])
    allowed = lengths_allow(n, L, 37)
    found = []
    with chosen() as ran:
        found.append(layer(query, key, mask=mask.lengths(n)))
    assert set(ran) == {"cpu"}
    found.append(softmax(additive(layer, query, key), allowed) @ key)
    pull = torch.randn_like(found[0])
    for i in range(2):
        found[i] = [found[i], *torch.autograd.grad(found[i], [*layer.parameters()], pull)]
    layer.double()
    exact = softmax(additive(layer, query.double(), key.double()), allowed) @ key.double()
    exact = [exact, *torch.autograd.grad(exact, [*layer.parameters()], pull.double())]
    for got, straight, truth in zip(*found, exact, strict=True):
        budget.check("additive", got, budget.Yardstick(truth, straight))


@pytest.mark.parametrize("one", [False, True])
def test_words_of_the_layer(one: bool) -> None:
    query, key = randn(B, 1 if one else L, DQ), randn(B, S, DK)
    layer = make(normalizer=normalizer.Sparsemax())
    _, seen = layer(query, key, summary=Summary(full=True))
    s = additive(layer, query, key)
    # The nearest point of the simplex is the best of those with each number of keys in it.
    order = s.sort(-1, descending=True).values
    tau = ((order.cumsum(-1) - 1) / torch.arange(1, S + 1)).amax(-1, keepdim=True)
    close([seen.full], [(s - tau).clamp(min=0)])

    layer = make(normalizer=normalizer.Softmax(sink=nn.Parameter(torch.tensor(0.5))))
    assert "normalizer.sink" in layer.state_dict()
    weights = torch.softmax(
        torch.cat([additive(layer, query, key), layer.normalizer.sink.expand(*query.shape[:2], 1)], -1), -1
    )
    same([layer(query, key)], [weights[..., :-1] @ key], [query, key, *layer.parameters()])


def test_dropout_drops_in_training_alone() -> None:
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


def test_gradcheck() -> None:
    layer = shaken(AdditiveAttention(2, 3, 2))
    n = torch.tensor([3, 1])
    for query in (randn(2, 2), randn(2, 2, 2)):
        key, value = randn(2, 3, 3), randn(2, 3, 1)
        assert torch.autograd.gradcheck(lambda *given: layer(*given, mask.lengths(n)), (query, key, value))


def test_second_derivatives() -> None:
    layer = shaken(AdditiveAttention(2, 3, 2))
    for query in (randn(1, 2), randn(1, 2, 2)):
        given = (query, randn(1, 3, 3), randn(1, 3, 1))
        assert torch.autograd.gradgradcheck(lambda *x: layer(*x, mask.lengths([2])), given)


def test_it_compiles_whole() -> None:
    layer = AdditiveAttention(DQ, DK, A)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for b, s in ((3, 7), (5, 11)):  # the second time with sizes that are left open
        query, key, given = torch.randn(b, DQ), torch.randn(b, s, DK), mask.lengths(torch.randint(1, s, (b,)))
        torch.testing.assert_close(compiled(query, key, mask=given), layer(query, key, mask=given))


def test_what_is_saved_is_loaded() -> None:
    layer, other = make(), make()
    query, key = randn(B, L, DQ), randn(B, S, DK)
    assert not torch.equal(layer(query, key), other(query, key))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(query, key), other(query, key))
    assert {*layer.state_dict()} == {"query_map.weight", "query_map.bias", "key_map.weight", "v"}


# ---------------------------------------------------------------------------------------------------------------------
# Memories.


def test_a_memory_is_read_as_its_keys_are() -> None:
    layer, key, value = make(), randn(B, S, DK), randn(B, S, E)
    memory = layer.remember(key, value, mask.lengths(N))
    for query in (randn(B, L, DQ), randn(B, DQ)):
        assert torch.equal(layer(query, memory), layer(query, key, value, mask.lengths(N)))
        first = mask.prefix(2)
        assert torch.equal(layer(query, memory, mask=first), layer(query, key, value, mask.lengths(N) & first))
    assert torch.equal(memory.keys, layer.key_map(key))
    assert memory.values is value
    assert layer.remember(key).values is key


def test_a_memory_of_one_row_serves_all() -> None:
    layer, key = make(), randn(1, S, DK)
    for query in (randn(B, L, DQ), randn(B, DQ)):
        same([layer(query, layer.remember(key))], [layer(query, key.expand(B, -1, -1))], [query, key])


def test_batch_rows_know_nothing_of_each_other_or_of_padding() -> None:
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
def test_a_memory_of_other_rows(name: str) -> None:
    layer, query, rows = make(), randn(5, DQ), torch.tensor([2, 2, 0, 1, 0])
    memory = layer.remember(randn(B, S, DK), randn(B, S, E), MASKS[name])
    got = layer(query, memory.reorder(rows))
    for i, row in enumerate(rows):
        all_alike = query[i].expand(B, -1)
        close([got[i]], [layer(all_alike, memory)[row]])


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit.


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"query_width": 0}, ValueError, r"AdditiveAttention: query_width is 0; expected an int >= 1"),
        ({"key_width": 2.0}, TypeError, r"AdditiveAttention: key_width is 2.0; expected an int >= 1"),
        ({"width": -1}, ValueError, r"AdditiveAttention: width is -1; expected an int >= 1"),
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
def test_a_layer_that_cannot_be(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        AdditiveAttention(**{"query_width": DQ, "key_width": DK, "width": A, **given})


def _f32(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, r"query is \[1.0\]; expected floats of shape \(B, L, 5\)"),
        (
            {"query": _f32(B, L, 4)},
            ValueError,
            r"query is a float32 tensor of shape \(3, 2, 4\); expected floats of shape \(B, L, 5\)",
        ),
        (
            {"query": _f32(B, 4)},
            ValueError,
            r"query is a float32 tensor of shape \(3, 4\); expected floats of shape \(B, 5\)",
        ),
        (
            {"query": _f32(2, 5)},
            ValueError,
            r"query is a float32 tensor of shape \(2, 5\); expected as many batch rows as there are in key, 3",
        ),
        (
            {"key": _f32(S, DK)},
            ValueError,
            r"key is a float32 tensor of shape \(7, 11\); expected floats of shape \(B, S, 11\)",
        ),
        (
            {"value": _f32(B, S - 1, E)},
            ValueError,
            r"value is a float32 tensor of shape \(3, 6, 3\); expected floats of shape \(B, S, E\), with \(B, S\) = "
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
            r"value is given beside a memory, which has its own; expected None",
        ),
        (
            {"key": Memory(_f32(B, S, DK), _f32(B, S, E))},
            ValueError,
            r"the keys of the memory is a float32 tensor of shape \(3, 7, 11\); expected \(B, S, 13\), by `remember` of "
            r"this layer",
        ),
    ],
)
def test_arguments_that_do_not_fit(given: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = AdditiveAttention(DQ, DK, A)
    with pytest.raises(error, match=f"^AdditiveAttention: {message}$"):
        layer(**{"query": _f32(B, L, DQ), "key": _f32(B, S, DK), **given})


def test_rows_that_are_no_rows() -> None:
    memory = Memory(_f32(B, S, A), _f32(B, S, E))
    message = r"^Memory.reorder: rows is a float32 tensor of shape \(2,\); expected integers of shape \(N,\), the batch row of each$"
    with pytest.raises(TypeError, match=message):
        memory.reorder(_f32(2))
