"""Calls that are recorded, transformed or differentiated: no value of a tensor decides the path, and all derivatives exist."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import regard
from regard import Summary, mask, nn, normalizer, position, score, summary, tracing

_L, _S = 5, 7


@pytest.fixture(autouse=True)
def _warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=".*computed by backend='reference'")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def _qkv(dtype: torch.dtype = torch.float32, L: int = _L, S: int = _S) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, n, 4, dtype=torch.float64).to(dtype) for heads, n in ((4, L), (2, S), (2, S))]


# Calls of q, k, v and lengths n.
_CALLS: dict[str, Callable[..., Any]] = {
    "plain": lambda q, k, v, n: regard.attention(q, k, v),
    "causal": lambda q, k, v, n: regard.attention(q, k, v, mask=mask.causal("end")),
    "lengths": lambda q, k, v, n: regard.attention(q, k, v, mask=mask.lengths(n)),
    "documents": lambda q, k, v, n: regard.attention(
        q, k, v, mask=mask.documents((n[:, None] // torch.arange(1, 6), n[:, None] // torch.arange(1, 8)))
    ),
    "blocks": lambda q, k, v, n: regard.attention(q, k, v, mask=~mask.blocks(n[:, None, None, None] > torch.arange(3)[:, None])),
    "dense": lambda q, k, v, n: regard.attention(q, k, v, mask=mask.dense(n[:, None, None, None] > torch.arange(7))),
    "where": lambda q, k, v, n: regard.attention(q, k, v, mask=mask.where(lambda b, h, i, j: j < n[b])),
    "function": lambda q, k, v, n: regard.attention(q, k, v, score=lambda a, b: a @ b.mT / n.max(), mask=mask.lengths(n)),
    "gaussian": lambda q, k, v, n: regard.attention(q, k, v, score=score.Gaussian(2.0), mask=mask.lengths(n)),
    "entmax": lambda q, k, v, n: regard.attention(q, k, v, normalizer=normalizer.Entmax(1.5), mask=mask.lengths(n)),
    "sigmoid": lambda q, k, v, n: regard.attention(q, k, v, normalizer=normalizer.Sigmoid(-1.0), softcap=2.0),
    "alibi": lambda q, k, v, n: regard.attention(q, k, v, bias=position.ALiBi(align="end"), mask=mask.lengths(n)),
    "summary": lambda q, k, v, n: _flat(
        regard.attention(
            q, k, v, mask=mask.lengths(n),
            summary=Summary(lse=True, entropy=True, received=True, rows=-1, mass=summary.groups(torch.arange(7) % 2, 2)),
        )
    ),
}  # fmt: skip


def _flat(result: Any) -> Tensor:
    out, stats = result
    return torch.cat([x.flatten() for x in (out, *stats) if isinstance(x, Tensor)])


_LENGTHS = [torch.tensor([3, 7]), torch.tensor([7, 1]), torch.tensor([0, 7])]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", _CALLS)
def test_make_fx_graph_holds_for_other_values(name: str, mode: str) -> None:
    q, k, v = _qkv()
    graph = make_fx(_CALLS[name], tracing_mode=mode)(q, k, v, _LENGTHS[0])
    for n in _LENGTHS:
        torch.testing.assert_close(graph(q, k, v, n), _CALLS[name](q, k, v, n))
    k[0, :, 5] = torch.nan
    torch.testing.assert_close(graph(q, k, v, _LENGTHS[0]), _CALLS[name](q, k, v, _LENGTHS[0]), equal_nan=True)


@pytest.mark.parametrize("name", _CALLS)
def test_jit_trace_holds_for_other_values(name: str) -> None:
    q, k, v = _qkv()
    traced = torch.jit.trace(_CALLS[name], (q, k, v, _LENGTHS[0]), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for n in _LENGTHS:
        torch.testing.assert_close(loaded(q, k, v, n), _CALLS[name](q, k, v, n), rtol=1e-4, atol=1e-5)
    leaf = q.clone().requires_grad_()
    expected = torch.autograd.grad(_CALLS[name](leaf, k, v, _LENGTHS[0]).square().sum(), leaf)[0]
    got = torch.autograd.grad(loaded(leaf, k, v, _LENGTHS[0]).square().sum(), leaf)[0]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", _CALLS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_of_tensors_without_values(name: str, device: str) -> None:
    expected = _CALLS[name](*_qkv(), _LENGTHS[0])
    with FakeTensorMode():
        inputs = [torch.empty(x.shape, device=device, requires_grad=True) for x in _qkv()]
        out = _CALLS[name](*inputs, torch.empty(2, dtype=torch.int64, device=device)) if device == "cpu" else None
    if out is None:
        if name in ("documents", "blocks", "dense", "function", "where"):
            return  # they compute with tensors on the CPU
        inputs = [torch.empty(x.shape, device=device, requires_grad=True) for x in _qkv()]
        members = name == "summary"
        out = expected if members else _CALLS[name](*inputs, torch.empty(2, dtype=torch.int64, device=device))
        if members:
            return
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


@pytest.mark.parametrize("name", [name for name in _CALLS if name not in ("where", "function")])
def test_vmap_of_gradients_matches_loop(name: str) -> None:
    """One example per element, each with its own length."""
    q, k, v = _qkv()

    def loss(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        return _CALLS[name](q[None], k[None], v[None], n[None]).square().sum()

    def alone(b: int, n: Tensor) -> tuple[Tensor, ...]:
        leaves = [x[b : b + 1].clone().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(_CALLS[name](*leaves, n[b : b + 1]).square().sum(), leaves)

    for n in _LENGTHS:
        got = vmap(grad(loss, (0, 1, 2)))(q, k, v, n)
        expected = [torch.cat(parts) for parts in zip(*[alone(b, n) for b in range(2)], strict=True)]
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Layers.


def _layers() -> dict[str, tuple[torch.nn.Module, Callable[[torch.nn.Module, Tensor, Tensor], Tensor]]]:
    """Layers, and calls of them with x (2, 6, 8) and padding (2, 6), True = padding."""
    torch.manual_seed(1)
    return {
        "multihead": (
            nn.MultiheadAttention(8, 2, batch_first=True),
            lambda m, x, pad: m(x, x, x, key_padding_mask=pad, need_weights=False)[0],
        ),
        "float padding": (
            nn.MultiheadAttention(8, 2, batch_first=True),
            lambda m, x, pad: m(
                x, x, x, key_padding_mask=torch.zeros_like(pad, dtype=x.dtype).masked_fill(pad, -torch.inf)
            )[0],
        ),
        "block": (nn.AttentionBlock(8, 2, 0.0), lambda m, x, pad: m(x, mask=(~pad)[:, None, None].int())),
        "rotary": (
            nn.MultiheadAttention(8, 2, batch_first=True, position=position.Rotary(4)),
            lambda m, x, pad: m(x, x, x, key_padding_mask=pad, is_causal=True, need_weights=False)[0],
        ),
        "pooling": (nn.AttentionPooling(8, 2), lambda m, x, pad: m(x, mask=mask.lengths((~pad).sum(-1)))),
        "replaced": (
            nn.replace_attention(torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)),
            lambda m, x, pad: m(x, src_key_padding_mask=pad),
        ),
    }


_PADDING = [
    torch.tensor([[False] * 6, [False] * 4 + [True] * 2]),
    torch.tensor([[True] + [False] * 5, [False] * 6]),
    torch.zeros(2, 6, dtype=torch.bool),
]


@pytest.mark.parametrize("name", _layers())
def test_traced_layer_holds_for_other_padding(name: str) -> None:
    layer, call = _layers()[name]
    layer.eval()

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, pad: Tensor) -> Tensor:
            return call(self.layer, x, pad)

    module, x = Module().eval(), torch.randn(2, 6, 8)
    with torch.no_grad():
        graphs = [
            torch.jit.trace(module, (x, _PADDING[0]), check_trace=False),
            make_fx(module)(x, _PADDING[0]),
            torch.export.export(module, (x, _PADDING[0])).module(),
        ]
        for pad in _PADDING:
            for graph in graphs:
                torch.testing.assert_close(graph(x, pad), module(x, pad), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in _layers() if name != "replaced"])
def test_vmap_of_gradients_of_layer_matches_loop(name: str) -> None:
    layer, call = _layers()[name]
    layer.eval()
    x, parameters = torch.randn(2, 6, 8), dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor, pad: Tensor) -> Tensor:
        def run(*arguments: Any, **options: Any) -> Any:
            return functional_call(layer, parameters, arguments, options)

        return call(run, x[None], pad[None]).square().sum()  # type: ignore[arg-type]

    for pad in _PADDING:
        got = vmap(grad(loss), (None, 0, 0))(parameters, x, pad)
        for b in range(2):
            out = call(layer, x[b : b + 1], pad[b : b + 1])
            expected = torch.autograd.grad(out.square().sum(), list(parameters.values()), allow_unused=True)
            for key, value in zip(parameters, expected, strict=True):
                if value is not None:
                    torch.testing.assert_close(got[key][b], value, rtol=1e-3, atol=1e-5)


def test_rotary_moves_over_meta() -> None:
    rotary = position.Rotary(8)
    moved = position.Rotary(8).to("meta").to_empty(device="cpu")
    moved.load_state_dict(rotary.state_dict())
    with torch.device("meta"):
        made = position.Rotary(8)
    made.to_empty(device="cpu").load_state_dict(rotary.state_dict())
    q = torch.randn(1, 2, 5, 8)
    for other in (moved, made):
        torch.testing.assert_close(other(q, q), rotary(q, q))


# ---------------------------------------------------------------------------------------------------------------------
# Exporters.


@pytest.mark.parametrize("name", _layers())
def test_onnx_export_matches_module(name: str, tmp_path: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer, call = _layers()[name]

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, pad: Tensor) -> Tensor:
            return call(self.layer, x, pad)

    module, x, path = Module().eval(), torch.randn(2, 6, 8), tmp_path / "layer.onnx"
    with torch.no_grad():
        torch.onnx.export(module, (x, _PADDING[0]), path, dynamo=True, verbose=False)
        session = runtime.InferenceSession(path)
        for pad in _PADDING:
            inputs = {node.name: value.numpy() for node, value in zip(session.get_inputs(), (x, pad), strict=True)}
            torch.testing.assert_close(
                torch.from_numpy(session.run(None, inputs)[0]), module(x, pad), rtol=1e-4, atol=1e-5
            )


def test_exported_reference_holds_operators_of_torch_only() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, n: Tensor) -> Tensor:
            return regard.attention(q, q, q, mask=mask.lengths(n), softcap=3.0, backend="reference")

    q, n = torch.randn(2, 4, 6, 8), torch.tensor([3, 6])
    program = torch.export.export(Module(), (q, n))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets
    assert not [name for name in targets if "regard" in name]
    for n in (torch.tensor([3, 6]), torch.tensor([0, 2])):
        torch.testing.assert_close(program.module()(q, n), Module()(q, n))


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives.

_BACKENDS = ("cpu", "sdpa", "tiled", "reference")


def _smooth(backend: str | None, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Tensor, list[Tensor]]:
    """Return attention as a function of q, and q, on a backend that serves it."""
    q, k, v = _qkv(dtype)
    options: dict[str, Any] = {} if backend == "sdpa" else {"mask": mask.causal("end"), "bias": position.ALiBi()}
    if backend == "sdpa":
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    return lambda q: regard.attention(q, k, v, backend=backend, **options), q, [k, v]


def _exact(backend: str | None, f: Callable[[Callable[[Tensor], Tensor], Tensor], Any]) -> Any:
    """Return a derivative in float64 by the formula, materialized."""
    q, k, v = _qkv(torch.float64)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    behind = torch.arange(_L)[:, None] + _S - _L - torch.arange(_S)
    slopes = torch.tensor(position.alibi_slopes(4), dtype=torch.float64)[:, None, None]

    def attend(q: Tensor) -> Tensor:
        s = q @ k.mT / 2
        if backend != "sdpa":
            s = (s - slopes * behind.abs()).masked_fill(behind < 0, -torch.inf)
        return s.softmax(-1) @ v

    return f(attend, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", [None, *_BACKENDS])
def test_second_derivatives(backend: str | None, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype == torch.float64:
        return  # it computes in float32
    attend, q, _ = _smooth(backend, dtype)

    def second(attend: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
        leaf = q.clone().requires_grad_()
        (first,) = torch.autograd.grad(attend(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), leaf)[0]

    torch.testing.assert_close(second(attend, q).double(), _exact(backend, second), rtol=1e-3, atol=1e-4)
    nested = grad(lambda q: grad(lambda q: attend(q).pow(3).sum())(q).pow(2).sum())(q)
    torch.testing.assert_close(nested.double(), _exact(backend, second), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", [None, *_BACKENDS])
def test_batched_gradients(backend: str | None) -> None:
    attend, q, _ = _smooth(backend, torch.float32)
    leaf = q.clone().requires_grad_()
    out = attend(leaf)
    weights = torch.randn(3, *out.shape)
    got = torch.autograd.grad(out, leaf, weights, is_grads_batched=True, retain_graph=True)[0]
    expected = torch.stack([torch.autograd.grad(out, leaf, w, retain_graph=True)[0] for w in weights])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    rows = torch.autograd.functional.jacobian(lambda x: attend(x).sum((0, 1, 3)), q, vectorize=True)
    torch.testing.assert_close(rows, torch.autograd.functional.jacobian(lambda x: attend(x).sum((0, 1, 3)), q))


@pytest.mark.parametrize("backend", ["tiled", "sdpa", "reference"])
def test_gradcheck_batched(backend: str) -> None:
    q = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def attend(q: Tensor) -> Tensor:
        return regard.attention(q, q, q, backend=backend)

    assert torch.autograd.gradcheck(attend, (q,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(attend, (q,), check_batched_grad=backend != "reference")


def test_forward_mode_runs_on_reference() -> None:
    attend, q, _ = _smooth(None, torch.float32)
    tangent = torch.randn_like(q)
    with regard.record_backends() as ran:
        out, moved = jvp(attend, (q,), (tangent,))
    assert ran == ["reference"]
    torch.testing.assert_close(out, attend(q))
    expected = _exact(None, lambda f, q: jvp(f, (q,), (tangent.double(),))[1])
    torch.testing.assert_close(moved.double(), expected, rtol=1e-4, atol=1e-5)
    small = q[:1, :, :2]

    def first(q: Tensor) -> Tensor:
        return regard.attention(q, q, q).pow(2).sum()

    torch.testing.assert_close(jacfwd(first)(small), jacrev(first)(small), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hessian(first)(small), jacrev(jacrev(first))(small), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "sdpa", "tiled"])
def test_forward_mode_on_other_backend_names_reference(backend: str) -> None:
    attend, q, _ = _smooth(backend, torch.float32)
    with pytest.raises(ValueError, match="forward-mode derivatives are taken, which only backend='reference' has"):
        jvp(attend, (q,), (q,))


def test_sdpa_saves_tensors_as_autograd_does() -> None:
    """Activation checkpointing, and hooks of saved tensors, see the graph inside."""
    q = torch.randn(1, 2, 64, 8, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        out = regard.attention(q, q, q, backend="sdpa")
    assert len(saved) >= 3
    torch.autograd.grad(out.sum(), q, retain_graph=True)
    first = torch.autograd.grad(out.sum(), q)[0]
    checkpointed = torch.utils.checkpoint.checkpoint(lambda q: regard.attention(q, q, q), q, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(checkpointed.sum(), q)[0], first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out.sum(), q)
    out = regard.attention(q, q, q, backend="sdpa")
    with torch.no_grad():
        q.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), q)


def test_has_values() -> None:
    x = torch.zeros(2)
    assert tracing.has_values(x)
    assert not tracing.has_values(x.to("meta"))
    found = []
    vmap(lambda x: found.append(tracing.has_values(x)) or x)(x)  # type: ignore[func-returns-value]
    grad(lambda x: found.append(tracing.has_values(x)) or x.sum())(x)  # type: ignore[func-returns-value]
    assert found == [False, True]
