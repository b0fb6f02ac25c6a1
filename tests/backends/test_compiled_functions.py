"""Python code of users in compiled graphs: scores, masks, normalizers and biases that close over values of every kind."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import regard
from regard import mask, normalizer, position, score
from regard.backends import reference

_B, _H, _G, _L, _D, _E = 2, 4, 2, 13, 8, 5


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Scale(nn.Module):
    """A score with a plain attribute and a parameter."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.weight = factor, nn.Parameter(torch.tensor(factor))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT) * self.factor * self.weight

    def method(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT) * self.factor


class Multiplied:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT) * self.factor


class Slopes(nn.Module):
    """A bias with a parameter and a buffer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((_H,), value, dtype=torch.float64))
        self.register_buffer("signs", torch.tensor([1, -1, 1, -1]))

    def forward(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() * self.weight[head] * self.signs[head]


def _scaled(q: Tensor, k: Tensor, factor: Any = 1.0, *, times: Any = 1.0) -> Tensor:
    return (q @ k.mT) * factor * times


def _near(b: Tensor, h: Tensor, i: Tensor, j: Tensor, reach: int = 1) -> Tensor:
    return (i - j).abs() <= reach


def _tempered(factor: float) -> normalizer.Normalizer:
    """Return an object of a new class per value, which closes over the value and has the name of a class of the package."""

    @dataclass(frozen=True)
    class Softmax(normalizer.Normalizer):
        def weights(self, s: Tensor, tile: Any) -> Tensor:
            return torch.softmax(s * factor, -1)

    return Softmax()


@dataclass(frozen=True)
class Applied(normalizer.Normalizer):
    """Softmax of a function of the scores."""

    function: Callable[[Tensor], Tensor]

    def weights(self, s: Tensor, tile: Any) -> Tensor:
        return torch.softmax(self.function(s), -1)


@dataclass(frozen=True)
class Manhattan(score.Score):
    scale: float

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return -(q - k).abs().sum(-1) * self.scale


@dataclass(frozen=True)
class Dilated(mask.Mask):
    step: int

    def allowed(self, tile: Any) -> Tensor:
        return (tile.query - tile.key) % self.step == 0


@dataclass(frozen=True)
class Decay(position.Bias):
    rate: Tensor

    def bias(self, tile: Any, dtype: torch.dtype) -> Tensor:
        return (-(tile.query - tile.key).abs() * self.rate).to(dtype)


@dataclass(frozen=True)
class Tabled(position.Bias):
    """A table per head and pair, a slope per head, and a function."""

    table: Tensor
    slopes: Tensor
    function: Callable[[Tensor], Tensor]

    def bias(self, tile: Any, dtype: torch.dtype) -> Tensor:
        return (tile.cut(self.table) - tile.cut_heads(self.slopes) * self.function(tile.behind("end"))).to(dtype)


@dataclass(frozen=True)
class Listed(mask.Mask):
    """Pairs that a table of tensors allows, in the first `count` positions."""

    allow: Tensor
    count: int

    def allowed(self, tile: Any) -> Tensor:
        return tile.cut(self.allow) & (tile.behind(0) < self.count * (tile.batch + 1)) | (tile.key == 0)


def _learned(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


# By name: from a value to the arguments of a call, and the values, one compiled function after the other.
_CLOSURES: dict[str, tuple[Callable[[Any], dict[str, Any]], Sequence[Any]]] = {
    "mask over an integer": (lambda n: {"mask": mask.where(lambda b, h, i, j: (i - j).abs() <= n)}, (1, 2, 3, 5)),
    "mask over documents": (
        lambda ids: {"mask": mask.where(lambda b, h, i, j: ids[b, i] == ids[b, j])},
        [(torch.arange(_L) // n).expand(_B, -1) for n in (2, 3, 7)],
    ),
    "mask with a default": (lambda n: {"mask": mask.where(lambda b, h, i, j, m=n: (i - j).abs() <= m)}, (1, 2, 3)),
    "mask of partial": (lambda n: {"mask": mask.where(functools.partial(_near, reach=n))}, (1, 2, 3, 5)),
    "mask inside a mask": (
        lambda n: {"mask": mask.causal() & ~mask.where(lambda b, h, i, j: i - j == n)},
        (1, 2, 3),
    ),
    "mask class": (lambda n: {"mask": Dilated(n)}, (1, 2, 3)),
    "score over an integer": (lambda n: {"score": lambda q, k: q @ k.mT * n}, (1, 2, 3)),
    "score over a float": (lambda x: {"score": lambda q, k: q @ k.mT * x}, (0.1, 0.5, 0.7)),
    "score over a tensor": (lambda x: {"score": lambda q, k: q @ k.mT * x}, [torch.tensor(x) for x in (0.1, 0.5, 0.7)]),
    "score over a leaf": (lambda x: {"score": lambda q, k: q @ k.mT * x}, [_learned(x) for x in (0.1, 0.5, 0.7)]),
    "score over an attribute": (
        lambda module: {"score": lambda q, k: q @ k.mT * module.factor},
        [Scale(x) for x in (0.1, 0.5, 0.7)],
    ),
    "score over a parameter": (
        lambda module: {"score": lambda q, k: q @ k.mT * module.weight},
        [Scale(x) for x in (0.1, 0.5, 0.7)],
    ),
    "score of partial": (lambda x: {"score": functools.partial(_scaled, factor=x)}, (0.1, 0.5, 0.7)),
    "score of partial over a tensor": (
        lambda x: {"score": functools.partial(_scaled, times=x)},
        [_learned(x) for x in (0.1, 0.5, 0.7)],
    ),
    "score that is a module": (lambda module: {"score": module}, [Scale(x) for x in (0.1, 0.5, 0.7)]),
    "score that is a method": (lambda module: {"score": module.method}, [Scale(x) for x in (0.1, 0.5, 0.7)]),
    "score that is an object": (lambda thing: {"score": thing}, [Multiplied(x) for x in (0.1, 0.5, 0.7)]),
    "score class": (lambda x: {"score": Manhattan(x)}, (0.1, 0.5, 0.7)),
    "normalizer class of a closure": (lambda x: {"normalizer": _tempered(x)}, (0.1, 0.5, 2.0)),
    "normalizer over a function": (lambda x: {"normalizer": Applied(lambda s: s * x)}, (0.1, 0.5, 2.0)),
    "bias over a table": (
        lambda table: {"bias": lambda b, h, i, j: table[h, i - j + _L] * (b + 1)},
        [torch.linspace(0, x, _H * 2 * _L, dtype=torch.float64).view(_H, -1).requires_grad_() for x in (1.0, 2.0)],
    ),
    "bias that is a module": (lambda module: {"bias": module}, [Slopes(x) for x in (0.1, 0.5)]),
    "bias, mask and score": (
        lambda x: {
            "score": lambda q, k: q @ k.mT * x,
            "bias": lambda b, h, i, j: (i - j) * x * x,
            "mask": mask.where(lambda b, h, i, j: i >= j + h),
        },
        [_learned(x) for x in (0.1, 0.5)],
    ),
    "bias class": (lambda x: {"bias": Decay(x)}, [_learned(x) for x in (0.1, 0.5, 2.0)]),
    "bias class of tensors and a function": (
        lambda x: {"bias": Tabled(x, torch.arange(_H) / 10, lambda n: n.abs() * 0.5)},
        [torch.linspace(0, x, _H * _L, dtype=torch.float64).view(1, _H, 1, _L).requires_grad_() for x in (1.0, 2.0)],
    ),
    "mask classes": (
        lambda n: {"mask": (Listed(torch.arange(_L * _L).view(1, 1, _L, _L) % n > 0, n) | ~Dilated(n)) & mask.causal()},
        (2, 3, 5),
    ),
}


# Normalizers compute complete rows, of which there is no tile to record: `reference` serves them, and warns.
_MATERIALIZED = ("normalizer class of a closure", "normalizer over a function")


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, nn.Module):
        return list(value.parameters())
    return [value] if isinstance(value, Tensor) and value.requires_grad else []


def _check(name: str, backend: str, dynamic: bool | None, most: int = 9) -> None:
    """One compiled function, called with each of `most` values in turn, gives what the eager one gives, and the same gradients."""

    def eager(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Tensor:
        return regard.attention(q, k, v, **arguments)

    make, values = _CLOSURES[name]
    compiled = torch.compile(eager, fullgraph=True, backend=backend, dynamic=dynamic)
    for value in values[:most]:
        shapes = ((_B, _H, _L, _D), (_B, _G, _L, _D), (_B, _G, _L, _E))
        q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
        arguments = make(value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            got = compiled(q, k, v, arguments)
        want = eager(q, k, v, arguments)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        leaves, dout = [q, k, v, *_leaves(value)], torch.randn_like(want)
        grads = (torch.autograd.grad((out * dout).sum(), leaves, allow_unused=True) for out in (got, want))
        for got_grad, want_grad in zip(*grads, strict=True):
            assert (got_grad is None) == (want_grad is None)
            if want_grad is not None:
                torch.testing.assert_close(got_grad, want_grad, rtol=1e-9, atol=1e-9)


# Every third closure: compiling takes seconds, and `make test-all` takes all of them with all values.
@pytest.mark.parametrize("name", [*_CLOSURES][::3])
def test_closures_of_successive_calls(name: str) -> None:
    _check(name, "eager", None, most=2)  # `make test-all` takes all values


@pytest.mark.parametrize("name", ["mask of partial", "score over a leaf", "score over an attribute"])
def test_closures_with_dynamic_shapes(name: str) -> None:
    _check(name, "aot_eager", True, most=2)


def test_closures_in_inductor() -> None:
    _check("score of partial over a tensor", "inductor", None)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", _CLOSURES)
def test_closures_in_every_backend(name: str, backend: str, dynamic: bool | None) -> None:
    _check(name, backend, dynamic)


def test_inline_lambda_is_compiled() -> None:
    """The function is created in each call, as in the README."""

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return regard.attention(q, k, v, score=lambda q, k: -torch.cdist(q, k, p=1))

    q, k, v = (torch.randn(2, 3, 7, 4) for _ in range(3))
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), eager(q, k, v))
    torch.testing.assert_close(compiled(k, q, v), eager(k, q, v))


@pytest.mark.parametrize("dynamic", [False, True])
def test_reference_warns_once_with_bytes(dynamic: bool) -> None:
    def eager(q: Tensor, k: Tensor, v: Tensor, x: float) -> Tensor:
        return regard.attention(q, k, v, normalizer=Applied(lambda s: s * x))

    reference._warned.clear()
    q, k, v = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 11, 4), torch.randn(2, 3, 11, 4)
    compiled = torch.compile(eager, fullgraph=True, backend="eager", dynamic=dynamic)
    # Four bytes for each element of (2, 3, 7, 11).
    expected = r"the class Applied .* 1,848 bytes each \(B x H x L x S = 2 x 3 x 7 x 11\)"
    with pytest.warns(UserWarning, match=expected):
        compiled(q, k, v, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled(q, k, v, 0.7)
        eager(q, k, v, 0.5)


@pytest.mark.parametrize("backend", ["cpu", "tiled"])
def test_forced_fused_backend_raises(backend: str) -> None:
    make, values = _CLOSURES["normalizer class of a closure"]
    q, arguments = torch.randn(1, 2, 7, 4), make(values[0])

    def eager(q: Tensor) -> Tensor:
        return regard.attention(q, q, q, backend=backend, **arguments)

    with pytest.raises(Exception, match=r"cannot serve this problem: .* cannot be an operand of an operator"):
        torch.compile(eager, fullgraph=True, backend="eager")(q)


_QUICK = (
    "mask inside a mask", "score over a parameter", "score class", "bias over a table", "bias, mask and score",
    "mask classes", "bias class of tensors and a function",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow)
        for name in _CLOSURES
        if name not in _MATERIALIZED
    ],
)
def test_functions_are_compiled_in_linear_memory(name: str) -> None:
    """They run on `tiled`, by an operator that holds no matrix, and nothing warns."""
    make, values = _CLOSURES[name]
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    q, arguments = torch.randn(_B, _H, _L, _D, dtype=torch.float64), make(values[0])
    compiled = torch.compile(
        lambda q: regard.attention(q, q, q, **arguments), fullgraph=True, backend=aot_autograd(fw_compiler=keep)
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        compiled(q)
    [graph] = graphs
    [node] = [node for node in graph.graph.nodes if node.target is torch.ops.regard.forward.default]
    assert node.args[1] == "tiled"
    assert (
        max(node.meta["val"].numel() for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor))
        == q.numel()
    )


def test_one_graph_serves_all_lengths() -> None:
    ids, table = torch.arange(600) // 9, torch.randn(_H, 1200, dtype=torch.float64, requires_grad=True)

    def eager(q: Tensor, k: Tensor) -> Tensor:
        return regard.attention(
            q, k, k, score=lambda q, k: -torch.cdist(q, k, p=1), bias=lambda b, h, i, j: table[h, i - j + 600],
            mask=mask.where(lambda b, h, i, j: ids[i] == ids[j]),
        )  # fmt: skip

    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for L, S in ((70, 71), (131, 3), (5, 33), (64, 512), (65, 513)):
            q, k = torch.randn(_B, _H, L, _D, dtype=torch.float64), torch.randn(_B, _H, S, _D, dtype=torch.float64)
            results = [[out, *torch.autograd.grad(out.sum(), table)] for out in (compiled(q, k), eager(q, k))]
            for got, expected in zip(*results, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_function_holds_for_other_lengths(strict: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.slopes = Scale(0.5), Slopes(0.3)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            same = mask.where(lambda b, h, i, j: ids[b, i] == ids[b, j])
            return regard.attention(x, x, x, score=self.scale, bias=self.slopes, mask=same)

    model, length = Model().double(), torch.export.Dim("length", min=2, max=4096)
    inputs = [(torch.randn(2, _H, L, 8).double(), torch.arange(L).expand(2, -1) // 5) for L in (70, 13, 131)]
    program = torch.export.export(model, inputs[0], dynamic_shapes=({2: length}, {1: length}), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for x in inputs:
        torch.testing.assert_close(loaded(*x), model(*x), rtol=1e-9, atol=1e-9)
    loaded.scale.weight.data.fill_(2.0)  # parameters are operands
    model.scale.weight.data.fill_(2.0)
    torch.testing.assert_close(loaded(*inputs[1]), model(*inputs[1]), rtol=1e-9, atol=1e-9)


def test_random_function_is_refused() -> None:
    def eager(q: Tensor) -> Tensor:
        return regard.attention(q, q, q, score=lambda q, k: torch.dropout(q, 0.5, True) @ k.mT)

    with pytest.raises(Exception, match=r"the operation .*dropout.* cannot be part of a compiled graph in linear memory; "
                                        "backend='reference' compiles it"):  # fmt: skip
        torch.compile(eager, fullgraph=True, backend="aot_eager")(torch.randn(1, 2, 7, 4))
