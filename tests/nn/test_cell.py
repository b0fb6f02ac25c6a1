"""`RecurrentCell` against the layers of torch, and error messages of the recurrent layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.formulas import close, randn, same, shaken
from torch import Tensor, nn

from regard import Summary
from regard.nn.additive import AdditiveAttention
from regard.nn.cell import RecurrentCell, RecurrentState, make_cell
from regard.nn.luong import LuongAttention
from regard.nn.memory import Memory
from regard.nn.recurrent import RecurrentDecoder, RecurrentEncoder, coverage_loss

B, L, S, X, H, M, FED = 3, 4, 7, 2, 5, 3, 1


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("fed", [0, FED])
def test_recurrent_cell_matches_torch_layer(kind: Any, layers: int, fed: int) -> None:
    rnn = shaken(make_cell("Test", X, H, kind, layers, 0.0, fed=fed))
    x, more, hidden, cell = randn(B, L, X), randn(B, L, FED), randn(layers, B, H), randn(layers, B, H)
    start = (hidden, cell) if kind == "lstm" else hidden
    out, last = rnn(torch.cat([x, more], -1) if fed else x, start)
    steps, h, c, outputs = RecurrentCell(rnn, X), hidden, cell if kind == "lstm" else None, []
    for t, mapped in enumerate(steps.project(x).unbind(1)):
        h, c = steps.step(mapped, more[:, t] if fed else None, h, c)
        outputs.append(h[-1])
    got, expected = [torch.stack(outputs, 1), h], [out, last[0] if kind == "lstm" else last]
    if kind == "lstm":
        assert c is not None
        got, expected = [*got, c], [*expected, last[1]]
    same(got, expected, [x, more, hidden, cell, *rnn.parameters()])


def test_recurrent_state_reorder_selects_rows() -> None:
    rows = torch.tensor([2, 0, 2, 1])
    state = RecurrentState(randn(2, B, H), randn(2, B, H), randn(B, H), randn(B, S), 6)
    got = state.reorder(rows)
    close(got[:4], [state[0][:, rows], state[1][:, rows], state[2][rows], state[3][rows]])  # type: ignore[index]
    assert got.position == 6
    assert RecurrentState(randn(2, B, H)).reorder(rows)[1:] == (None, None, None, 0)
    with pytest.raises(
        ValueError,
        match=r"^RecurrentState.reorder: rows is an int64 tensor of shape \(1, 2\); expected an integer tensor of shape",
    ):
        state.reorder(torch.tensor([[0, 1]]))


# ---------------------------------------------------------------------------------------------------------------------
# Invalid arguments.


@pytest.mark.parametrize("layer", [RecurrentEncoder, RecurrentDecoder])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"input_width": 0}, ValueError, r"input_width is 0; expected an integer >= 1"),
        ({"hidden_width": 4.0}, TypeError, r"hidden_width is 4.0; expected an integer >= 1"),
        ({"layers": 0}, ValueError, r"layers is 0; expected an integer >= 1"),
        ({"cell": "rnn"}, ValueError, r"cell is 'rnn'; expected \"gru\" or \"lstm\""),
        ({"cell": nn.GRU}, TypeError, r"cell is the class GRU; expected \"gru\" or \"lstm\""),
        ({"dropout": 2}, ValueError, r"dropout is 2; expected a number from 0 to 1"),
    ],
)
def test_invalid_constructor_arguments_raise(
    layer: Any, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    sizes = {"input_width": X, "hidden_width": H, **({"memory_width": M} if layer is RecurrentDecoder else {})}
    with pytest.raises(error, match=f"^{layer.__name__}: {message}$"):
        layer(**{**sizes, **given})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"memory_width": 0}, ValueError, r"memory_width is 0; expected an integer >= 1"),
        ({"order": "vinyals"}, ValueError, r"order is 'vinyals'; expected \"bahdanau\" or \"luong\""),
        ({"order": None}, TypeError, r"order is None; expected \"bahdanau\" or \"luong\""),
        (
            {"input_feeding": True},
            ValueError,
            r"input_feeding is True; expected False with order \"bahdanau\", whose cell takes the context",
        ),
        (
            {"attention": "additive"},
            TypeError,
            r"attention is 'additive'; expected an AdditiveAttention or a LuongAttention, or None for the default",
        ),
        (
            {"attention": LuongAttention(H, M), "coverage": True},
            TypeError,
            r"attention is an object of class LuongAttention; expected an AdditiveAttention, or None for the default",
        ),
        (
            {"attention": AdditiveAttention(H + 1, M, 2)},
            ValueError,
            r"attention has query_width 6; expected 5, as hidden_width",
        ),
        (
            {"attention": AdditiveAttention(H, M + 1, 2)},
            ValueError,
            r"attention has key_width 4; expected 3, as memory_width",
        ),
        (
            {"attention": LuongAttention(H, M, output_width=H)},
            ValueError,
            r"attention has an output_width; expected None, as the decoder has an output map",
        ),
    ],
)
def test_invalid_decoder_constructor_arguments_raise(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^RecurrentDecoder: {message}$"):
        RecurrentDecoder(**{"input_width": X, "hidden_width": H, "memory_width": M, **given})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            (torch.zeros(B, X),),
            ValueError,
            r"x is a float32 tensor of shape \(3, 2\); expected a float tensor of shape \(B, S, 2\)",
        ),
        (
            (torch.zeros(B, S, X), torch.zeros(B)),
            TypeError,
            r"lengths is a float32 tensor .*; expected an integer tensor of shape .*, from 0 to 7",
        ),
        (
            (torch.zeros(B, S, X), torch.tensor([1, 8, 0])),
            ValueError,
            r"lengths is an int64 tensor of shape \(3,\); expected an integer tensor of shape \(B,\) = \(3,\), from 0 to 7",
        ),
        (
            (torch.zeros(B, S, X), torch.tensor([1, 2])),
            ValueError,
            r"lengths is an int64 tensor of shape \(2,\); expected an integer tensor of shape \(B,\) = \(3,\), from 0 to 7",
        ),
    ],
)
def test_invalid_encoder_arguments_raise(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^RecurrentEncoder: {message}$"):
        RecurrentEncoder(X, H)(*given)
    with pytest.raises(error, match=f"^RecurrentEncoder: {message}$"):
        RecurrentEncoder(X, H).read(*given)


def _f32(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("cell", "given", "error", "message"),
    [
        (
            "gru",
            {"x": _f32(B, L, 1)},
            ValueError,
            r"x is a float32 tensor of shape \(3, 4, 1\); expected a float tensor of shape \(B, L, 2\)",
        ),
        (
            "gru",
            {"x": _f32(B, 0, X)},
            ValueError,
            r"x is a float32 tensor of shape \(3, 0, 2\); expected at least one step",
        ),
        (
            "gru",
            {"x": _f32(2, L, X)},
            ValueError,
            r"x is a .* \(2, 4, 2\); expected the batch size of memory, 3",
        ),
        (
            "gru",
            {"memory": _f32(B, S, H)},
            ValueError,
            r"memory is a .* \(3, 7, 5\); expected a float tensor of shape \(B, S, 3\)",
        ),
        (
            "gru",
            {"mask": torch.ones(B, S) > 0},
            TypeError,
            r"mask is a bool tensor .*; expected one of regard.mask, .*",
        ),
        (
            "gru",
            {"state": _f32(B, H)},
            ValueError,
            r"the hidden of the state is a float32 tensor of shape \(3, 5\); expected a float tensor of shape \(1, 3, 5\)",
        ),
        (
            "gru",
            {"state": [0.0]},
            TypeError,
            r"the hidden of the state is \[0.0\]; expected a float tensor of shape \(1, 3, 5\)",
        ),
        (
            "lstm",
            {"state": _f32(1, B, H)},
            TypeError,
            r"the cell of the state is None; expected a float tensor of shape \(1, 3, 5\)",
        ),
        (
            "gru",
            {"state": (_f32(1, B, H), _f32(1, B, H))},
            ValueError,
            r"the cell of the state is a float32 tensor of shape \(1, 3, 5\); expected None for a GRU",
        ),
        (
            "gru",
            {"state": RecurrentState(_f32(1, B, H), coverage=_f32(B, S + 1))},
            ValueError,
            r"the coverage of the state is a float32 tensor of shape \(3, 8\); expected a float tensor of shape \(3, 7\)",
        ),
        (
            "gru",
            {"state": RecurrentState(_f32(1, B, H), output=_f32(B, M))},
            ValueError,
            r"the output of the state is a float32 tensor of shape \(3, 3\); expected a float tensor of shape \(3, 5\)",
        ),
    ],
)
def test_invalid_decoder_arguments_raise(
    cell: Any, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer = RecurrentDecoder(X, H, M, cell=cell, order="luong", input_feeding=True, coverage=True)
    with pytest.raises(error, match=f"^RecurrentDecoder: {message}$"):
        layer(**{"x": _f32(B, L, X), "memory": _f32(B, S, M), **given})


def test_invalid_decoder_step_and_summary_arguments_raise() -> None:
    layer, x, memory = RecurrentDecoder(X, H, M), _f32(B, L, X), _f32(B, S, M)
    state = layer.initial(memory)
    with pytest.raises(
        TypeError, match=r"^RecurrentDecoder: memory is a .* \(3, 7, 3\); expected a Memory from `remember`$"
    ):
        layer.step(x[:, 0], memory, state)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^RecurrentDecoder: x is a .* \(3, 4, 2\); expected a float tensor of shape \(B, 2\)$"
    ):
        layer.step(x, layer.remember(memory), state)
    with pytest.raises(
        ValueError, match=r"^AdditiveAttention: the keys of the memory is a .* \(3, 7, 3\); expected \(B, S, 5\)"
    ):
        layer(x, Memory(memory, memory), state=state)
    with pytest.raises(ValueError, match=r"^summary: rows is 4; expected ints from -4 to 3$"):
        layer(x, memory, summary=Summary(rows=4))
    with pytest.raises(
        ValueError,
        match=r"^RecurrentDecoder: memory is a .* \(3, 7, 2\); expected a float tensor of shape \(B, S, 3\)$",
    ):
        layer.initial(_f32(B, S, 2))
    with pytest.raises(
        ValueError, match=r"^coverage_loss: weights is a .* \(3, 7\); expected a float tensor of shape \(B, L, S\)$"
    ):
        coverage_loss(_f32(B, S))
