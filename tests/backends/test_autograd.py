"""Derivatives of every order and direction, and the transforms of torch.func, on the backends that support them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import regard
from regard import Summary, mask, normalizer, position, score
from regard.components.normalizer import _NORMALIZERS
from regard.components.score import _SCORES

_KERNELS = ("reference", "tiled")
_B, _H, _G, _L, _S, _D, _E = 2, 2, 1, 3, 4, 2, 3
Function = Callable[..., Any]


def _inputs(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((_B, _H, _L, _D), (_B, _G, _S, _D), (_B, _G, _S, _E))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def _word(word: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """Return the parameters of a component as float64 leaves, and a function that makes the component of other tensors."""
    fields = {name: x for name, x in vars(word).items()}
    names = [name for name, x in fields.items() if isinstance(x, Tensor)]
    tensors = [fields[name].detach().double().requires_grad_() for name in names]
    return tensors, lambda given: type(word)(**{**fields, **dict(zip(names, given, strict=True))})


def _example(table: dict[str, Any], name: str) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    torch.manual_seed(1)
    return _word(table[name].example(_H, _D) if table is _SCORES else table[name].example(_H))


def _scored(name: str, kernel: str) -> tuple[list[Tensor], Function]:
    """Attention with a score, under a mask and with summaries, as a function of all of its tensors."""
    tensors, make = _example(_SCORES, name)

    def function(q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        out, seen = regard.attention(
            q,
            k,
            v,
            score=make(list(parameters)),
            mask=mask.causal("end"),
            summary=Summary(lse=True, entropy=True),
            backend=kernel,
        )
        return out, seen.lse, seen.entropy

    return [*_inputs(), *tensors], function


def _normalized(name: str, kernel: str) -> tuple[list[Tensor], Function]:
    """Attention with a normalizer, a learned bias and a softcap, as a function of all of its tensors."""
    tensors, make = _example(_NORMALIZERS, name)
    bias = torch.randn(_H, 1, _S, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        out, seen = regard.attention(
            q, k, v, normalizer=make(list(parameters)), bias=bias, softcap=4.0, summary=Summary(received=True, rows=(0,)),
            backend=kernel,
        )  # fmt: skip
        return out, seen.received, seen.rows

    return [*_inputs(), bias, *tensors], function


_CASES = {f"score: {n}": (_scored, n) for n in _SCORES} | {f"normalizer: {n}": (_normalized, n) for n in _NORMALIZERS}


def _case(name: str, kernel: str) -> tuple[list[Tensor], Function]:
    build, word = _CASES[name]
    return build(word, kernel)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd.


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.parametrize("name", _CASES)
def test_first_derivatives(kernel: str, name: str) -> None:
    tensors, function = _case(name, kernel)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.parametrize("name", _CASES)
def test_second_derivatives(kernel: str, name: str) -> None:
    """Second derivatives of `tiled` are those of `reference`."""
    tensors, function = _case(name, kernel)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("name", _CASES)
def test_forward_mode(name: str) -> None:
    tensors, function = _case(name, "reference")
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_forward_ad=True, check_backward_ad=False)


def test_forward_mode_raises_for_fused_backends() -> None:
    q, k, v = (x.detach() for x in _inputs())
    with pytest.raises(ValueError, match="forward-mode"):
        jvp(lambda q: regard.attention(q, k, v, backend="tiled"), (q,), (q,))


@pytest.mark.parametrize("kernel", _KERNELS)
def test_third_derivatives(kernel: str) -> None:
    q, k, v = _inputs()

    def third(kernel: str) -> Tensor:
        out = regard.attention(q, k, v, backend=kernel).pow(2).sum()
        for _ in range(2):
            (first,) = torch.autograd.grad(out, q, create_graph=True)
            out = first.pow(2).sum()
        return torch.autograd.grad(out, q)[0]

    torch.testing.assert_close(third(kernel), third("reference"))


@pytest.mark.parametrize("kernel", _KERNELS)
def test_gradients_are_computed_only_where_required(kernel: str) -> None:
    q, k, v = (x.detach() for x in _inputs())
    W = torch.randn(_D, _D, dtype=torch.float64, requires_grad=True)
    out = regard.attention(q, k, v.requires_grad_(), score=score.Bilinear(W.detach()), backend=kernel)
    out.sum().backward()
    assert v.grad is not None
    assert q.grad is None
    assert W.grad is None
    assert not regard.attention(q, k, v.detach(), backend=kernel).requires_grad


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.parametrize("sink", [None, 0.0])
def test_gradient_of_large_log_sum_exp_is_accurate(kernel: str, sink: float | None) -> None:
    """The gradient is the softmax, whose sum has no rounding error of the size of the scores'."""
    k = 1000 + torch.randn(9, 31, 1, generator=torch.Generator().manual_seed(0))
    words = {"score": score.Dot(), "normalizer": normalizer.Softmax(sink), "summary": Summary(lse=True)}
    _, seen = regard.attention(k.new_ones(9, 1, 1), k.requires_grad_(), k.detach(), backend=kernel, **words)
    (found,) = torch.autograd.grad(seen.lse.sum(), k)
    torch.testing.assert_close(found, k.detach().softmax(1), rtol=1e-6, atol=0.0)


