"""`RecurrentEncoder` and `RecurrentDecoder` against loops over the steps, in all configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import budget
from support.formulas import additive, close, lengths_allow, luong_weights, randn, same, shaken, softmax
from torch import Tensor

from regard import Summary, mask, record_backends
from regard.nn.additive import AdditiveAttention
from regard.nn.cell import RecurrentState
from regard.nn.luong import LuongAttention
from regard.nn.recurrent import RecurrentDecoder, RecurrentEncoder, coverage_loss

B, L, S, X, H, M = 3, 4, 7, 2, 5, 3
N = torch.tensor([7, 0, 4])

ORDERS: dict[str, dict[str, Any]] = {
    "bahdanau": {},
    "bahdanau, coverage": {"coverage": True},
    "bahdanau, general": {"attention": lambda: LuongAttention(H, M)},
    "bahdanau, predictive": {"attention": lambda: LuongAttention(H, M, "concat", local="predictive", reach=2)},
    "luong": {"order": "luong"},
    "luong, fed": {"order": "luong", "input_feeding": True},
    "luong, coverage": {"order": "luong", "coverage": True},
    "luong, fed, coverage": {"order": "luong", "input_feeding": True, "coverage": True},
    "luong, additive": {"order": "luong", "attention": lambda: AdditiveAttention(H, M, 11, bias=False)},
    "luong, monotonic": {"order": "luong", "attention": lambda: LuongAttention(H, M, local="monotonic", reach=1)},
    "luong, fed, monotonic": {
        "order": "luong",
        "input_feeding": True,
        "attention": lambda: LuongAttention(H, M, "concat", local="monotonic", reach=1),
    },
    "luong, predictive": {"order": "luong", "attention": lambda: LuongAttention(H, M, local="predictive", reach=2)},
}
EVERY = pytest.mark.parametrize("order", ORDERS)
CELL = pytest.mark.parametrize("cell", ["gru", "lstm"])
LAYERS = pytest.mark.parametrize("layers", [1, 2])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(order: str = "bahdanau", cell: Any = "gru", layers: int = 1, **more: Any) -> Any:
    arguments = {**ORDERS[order], **more}
    if "attention" in arguments:
        arguments["attention"] = arguments["attention"]()
    return shaken(RecurrentDecoder(X, H, M, cell=cell, layers=layers, **arguments))


def given(layers: int = 1, cell: str = "gru") -> tuple[Tensor, Tensor, RecurrentState]:
    state = RecurrentState(randn(layers, B, H), randn(layers, B, H) if cell == "lstm" else None)
    return randn(B, L, X), randn(B, S, M), state


def leaves(layer: Any, *tensors: Any) -> list[Tensor]:
    """Return all tensors with gradients."""
    found = [*tensors[:-1], *[x for x in tensors[-1] if isinstance(x, Tensor)]]
    return found + [p for name, p in layer.named_parameters() if not name.startswith("initial")]


def by_steps(
    layer: Any, x: Tensor, memory: Tensor, n: Tensor, state: RecurrentState
) -> tuple[Tensor, Tensor, RecurrentState]:
    """Return outputs (B, L, H), weights (B, L, S) and the last state, step by step."""
    rnn, attention = layer.cell, layer.attention
    h, c = list(state.hidden), list(state.cell) if state.cell is not None else []
    fed, coverage = torch.zeros(B, H, dtype=x.dtype), torch.zeros(B, S, dtype=x.dtype)
    outputs, weights = [], []

    def advance(inputs: Tensor) -> None:
        for i in range(rnn.num_layers):
            w = [getattr(rnn, f"{name}_l{i}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            if c:
                h[i], c[i] = torch.lstm_cell(inputs, [h[i], c[i]], *w)
            else:
                h[i] = torch.gru_cell(inputs, h[i], *w)
            inputs = h[i]

    def look(t: int) -> Tensor:
        nonlocal coverage
        if isinstance(attention, LuongAttention):
            p = luong_weights(attention, h[-1][:, None], memory, n, t)
        else:
            more = None if layer.coverage_map is None else coverage[..., None] * layer.coverage_map
            p = softmax(additive(attention, h[-1][:, None], memory, more), lengths_allow(n, 1, S))
        weights.append(p)
        coverage = coverage + p[:, 0]
        return (p @ memory)[:, 0]

    for t in range(L):
        if layer.order == "bahdanau":
            advance(torch.cat([x[:, t], look(t)], -1))
            outputs.append(h[-1])
        else:
            advance(torch.cat([x[:, t], fed], -1) if layer.input_feeding else x[:, t])
            fed = torch.tanh(torch.cat([look(t), h[-1]], -1) @ layer.output_map.weight.T)
            outputs.append(fed)
    last = RecurrentState(torch.stack(h), torch.stack(c) if c else None, fed, coverage, L)
    return torch.stack(outputs, 1), torch.cat(weights, 1), last


@EVERY
@CELL
@LAYERS
def test_decoder_matches_loop_over_steps(order: str, cell: Any, layers: int) -> None:
    layer, (x, memory, state) = make(order, cell, layers), given(layers, cell)
    out, last = layer(x, memory, mask.lengths(N), state)
    expected, _, end = by_steps(layer, x, memory, N, state)
    got, wanted = [out, last.hidden], [expected, end.hidden]
    for name, there in (("cell", cell == "lstm"), ("output", "fed" in order), ("coverage", "coverage" in order)):
        assert (getattr(last, name) is not None) == there
        if there:
            got.append(getattr(last, name))
            wanted.append(getattr(end, name))
    assert last.position == L
    same(got, wanted, leaves(layer, x, memory, state))


@EVERY
@CELL
@LAYERS
def test_step_matches_forward(order: str, cell: Any, layers: int) -> None:
    layer, (x, memory, state) = make(order, cell, layers), given(layers, cell)
    out, last = layer(x, memory, mask.lengths(N), state)
    remembered, outputs, now = layer.remember(memory, mask.lengths(N)), [], state
    for t in range(L):
        output, now = layer.step(x[:, t], remembered, now)
        outputs.append(output)
    same([torch.stack(outputs, 1), now.hidden], [out, last.hidden], leaves(layer, x, memory, state))
    # Two calls, the second with the state of the first.
    first, half = layer(x[:, :3], remembered, state=state)
    second, end = layer(x[:, 3:], memory, mask.lengths(N), half)
    assert end.position == now.position == L
    same([torch.cat([first, second], 1), end.hidden], [out, last.hidden], leaves(layer, x, memory, state))


@EVERY
def test_summary_of_all_steps(order: str) -> None:
    layer, (x, memory, state) = make(order), given()
    member = torch.rand(2, S) < 0.5
    asked = Summary(lse=True, max=True, entropy=True, top=3, received=True, mass=member, rows=(-1, 2, 0), full=True)
    out, last, statistics = layer(x, memory, mask.lengths(N), state, summary=asked)
    plain, end = layer(x, memory, mask.lengths(N), state)
    close([out, last.hidden], [plain, end.hidden])
    _, p, _ = by_steps(layer, x, memory, N, state)
    p = p / p.sum(-1, keepdim=True).masked_fill(p.sum(-1, keepdim=True) == 0, 1.0)
    got = [
        statistics.full,
        statistics.max,
        statistics.entropy,
        statistics.received,
        statistics.mass,
        statistics.rows,
        statistics.top.weights,
    ]
    entropy = -(p * p.masked_fill(p == 0, 1.0).log()).sum(-1)
    mass = torch.stack([(p * group).sum(-1) for group in member], -1)
    same(
        got,
        [p, p.amax(-1), entropy, p.sum(1), mass, p[:, [3, 2, 0]], p.topk(3).values],
        leaves(layer, x, memory, state),
    )
    assert statistics.lse.shape == (B, L)
    there = statistics.top.keys >= 0
    close([p.gather(-1, statistics.top.keys.clamp(min=0)) * there], [statistics.top.weights])
    # Statistics that are not requested are None. A single step matches one of all steps.
    _, _, some = layer(x, memory, mask.lengths(N), state, summary=Summary(rows=1))
    close([some.rows], [p[:, 1:2]])
    assert [name for name, value in some._asdict().items() if value is not None] == ["rows"]
    _, _, one = layer.step(x[:, 0], layer.remember(memory, mask.lengths(N)), state, summary=Summary(top=3))
    close([one.top.weights], [statistics.top.weights[:, :1]])
    assert [name for name, value in one._asdict().items() if value is not None] == ["top"]


@EVERY
@CELL
def test_float32_error_is_within_that_of_loop(order: str, cell: Any) -> None:
    layer, (x, memory, state) = make(order, cell), given(1, cell)
    x, memory, *state = (None if y is None else y.detach().float() for y in (x, memory, state.hidden, state.cell))
    start, parameters = RecurrentState(*state), leaves(layer.float(), RecurrentState(torch.zeros(0)))[1:]
    with record_backends() as ran:
        out, _ = layer(x, memory, mask.lengths(N), start)
        dout = torch.randn_like(out)
        got = [out, *torch.autograd.grad(out, parameters, dout)]
    assert set(ran) == {"cpu"}
    straight = by_steps(layer, x, memory, N, start)[0]
    straight = [straight, *torch.autograd.grad(straight, parameters, dout)]
    layer.double()
    start = RecurrentState(*(None if y is None else y.double() for y in state))
    exact = by_steps(layer, x.double(), memory.double(), N, start)[0]
    exact = [exact, *torch.autograd.grad(exact, parameters, dout.double())]
    yardsticks = {str(i): budget.ErrorBudget(y, z) for i, (y, z) in enumerate(zip(exact, straight, strict=True))}
    for i, yardstick in enumerate(budget.link_budgets(yardsticks).values()):
        budget.assert_within_budget(str(i), got[i], yardstick)


@EVERY
def test_batch_rows_and_padding_are_independent(order: str) -> None:
    layer, (x, memory, state) = make(order), given()
    out, _ = layer(x, memory, mask.lengths(N), state)
    for b in (0, 2):
        one = RecurrentState(state.hidden[:, b : b + 1])
        close([out[b : b + 1]], [layer(x[b : b + 1], memory[b : b + 1, : N[b]], state=one)[0]])
    spoiled = memory.detach().clone()
    spoiled[1], spoiled[2, 4:] = torch.nan, torch.nan
    close([layer(x, spoiled, mask.lengths(N), state)[0]], [out])


@EVERY
@CELL
def test_reorder_selects_batch_rows(order: str, cell: Any) -> None:
    """Rows that are selected and repeated after two steps continue as in the full batch."""
    layer, (x, memory, state) = make(order, cell), given(1, cell)
    rows = torch.tensor([2, 0, 2, 1])
    _, half = layer(x[:, :2], memory, mask.lengths(N), state)
    remembered = layer.remember(memory, mask.lengths(N)).reorder(rows)
    got, last = layer(x[rows, 2:], remembered, state=half.reorder(rows))
    whole, end = layer(x, memory, mask.lengths(N), state)
    close([got, last.hidden], [whole[rows, 2:], end.hidden[:, rows]])


def test_memory_is_projected_once() -> None:
    layer, (x, memory, state) = make(), given()
    calls = []
    layer.attention.key_map.register_forward_hook(lambda *_: calls.append(1))
    layer(x, memory, state=state)
    assert len(calls) == 1


def test_luong_without_input_feeding_runs_in_parallel() -> None:
    layer, (x, memory, state) = make("luong").float(), given()
    x, memory, hidden = (y.float() for y in (x, memory, state.hidden))
    with record_backends() as ran:
        layer(x, memory, mask.lengths(N), hidden)
    assert len(ran) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Initial states.


@CELL
@LAYERS
def test_initial_state_is_projection_of_mean(cell: Any, layers: int) -> None:
    layer, (x, memory, _) = make("luong", cell, layers), given()
    means = [memory[b, : N[b]].mean(0) if N[b] else 0 * memory[b, 0] for b in range(B)]
    W, b = layer.initial_map.weight, layer.initial_map.bias
    parts = torch.tanh(torch.stack(means) @ W.T + b).split(H, -1)
    state = layer.initial(memory, mask.lengths(N))
    expected = [torch.stack(parts[:layers]), *([torch.stack(parts[layers:])] if cell == "lstm" else [])]
    same([y for y in state[:2] if y is not None], expected, [memory, W, b])
    again = layer.initial(layer.remember(memory, mask.lengths(N)))
    assert torch.equal(again.hidden, state.hidden)
    close([layer(x, memory, mask.lengths(N))[0]], [layer(x, memory, mask.lengths(N), state)[0]])


def test_torch_state_is_accepted() -> None:
    layer, (x, memory, state) = make(), given()
    expected = layer(x, memory, state=state)[0]
    assert torch.equal(layer(x, memory, state=state.hidden)[0], expected)
    layer, (x, memory, state) = make(cell="lstm"), given(cell="lstm")
    expected = layer(x, memory, state=state)[0]
    assert torch.equal(layer(x, memory, state=(state.hidden, state.cell))[0], expected)


@CELL
@LAYERS
@pytest.mark.parametrize("bidirectional", [True, False])
def test_encoder_rows_match_unpadded_rows(cell: Any, layers: int, bidirectional: bool) -> None:
    layer = shaken(RecurrentEncoder(X, H, cell=cell, layers=layers, bidirectional=bidirectional))
    x, width = randn(B, S, X), H * (2 if bidirectional else 1)
    memory, state = layer(x, N)
    assert memory.shape == (B, S, width)
    rows = []
    hidden, cells = (torch.zeros(layers, B, width, dtype=x.dtype) for _ in range(2))
    for b in range(B):
        row = torch.zeros(S, width, dtype=x.dtype)
        if N[b]:
            found, last = layer.cell(x[b : b + 1, : N[b]])
            row = torch.cat([found[0], row[N[b] :]])
            for target, part in zip((hidden, cells), last if cell == "lstm" else (last,), strict=False):
                for i in range(layers):
                    target[i, b] = torch.cat([*part.view(layers, -1, 1, H)[i, :, 0]])
        rows.append(row)
    got, expected = [memory, state.hidden], [torch.stack(rows), hidden]
    if cell == "lstm":
        got, expected = [*got, state.cell], [*expected, cells]
    else:
        assert state.cell is None
    same(got, expected, [x, *layer.parameters()])
    same([layer.read(x, N)], [torch.stack(rows)], [x, *layer.parameters()])
    whole, full = torch.full((B,), S), layer(x)
    close([full[0], full[1].hidden], [layer(x, whole)[0], layer(x, whole)[1].hidden])
    close([full[0], full[0]], [layer.read(x), layer.read(x, whole)])
    assert layer.read(x[:0], N[:0]).shape == (0, S, width)


@CELL
def test_decoder_starts_from_encoder_state(cell: Any) -> None:
    encoder = shaken(RecurrentEncoder(X, H, cell=cell, layers=2))
    decoder = shaken(RecurrentDecoder(X, 2 * H, encoder.width, cell=cell, layers=2))
    memory, state = encoder(randn(B, S, X), N)
    out, last = decoder(randn(B, L, X), memory, mask.lengths(N), state)
    assert out.shape == (B, L, 2 * H)
    assert last.hidden.shape == state.hidden.shape


# ---------------------------------------------------------------------------------------------------------------------
# Coverage loss, dropout, state dicts, autocast.


def test_coverage_loss_matches_loops() -> None:
    weights = torch.rand(B, L, S, dtype=torch.float64).softmax(-1).requires_grad_()
    rows = []
    for b in range(B):
        statistics = torch.zeros(S, dtype=torch.float64)
        for t in range(L):
            rows.append(sum(torch.minimum(weights[b, t, j], statistics[j]) for j in range(S)))
            statistics = statistics + weights[b, t]
    same([coverage_loss(weights)], [torch.stack(rows).view(B, L)], [weights])
    assert not coverage_loss(weights)[:, 0].any()


@pytest.mark.parametrize(
    ("layer", "read"), [(RecurrentEncoder, False), (RecurrentEncoder, True), (RecurrentDecoder, False)]
)
@CELL
def test_dropout_applies_between_layers(layer: Any, read: bool, cell: Any, recwarn: pytest.WarningsRecorder) -> None:
    def run(module: Any) -> Tensor:
        torch.manual_seed(1)
        if layer is RecurrentDecoder:
            return module(x, memory, state=state)[0]
        return module.read(x, N.clamp(max=L)) if read else module(x)[0]

    sizes = (X, H) if layer is RecurrentEncoder else (X, H, M)
    for layers in (1, 2):
        x, memory, state = given(layers, cell)
        module = shaken(layer(*sizes, cell=cell, layers=layers, dropout=0.5))
        trained, again = run(module), run(module)
        assert torch.equal(trained, again)
        assert torch.equal(trained, run(module.eval())) == (layers == 1)
    assert not recwarn.list


@CELL
def test_parallel_and_stepwise_dropout_agree(cell: Any) -> None:
    """A dropout probability of 1 removes the whole output of the layer below."""
    layer, (x, memory, state) = make("luong, fed", cell, 2), given(2, cell)
    layer.cell.dropout = 1.0
    before = layer(x, memory, state=state)[0]
    assert torch.equal(before, layer(x + 1, memory, state=state)[0])
    assert not torch.equal(before, layer.eval()(x, memory, state=state)[0])


@EVERY
@CELL
def test_state_dict_round_trip(order: str, cell: Any) -> None:
    layer, other, (x, memory, state) = make(order, cell), make(order, cell), given(1, cell)
    assert not torch.equal(layer(x, memory, state=state)[0], other(x, memory, state=state)[0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, memory, state=state)[0], other(x, memory, state=state)[0])


def test_recurrent_layers_under_autocast() -> None:
    for order in ("bahdanau, coverage", "luong", "luong, fed"):
        for cell in ("gru", "lstm"):
            layer, (x, memory, state) = make(order, cell).float(), given(1, cell)
            x, memory, *state = (None if y is None else y.detach().float() for y in (x, memory, *state[:2]))
            with torch.autocast("cpu", torch.bfloat16):
                out, _ = layer(x, memory, mask.lengths(N), RecurrentState(*state))
                assert out.dtype == torch.bfloat16
            out.float().sum().backward()
            exact = layer(x, memory, mask.lengths(N), RecurrentState(*state))[0]
            # bfloat16 has 8 bits, and there are 4 steps.
            assert (out - exact).abs().max() <= 4 * 2**-8 * 4
