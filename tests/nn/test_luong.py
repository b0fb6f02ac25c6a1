"""`LuongAttention` against the equations of the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import budget
from support.formulas import close, luong_weights, randn, same, shaken

from regard import Summary, mask, record_backends
from regard.nn.luong import LuongAttention

B, L, S, D, E, REACH = 3, 5, 17, 7, 2, 2
N = torch.tensor([17, 0, 6])
SCORES = ("dot", "general", "concat")
LOCALS = (None, "monotonic", "predictive")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(score: Any = "general", local: Any = None, **arguments: Any) -> Any:
    return shaken(LuongAttention(D, D if score == "dot" else 11, score, local=local, reach=REACH, **arguments))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("local", LOCALS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("one", [False, True])
def test_luong_attention_matches_equations(score: Any, local: Any, padded: bool, one: bool) -> None:
    layer = make(score, local)
    query, key, value = randn(B, D) if one else randn(B, L, D), randn(B, S, layer.key_width), randn(B, S, E)
    rows, n = query[:, None] if one else query, N if padded else torch.full((B,), S)
    start = {"start": 4} if local == "monotonic" else {}
    p = luong_weights(layer, rows, key, n, **start)
    got = layer(query, key, value, mask.lengths(N) if padded else None, **start)
    same([got], [(p @ value)[:, 0] if one else p @ value], [query, key, value, *layer.parameters()])
    if padded:
        assert not got[1].any()

    asked = Summary(full=True, entropy=True)
    reference, statistics = layer(query, key, value, mask.lengths(N) if padded else None, summary=asked, **start)
    assert torch.equal(reference, got)
    assert statistics.lse is None
    # The summary is of weights that sum to 1.
    p = p / p.sum(-1, keepdim=True).masked_fill(p.sum(-1, keepdim=True) == 0, 1.0)
    close([statistics.full, statistics.entropy], [p, -torch.special.xlogy(p, p).sum(-1)])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("local", LOCALS)
def test_attentional_vector_matches_equation(score: Any, local: Any) -> None:
    """Equation 5 of the paper."""
    layer = make(score, local, output_width=13, value_width=E)
    query, key, value = randn(B, L, D), randn(B, S, layer.key_width), randn(B, S, E)
    context = luong_weights(layer, query, key, N) @ value
    expected = torch.tanh(torch.cat([context, query], -1) @ layer.output_map.weight.T)
    same([layer(query, key, value, mask.lengths(N))], [expected], [query, key, value, *layer.parameters()])
    for t in range(L):
        start = {"start": t} if local == "monotonic" else {}
        close([layer(query[:, t], key, value, mask.lengths(N), **start)], [expected[:, t]])


@pytest.mark.parametrize("local", LOCALS)
def test_steps_with_memory_match_full_sequence(local: Any) -> None:
    layer, query, key = make("general", local), randn(B, L, D), randn(B, S, 11)
    whole, memory = layer(query, key, mask=mask.lengths(N)), layer.remember(key, mask=mask.lengths(N))
    assert torch.equal(layer(query, memory), whole)
    for t in range(L):
        close([layer(query[:, t], memory, start=t)], [whole[:, t]])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("local", LOCALS)
def test_batch_rows_and_padding_are_independent(score: Any, local: Any) -> None:
    layer = make(score, local)
    query, key = randn(B, L, D), randn(B, S, layer.key_width)
    # The length of a padded row does not depend on other masks.
    given = mask.lengths(N) & ~mask.dense(torch.arange(S) == 1) & mask.prefix(S - 1)
    out = layer(query, key, mask=given)
    for b in (0, 2):
        there = min(int(N[b]), S - 1)
        shown = ~mask.dense(torch.arange(there) == 1)
        close([out[b : b + 1]], [layer(query[b : b + 1], key[b : b + 1, :there], mask=shown)])
    spoiled = key.detach().clone()
    spoiled[1], spoiled[2, 6:] = torch.nan, torch.nan
    assert torch.equal(layer(query, spoiled, mask=given), out)


def test_lengths_are_clamped_to_number_of_keys() -> None:
    layer, query, key = make("general", "predictive"), randn(B, L, D), randn(B, S, 11)
    out = layer(query, key, mask=mask.lengths([S + 5, -3, 6]))
    assert torch.equal(out, layer(query, key, mask=mask.lengths([S, 0, 6])))


def test_memory_of_batch_size_one_broadcasts() -> None:
    for local in LOCALS:
        for score in SCORES:
            layer = make(score, local)
            query, key = randn(B, L, D), randn(1, S, layer.key_width)
            memory = layer.remember(key)
            for given in (query, query[:, 0]):
                close([layer(given, memory)], [layer(given, key.expand(B, -1, -1))])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("L", [1, 5])
def test_float32_error_is_within_that_of_equations(score: Any, L: int) -> None:
    layer = make(score, "predictive").float()
    query, key = torch.randn(B, L, D), torch.randn(B, S, layer.key_width)
    leaves = [*layer.parameters()]
    with record_backends() as ran:
        got = layer(query, key, mask=mask.lengths(N))
        dout = torch.randn_like(got)
        got = [got, *torch.autograd.grad(got, leaves, dout)]
    assert set(ran) == {"cpu"}
    straight = luong_weights(layer, query, key, N) @ key
    straight = [straight, *torch.autograd.grad(straight, leaves, dout)]
    layer.double()
    exact = luong_weights(layer, query.double(), key.double(), N) @ key.double()
    exact = [exact, *torch.autograd.grad(exact, leaves, dout.double())]
    yardsticks = budget.link_budgets(
        {str(i): budget.ErrorBudget(x, y) for i, (x, y) in enumerate(zip(exact, straight, strict=True))}
    )
    for i, x in enumerate(got):
        budget.assert_within_budget(str(i), x, yardsticks[str(i)])


def test_predictive_window_in_half_precision() -> None:
    """bfloat16 does not represent all integers above 256, so positions are in float32."""
    layer = LuongAttention(D, D, "dot", local="predictive", reach=4).bfloat16()
    query, key = torch.randn(1, 1, D).bfloat16(), torch.randn(1, 1001, D).bfloat16()
    hidden = torch.tanh(layer.position_map(query)).double()
    p = 1001 * torch.sigmoid((hidden * layer.position_v.double()).sum(-1))
    _, statistics = layer(query, key, summary=Summary(full=True))
    reached = statistics.full[0, 0].nonzero()[:, 0]
    assert [*reached] == [j for j in range(1001) if abs(j - p.item()) <= 4]


def test_luong_attention_passes_gradcheck() -> None:
    n = torch.tensor([3, 1])
    for score in SCORES:
        layer = shaken(LuongAttention(2, 2, score, local="predictive", reach=1))
        given = (randn(2, 2, 2), randn(2, 4, 2), randn(2, 4, 1))
        assert torch.autograd.gradcheck(lambda *x, layer=layer: layer(*x, mask.lengths(n)), given)


@pytest.mark.parametrize("score", SCORES)
def test_state_dict_round_trip(score: Any) -> None:
    layer, other = (make(score, "predictive", output_width=3) for _ in range(2))
    query, key = randn(B, L, D), randn(B, S, layer.key_width)
    assert not torch.equal(layer(query, key), other(query, key))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(query, key), other(query, key))


def test_parameters_of_each_score() -> None:
    def names(*given: Any, **arguments: Any) -> set[str]:
        return {*LuongAttention(D, D, *given, **arguments).state_dict()}

    assert names("dot") == set()
    assert names() == {"query_map.weight"}
    assert names("concat") == {"query_map.weight", "key_map.weight", "v"}
    assert names("dot", local="monotonic") == set()
    assert names("dot", local="predictive") == {"position_map.weight", "position_v"}
    assert names("dot", output_width=3) == {"output_map.weight"}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"score": "cosine"}, ValueError, r"score is 'cosine'; expected \"dot\", \"general\" or \"concat\""),
        ({"score": None}, TypeError, r"score is None; expected \"dot\", \"general\" or \"concat\""),
        ({"score": "dot"}, ValueError, r"key_width is 11; expected 7, as query_width, for \"dot\" .*"),
        ({"local": "m"}, ValueError, r"local is 'm'; expected \"monotonic\", \"predictive\" or None"),
        ({"local": True}, TypeError, r"local is True; expected \"monotonic\", \"predictive\" or None"),
        ({"reach": 0}, ValueError, r"reach is 0; expected an integer >= 1"),
        ({"query_width": "7"}, TypeError, r"query_width is '7'; expected an integer >= 1"),
        ({"output_width": 0}, ValueError, r"output_width is 0; expected an integer >= 1, or None for the context"),
        (
            {"output_width": 3, "value_width": 2.0},
            TypeError,
            r"value_width is 2.0; expected an integer >= 1, or None for key_width",
        ),
    ],
)
def test_invalid_constructor_arguments_raise(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^LuongAttention: {message}$"):
        LuongAttention(**{"query_width": D, "key_width": 11, **given})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"start": -1}, ValueError, r"start is -1; expected an integer >= 0"),
        (
            {"query": torch.zeros(B, L, 1)},
            ValueError,
            r"query is a float32 tensor of shape \(3, 5, 1\); expected a float tensor of shape \(B, L, 7\)",
        ),
        (
            {"key": torch.zeros(B, S, D).int()},
            TypeError,
            r"key is an int32 tensor of shape \(3, 17, 7\); expected a float tensor of shape \(B, S, 11\)",
        ),
        (
            {"value": torch.zeros(B, S, 3)},
            ValueError,
            r"value is a float32 tensor of shape \(3, 17, 3\); expected a float tensor of shape \(B, S, 11\), "
            r"as value_width is 11",
        ),
    ],
)
def test_invalid_forward_arguments_raise(given: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = LuongAttention(D, 11, output_width=3)
    with pytest.raises(error, match=f"^LuongAttention: {message}$"):
        layer(**{"query": torch.zeros(B, L, D), "key": torch.zeros(B, S, 11), **given})