# Components with one scalar each.
_OF_A_NUMBER: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "sink": lambda x: {"normalizer": normalizer.Softmax(x)},
    "bias of the sigmoid": lambda x: {"normalizer": normalizer.Sigmoid(x)},
    "temperature": lambda x: {"score": score.Cosine(x)},
    "sigma": lambda x: {"score": score.Gaussian(x)},
    "bias": lambda x: {"bias": x, "normalizer": normalizer.Sigmoid()},
    "function": lambda x: {"score": lambda q, k: torch.tanh(q @ k.mT * x)},
}


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", _OF_A_NUMBER)
def test_gradients_are_accumulated_before_rounding(
    name: str, dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of a scalar is a sum over many row blocks whose terms nearly cancel."""
    if name == "function" and torch.finfo(dtype).bits == 16:
        pytest.skip("a function computes with its own tensor, whose gradient autograd rounds strip by strip")
    monkeypatch.setattr("regard.backends.tiled.row_block._BLOCK_SIZE", 2000)
    L, wide = 512, torch.promote_types(dtype, torch.float32)
    q, k, v = (torch.randn(2, 4, n, 5, generator=torch.Generator().manual_seed(i)) for i, n in enumerate((L, 96, 96)))
    pull = torch.where(torch.arange(L) < L // 2, 1.0, -1.0)

    def gradient(kernel: str, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
        x = torch.tensor(0.6875, dtype=dtype, requires_grad=True)
        given = (y.to(wide) for y in (q, k, v.abs()))
        out, seen = regard.attention(*given, backend=kernel, summary=Summary(lse=True), **_OF_A_NUMBER[name](x))
        loss = ((out.sum((0, 1, 3)) + 4 * seen.lse.sum((0, 1))) * pull).sum()
        return torch.autograd.grad(loss, x)[0]

    found, told = gradient(kernel, dtype, wide), gradient("reference", torch.float64, torch.float64)
    assert found.dtype == dtype
    # One rounding to `dtype`, and the sum, which is far smaller than its terms, in the precision of the backend.
    rounded = 0.5 * torch.finfo(dtype).eps + 2000 * torch.finfo(wide).eps
    torch.testing.assert_close(found.double(), told, rtol=rounded, atol=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# torch.func.


def _plain(kernel: str, **words: Any) -> Function:
    return lambda q, k, v: regard.attention(q, k, v, mask=mask.causal("end"), backend=kernel, **words)


_WORDS: dict[str, dict[str, Any]] = {
    "dot": {},
    "entmax": {"normalizer": normalizer.Entmax(1.5)},
    "sink": {"normalizer": normalizer.Softmax(torch.zeros(_H, dtype=torch.float64))},
    "additive": {"score": score.Additive(torch.randn(_D, dtype=torch.float64))},
    "distance": {"score": score.Distance()},
    "function": {"score": lambda q, k: torch.cos(q @ k.mT)},
    "dropout": {"dropout": 0.5, "seed": 1},
    "bias": {"bias": position.ALiBi(), "softcap": 2.0},
}


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.parametrize("name", _WORDS)
@pytest.mark.parametrize("axes", [(0, 0, 0), (1, None, None), (None, 2, 0), (3, 0, None)])
def test_vmap(kernel: str, name: str, axes: tuple[int | None, ...]) -> None:
    function = _plain(kernel, **_WORDS[name])
    stacks = [torch.stack([x[i].detach() for x in map(_inputs, range(5))], axis or 0) for i, axis in enumerate(axes)]
    given = [x.select(0, 0) if axis is None else x for x, axis in zip(stacks, axes, strict=True)]

    def one(i: int) -> list[Tensor]:
        return [x if axis is None else x.select(axis, i) for x, axis in zip(given, axes, strict=True)]

    torch.testing.assert_close(vmap(function, axes)(*given), torch.stack([function(*one(i)) for i in range(5)]))
    # vmap of each gradient, and the gradient of the vmapped function.
    gradient = grad(lambda *x: function(*x).square().sum(), (0, 1, 2))
    expected = [torch.stack(parts) for parts in zip(*(gradient(*one(i)) for i in range(5)), strict=True)]
    for got, told in zip(vmap(gradient, axes)(*given), expected, strict=True):
        torch.testing.assert_close(got, told)
    total = grad(lambda *x: vmap(function, axes)(*x).square().sum(), (0, 1, 2))(*given)
    for got, told, axis in zip(total, expected, axes, strict=True):
        torch.testing.assert_close(got, told.sum(0) if axis is None else told.movedim(0, axis))


@pytest.mark.parametrize("kernel", _KERNELS)
def test_vmap_of_vmap_with_summaries(kernel: str) -> None:
    q, k, v = (x.detach() for x in _inputs())
    qs = torch.stack([torch.stack([q * i + j for j in range(1, 4)]) for i in range(1, 3)])

    def function(q: Tensor) -> tuple[Tensor, ...]:
        out, seen = regard.attention(q, k, v, summary=Summary(lse=True, top=2, received=True), backend=kernel)
        return out, seen.lse, seen.received, *seen.top

    for i, got in enumerate(vmap(vmap(function))(qs)):
        torch.testing.assert_close(got, torch.stack([torch.stack([function(x)[i] for x in row]) for row in qs]))


@pytest.mark.parametrize("kernel", _KERNELS)
def test_vmap_over_parameters(kernel: str) -> None:
    q, k, v = (x.detach() for x in _inputs())
    W, sink, n = (
        torch.randn(4, _D, _D).double(),
        torch.randn(4, _H).double(),
        torch.tensor([[1, 4], [2, 3], [0, 1], [4, 4]]),
    )

    def function(W: Tensor, sink: Tensor, n: Tensor) -> Tensor:
        words = {"score": score.Bilinear(W), "normalizer": normalizer.Softmax(sink), "mask": mask.lengths(n)}
        return regard.attention(q, k, v, backend=kernel, **words)

    one = [(W[i], sink[i], n[i]) for i in range(4)]
    torch.testing.assert_close(vmap(function)(W, sink, n), torch.stack([function(*x) for x in one]))
    gradient = grad(lambda *x: function(*x).square().sum(), (0, 1))
    for i, got in enumerate(vmap(gradient)(W, sink, n)):
        torch.testing.assert_close(got, torch.stack([gradient(*x)[i] for x in one]))


@pytest.mark.parametrize("kernel", _KERNELS)
def test_jacobians_and_hessians(kernel: str) -> None:
    q, k, v = (x.detach()[:1, :, :2] for x in _inputs())
    function = _plain(kernel)
    plain = torch.autograd.functional.jacobian(lambda q: function(q, k, v), q)
    torch.testing.assert_close(jacrev(function)(q, k, v), plain)
    squares = grad(lambda q: function(q, k, v).pow(3).sum())
    told = torch.autograd.functional.hessian(lambda q: _plain("reference")(q, k, v).pow(3).sum(), q)
    torch.testing.assert_close(jacrev(squares)(q), told)
    if kernel == "reference":
        torch.testing.assert_close(jacfwd(function)(q, k, v), plain)
        torch.testing.assert_close(hessian(lambda q: function(q, k, v).pow(3).sum())(q), told)


@pytest.mark.parametrize("name", _CASES)
def test_functional_gradients_equal_autograd(name: str) -> None:
    for kernel in _KERNELS:
        tensors, function = _case(name, kernel)
        places = tuple(range(len(tensors)))
        found = grad(lambda *x: sum(y.square().sum() for y in function(*x)), places)(*(x.detach() for x in tensors))
        total = sum(y.square().sum() for y in function(*tensors))
        for got, told in zip(found, torch.autograd.grad(total, tensors), strict=True):  # type: ignore[arg-type]
            torch.testing.assert_close(got, told)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that a user's function closes over, under torch.func.


_TRANSFORMS: dict[str, Callable[[Function, Tensor], Any]] = {
    "grad": lambda f, w: grad(lambda w: f(w).square().sum())(w),
    "vmap": lambda f, w: vmap(f)(torch.stack([w, 2 * w])),
    "vmap of grad": lambda f, w: vmap(grad(lambda w: f(w).square().sum()))(torch.stack([w, 2 * w])),
    "jvp": lambda f, w: jvp(f, (w,), (w + 1,))[1],
    "jacobian": lambda f, w: jacrev(f)(w),
}


@pytest.mark.parametrize("name", _TRANSFORMS)
def test_captured_tensor_under_transform(name: str) -> None:
    """A fused backward pass does not see the tensor: `reference` serves, with a warning, and `tiled` refuses."""
    q, k, v = (x.detach() for x in _inputs())
    w = torch.randn(_D, _D, dtype=torch.float64)

    def function(w: Tensor, kernel: str | None = None) -> Tensor:
        return regard.attention(q, k, v, score=lambda q, k: torch.tanh(q @ w) @ k.mT, backend=kernel)

    def plain(w: Tensor) -> Tensor:
        return torch.softmax(torch.tanh(q @ w) @ k.mT, -1) @ v

    with regard.record_backends() as ran:
        found = _TRANSFORMS[name](function, w)
    assert set(ran) == {"reference"}
    torch.testing.assert_close(found, _TRANSFORMS[name](plain, w))
    with pytest.raises(ValueError, match="forward-mode" if name == "jvp" else r"torch\.func"):
        _TRANSFORMS[name](lambda w: function(w, "tiled"), w)


@pytest.mark.parametrize("kernel", _KERNELS)
def test_captured_tensor_outside_transform(kernel: str) -> None:
    q, k, v = (x.detach() for x in _inputs())
    w = torch.randn(_D, _D, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor) -> Tensor:
        return regard.attention(q, k, v, score=lambda q, k: torch.tanh(q @ w) @ k.mT, backend=kernel)

    def plain(q: Tensor) -> Tensor:
        return torch.softmax(torch.tanh(q @ w) @ k.mT, -1) @ v

    for f in (lambda f: grad(lambda q: f(q).square().sum())(q), lambda f: vmap(f)(torch.stack([q, 2 * q]))):
        torch.testing.assert_close(f(function), f(plain))
        gradients = [torch.autograd.grad(f(g).sum(), w)[0] for g in (function, plain)]
        torch.testing.assert_close(*gradients)
