"""torch.compile with the whole call in one graph, and torch.export: run, saved, loaded and run again."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import ROOT
from torch import Tensor, nn

import regard
from regard import Summary, mask, normalizer, position, score, summary
from regard.components.normalizer import _NORMALIZERS
from regard.components.position import _BIASES
from regard.components.score import _SCORES

_KERNELS = ("tiled", "reference")
_H, _D = 4, 8


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    # In double precision, equal results differ by rounding only, in whatever order they are summed.
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch._dynamo.reset()


def _qkv(L: int = 70, S: int = 70) -> list[Tensor]:
    shapes = ((2, _H, L, _D), (2, 2, S, _D), (2, 2, S, 5))
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


def _flat(answer: Any) -> list[Tensor]:
    if isinstance(answer, Tensor):
        return [answer]
    out, seen = answer
    found = [out, *(x for x in seen if isinstance(x, Tensor))]
    return found if seen.top is None else [*found, *seen.top]


def _gradients(found: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    outputs = [x for x in found if x.is_floating_point()]
    total = sum(x.where(x.isfinite(), 0.0).square().sum() for x in outputs)
    return list(torch.autograd.grad(total, leaves))  # type: ignore[arg-type]


def _same(
    compiled: Callable[..., Any], eager: Callable[..., Any], *x: Tensor, parameters: tuple[Tensor, ...] = ()
) -> None:
    found, told = _flat(compiled(*x)), _flat(eager(*x))
    leaves = [y for y in (*x, *parameters) if y.requires_grad]
    pairs = [*zip(found, told, strict=True)]
    if leaves:
        pairs += zip(_gradients(found, leaves), _gradients(told, leaves), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def _allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i + j + h) % 3 != 0


def _matched(q: Tensor, k: Tensor) -> Tensor:
    return torch.cos(q @ k.mT)


def _words() -> dict[str, dict[str, Any]]:
    """Return compiled calls by name; every component of the tables is in one of them."""
    torch.manual_seed(7)
    words: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"mask": mask.causal()},
        "window and lengths": {"mask": mask.window(5, 3) & mask.lengths(torch.tensor([70, 20]))},
        "documents": {"mask": mask.documents(torch.arange(70) // 20)},
        "blocks": {"mask": mask.blocks(torch.rand(5, 5) < 0.6, 16)},
        "dense or not prefix": {"mask": mask.dense(torch.rand(70, 70) < 0.3) | ~mask.prefix(11)},
        "where": {"mask": mask.where(_allowed)},
        "bias": {"bias": torch.randn(_H, 1, 70)},
        "softcap": {"softcap": 2.5},
        "dropout": {"dropout": 0.5, "seed": 3},
        "summaries": {
            "summary": Summary(True, True, True, 3, True, summary.groups(torch.arange(70) % 4), (0, -1), True),
            "mask": mask.causal(),
        },
        "function": {"score": _matched},
    }
    for name, kind in _SCORES.items():
        words[f"score {name}"] = {"score": kind.example(_H, _D)}
    for name, kind in _NORMALIZERS.items():
        words[f"normalizer {name}"] = {"normalizer": kind.example(_H)}
    for name, kind in _BIASES.items():
        words[f"bias {name}"] = {"bias": kind.example(_H)}
    return words


# `reference`, whose operations are all traced, takes a second per call: `make test` compiles some.
_QUICK = ("plain", "causal", "summaries", "score additive", "normalizer entmax", "bias t5", "where")
_ONE_GRAPH = [("tiled", name) for name in _words()] + [
    pytest.param("reference", name, marks=() if name in _QUICK else pytest.mark.slow) for name in _words()
]


@pytest.mark.parametrize(("kernel", "name"), _ONE_GRAPH)
def test_one_graph(kernel: str, name: str) -> None:
    words = _words()[name]

    def eager(*x: Tensor) -> Any:
        return regard.attention(*x, backend=kernel, **words)

    _same(torch.compile(eager, fullgraph=True, backend="aot_eager"), eager, *_qkv())


@pytest.mark.parametrize("kernel", _KERNELS)
def test_gradients_of_parameters(kernel: str) -> None:
    W, sink, slopes = torch.randn(_H, _D, _D, requires_grad=True), torch.randn(_H, requires_grad=True), torch.rand(_H)
    slopes.requires_grad_()

    def eager(*x: Tensor) -> Any:
        words = {"score": score.Bilinear(W), "normalizer": normalizer.Softmax(sink), "bias": position.ALiBi(slopes)}
        return regard.attention(*x, backend=kernel, **words)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    _same(compiled, eager, *_qkv(), parameters=(W, sink, slopes))


class Layer(nn.Module):
    """A layer with linear maps, a mask made from an input, a learned sink and a summary."""

    def __init__(self, kernel: str | None = "tiled") -> None:
        super().__init__()
        self.maps, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.sink, self.kernel = nn.Parameter(torch.zeros(_H)), kernel

    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (_H, -1)).transpose(1, 2) for y in self.maps(x).chunk(3, -1))
        out, seen = regard.attention(
            q, k, v, mask=mask.causal() & mask.lengths(n), normalizer=normalizer.Softmax(self.sink),
            summary=Summary(entropy=True), backend=self.kernel,
        )  # fmt: skip
        return self.out(out.transpose(1, 2).flatten(2)), seen.entropy


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layer(kernel: str, backend: str) -> None:
    layer = Layer(kernel)
    x, n = torch.randn(2, 70, 16), torch.tensor([70, 13])
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    found, told = compiled(x, n), layer(x, n)
    leaves = list(layer.parameters())
    pairs = zip((*found, *_gradients([*found], leaves)), (*told, *_gradients([*told], leaves)), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", ["tiled"])
@pytest.mark.parametrize(
    "name",
    [
        "window",
        "summaries",
        "function",
        *[pytest.param(x, marks=pytest.mark.slow) for x in ("plain", "bias alibi", "score distance")],
    ],
)
def test_no_compilation_per_length(kernel: str, name: str) -> None:
    words = {"window": {"mask": mask.window(5, 3, "end") & mask.causal("end")}, **_words()}[name]
    words = {**words, "summary": Summary(lse=True, top=2, received=True)} if name == "summaries" else words

    def eager(*x: Tensor) -> Any:
        return regard.attention(*x, backend=kernel, **words)

    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for L in (70, 131, 33, 5):
            _same(compiled, eager, *_qkv(L, L))


@pytest.mark.parametrize("kernel", _KERNELS)
def test_compiled_dropout_draws_new_seeds(kernel: str) -> None:
    compiled = torch.compile(
        lambda *x: regard.attention(*x, dropout=0.5, backend=kernel), fullgraph=True, backend="aot_eager"
    )
    x = _qkv()
    torch.manual_seed(1)
    first, second = compiled(*x), compiled(*x)
    torch.manual_seed(1)
    assert torch.equal(compiled(*x), first)
    assert not torch.equal(first, second)


def test_masked_nan_does_not_leak_in_compiled_call() -> None:
    q, k, v = (x.detach() for x in _qkv())
    k[1, :, 20:], v[1, :, 20:] = torch.nan, torch.inf

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return regard.attention(q, k, v, mask=mask.lengths(torch.tensor([70, 20])), backend="tiled")

    x = [y.requires_grad_() for y in (q, k, v)]
    _same(torch.compile(eager, fullgraph=True, backend="aot_eager"), eager, *x)
    assert eager(*x).isfinite().all()


class Matched(nn.Module):
    """A layer whose score is an inline function that calls a submodule."""

    def __init__(self, kernel: str | None, normalizer: normalizer.Normalizer | None = None) -> None:
        super().__init__()
        self.map, self.kernel, self.normalizer = nn.Linear(_D, _D), kernel, normalizer

    def forward(self, *x: Tensor) -> Any:
        words = {"mask": mask.causal(), "normalizer": self.normalizer, "kernel": self.kernel}
        return regard.attention(*x, score=lambda q, k: torch.tanh(self.map(q)) @ k.mT, **words)


@pytest.mark.parametrize("kernel", [None, pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", _NORMALIZERS)
def test_compiled_function_keeps_its_closure(kernel: str | None, name: str) -> None:
    layer = Matched(kernel, _NORMALIZERS[name].example(_H))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    _same(compiled, layer, *_qkv(), parameters=tuple(layer.parameters()))
    program = torch.export.export(layer, tuple(_qkv()))
    _same(program.module(), layer, *(x.detach() for x in _qkv()))


def test_forced_native_backend_rejects_compiled_function() -> None:
    layer = Matched("cpu")
    with pytest.raises(Exception, match="it does not support the score FunctionScore"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(*(x.float() for x in _qkv()))


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_compiled_call_recompiles_for_other_function(kernel: str | None) -> None:
    """Two functions in turn go through the same compiled function."""

    def eager(q: Tensor, k: Tensor, v: Tensor, function: Callable[..., Tensor]) -> Any:
        return regard.attention(q, k, v, score=function, backend=kernel)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    x = _qkv()
    for function in (_matched, lambda q, k: 2 * (q @ k.mT)):
        torch.testing.assert_close(compiled(*x, function), eager(*x, function))


# ---------------------------------------------------------------------------------------------------------------------
# Export.


class Called(nn.Module):
    """A call as a module."""

    def __init__(self, kernel: str | None, words: dict[str, Any]) -> None:
        super().__init__()
        self.kernel, self.words = kernel, words

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return tuple(_flat(regard.attention(q, k, v, backend=self.kernel, **self.words)))


# Every component by the default backend, some by the other, and some traced by the compiler (`strict`).
_EXPORTED = [("tiled", False, name) for name in _words()]
_EXPORTED += [
    ("tiled", True, "where"),
    ("tiled", True, "function"),
    ("reference", False, "summaries"),
    ("tiled", True, "summaries"),
    ("tiled", True, "window and lengths"),
]


@pytest.mark.parametrize(("kernel", "strict", "name"), _EXPORTED)
def test_export_save_load(kernel: str, strict: bool, name: str) -> None:
    module = Called(kernel, _words()[name])
    x = tuple(y.detach() for y in _qkv())
    told = module(*x)
    program = torch.export.export(module, x, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for loaded in (program, torch.export.load(file)):
        for got, expected in zip(loaded.module()(*x), told, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_export_of_layer_with_dynamic_shapes() -> None:
    layer = Layer().eval()
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=4096)
    x, n = torch.randn(2, 70, 16), torch.tensor([70, 13])
    program = torch.export.export(layer, (x, n), dynamic_shapes=({0: batch, 1: length}, {0: batch}))
    for other in ((torch.randn(5, 33, 16), torch.tensor([33, 1, 0, 12, 7])), (x, n)):
        for got, expected in zip(program.module()(*other), layer(*other), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


_LOAD = """
import sys, torch, regard
torch.set_default_dtype(torch.float64)
program = torch.export.load(sys.argv[1])
torch.manual_seed(0)
x = [torch.randn(2, 4, 70, 8), torch.randn(2, 2, 70, 8), torch.randn(2, 2, 70, 5)]
torch.save(program.module()(*x), sys.argv[2])
"""


def test_exported_program_runs_in_another_process(tmp_path: Path) -> None:
    words = {"mask": mask.causal() & mask.window(9, None), "score": score.Additive(torch.randn(_D)), "softcap": 3.0}
    torch.manual_seed(0)
    x = (torch.randn(2, 4, 70, 8), torch.randn(2, 2, 70, 8), torch.randn(2, 2, 70, 5))
    _check_saved(Called("tiled", words), x, tmp_path)


def _check_saved(module: nn.Module, x: tuple[Tensor, ...], tmp_path: Path) -> None:
    """A module that is exported, saved and loaded in another process gives the same outputs, for x drawn from seed 0."""
    torch.export.save(torch.export.export(module, x), tmp_path / "program.pt2")
    paths = [str(tmp_path / "program.pt2"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", _LOAD, *paths], check=True, timeout=120, cwd=ROOT)
    for got, expected in zip(torch.load(paths[1]), module(*x), strict=True):
        torch.testing.assert_close(got, expected)


def test_exported_function_runs_in_another_process(tmp_path: Path) -> None:
    """A Python function is traced into the program."""
    module = Called(None, {"score": _matched})
    x = (torch.randn(2, 4, 70, 8), torch.randn(2, 2, 70, 8), torch.randn(2, 2, 70, 5))
    _check_saved(module, x, tmp_path)
