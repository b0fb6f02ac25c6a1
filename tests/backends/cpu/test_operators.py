"""The operators of the native library as torch sees them: schemas, fakes, argument checks, and compiled graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.cpu import ROWS, packed_arguments, requested
from torch import Tensor

import regard
from regard import Summary, mask, normalizer, position, score, summary
from regard.backends.cpu import extension
from regard.backends.cpu.pack import pack
from regard.backends.tiled import backend as tiled
from regard.components.mask import Mask
from regard.components.serialization import Numbers, serialize
from regard.components.tile import Tile
from regard.plan.assemble import make_problem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _qkv(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """L = 5, S = 7, two query heads for each of two key/value heads."""
    shapes = {"q": (2, 4, 5, 3), "k": (2, 2, 7, 3), "v": (2, 2, 7, 6)}
    return {name: _random(*shape, dtype=dtype) for name, shape in shapes.items()}


def _arguments(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    return {**_qkv(dtype), "scale": 0.5, **changes}


# Each optional tensor occurs, a computed mask and one that is read from a tensor.
_CASES = {
    **{str(dtype): _arguments(dtype) for dtype in _DTYPES},
    "all biases": _arguments(
        key_bias=_random(2, 2, 7), query_bias=_random(2, 4, 5), bias=_random(1, 4, 1, 7), relative=_random(4, 5 + 7 - 1 + 64),
        sink=_random(4), softcap=2.0, dropout=0.3, seed=7, mask=[0, 2, 0, 3, 1, -1, -1],
    ),
    "additive": _arguments(weight=_random(4, 3), scale=1.0, bias=_random(7)[None, None, None]),
    "entmax": _arguments(normalizer=2, alpha=1.5),
    "sigmoid": _arguments(normalizer=1, sink=_random(4)),
    "dense": _arguments(mask_tensors=[_random(2, 1, 5, 7) > 0], mask=[4, 0, 0, 0, 0, 0, -1]),
    "gaps": _arguments(q=_random(2, 5, 4, 3).transpose(1, 2), v=_random(2, 2, 7, 8)[..., 1:7]),
}  # fmt: skip


def _check(name: str, *arguments: Any) -> None:
    torch.library.opcheck(getattr(extension.ops, name).default, arguments)


@pytest.mark.parametrize("name", _CASES)
def test_forward_passes_opcheck(name: str) -> None:
    arguments = packed_arguments(**_CASES[name])
    for some in (requested(), requested(*ROWS, top=3), requested("max"), requested(*ROWS, top=3, is_last=True)):
        _check("forward", *arguments, *some)


@pytest.mark.parametrize("name", _CASES)
def test_forward_with_weight_summaries_passes_opcheck(name: str) -> None:
    arguments = packed_arguments(**_CASES[name])
    member = _random(1, 3, 7) > 0
    for some in (
        requested("received", top=2),
        requested("received", "full", top=2, member=member, rows=[4, 0]),
        requested(*ROWS, "received", "full", top=2, member=member, rows=[4, -5], is_last=True),
        requested(top=2, rows=[2], is_last=True),
    ):
        _check("forward", *arguments, *some)


def _all_gradients(case: dict[str, Any]) -> int:
    """Return the bits that request every gradient that exists."""
    bits = ((8, "key_bias"), (16, "q"), (32, "bias"), (64, "relative"), (128, "sink"), (256, "weight"))
    return 7 | sum(bit for bit, name in bits if case.get(name) is not None)


@pytest.mark.parametrize("name", _CASES)
def test_backward_passes_opcheck(name: str) -> None:
    case = _CASES[name]
    arguments = packed_arguments(**case)
    out, stats, *exact = extension.ops.forward(*arguments, *requested())
    for dlse in (None,) if case.get("normalizer") else (None, _random(2, 4, 5)):
        for gradients in (7, 2, _all_gradients(case)):
            _check("backward", (exact or [out])[0], torch.ones_like(out), stats, dlse, *arguments, gradients)


def _per_head(values: Tensor) -> Tensor:
    return values.expand(4).contiguous()


# Arguments of `attention`, and the same packed by hand.
_PLANS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], tuple[Any, ...]]]] = {
    "scale": ({"score": score.Product(scale=0.25)}, lambda x: packed_arguments(**x, scale=0.25)),
    "causal, softcap, sink": (
        {"mask": mask.causal(align="end"), "softcap": 2.0, "normalizer": normalizer.Softmax(sink=0.5)},
        lambda x: packed_arguments(
            **x, scale=3**-0.5, softcap=2.0, mask=[0, 0, 1, 1 << 40, 0, -1, -1], sink=_per_head(torch.tensor(0.5))
        ),
    ),
    "tensor bias, dropout": (
        {"bias": _random(4, 1, 7), "dropout": 0.3, "seed": 7},
        lambda x: packed_arguments(
            **x, scale=3**-0.5, bias=_random(4, 1, 7)[None], dropout=0.3, seed=7, allow_bf16_dot=False
        ),
    ),
    "additive": (
        {"score": score.Additive(_random(4, 3))},
        lambda x: packed_arguments(**x, weight=_random(4, 3), allow_bf16_dot=False),
    ),
    "entmax": (
        {"normalizer": normalizer.Entmax(1.5)},
        lambda x: packed_arguments(**x, scale=3**-0.5, normalizer=2, alpha=1.5),
    ),
    "sigmoid": (
        {"normalizer": normalizer.Sigmoid(-1.0)},
        lambda x: packed_arguments(**x, scale=3**-0.5, normalizer=1, sink=_per_head(torch.tensor(-1.0))),
    ),
    "dense": (
        {"mask": mask.dense(_random(5, 7) > 0)},
        lambda x: packed_arguments(
            **x, scale=3**-0.5, mask_tensors=[(_random(5, 7) > 0)[None, None]], mask=[4, 0, 0, 0, 0, 0, -1]
        ),
    ),
}


@pytest.mark.parametrize("name", _PLANS)
def test_pack_equals_arguments_packed_by_hand(name: str) -> None:
    """They give the same arguments, and the same results."""
    components, by_hand = _PLANS[name]
    order = ("score", "normalizer", "mask", "bias", "softcap")
    problem = make_problem(
        *_qkv().values(),
        *[components.get(part) for part in order],
        components.get("dropout", 0.0),
        components.get("seed"),
        None,
    )
    packed, arguments = pack(problem.plan, problem.tensors)
    # The score may transform q and k; the rest is independent of their values.
    expected = by_hand(dict(zip("qkv", problem.tensors[:3], strict=True)))
    for got, value in zip(arguments, expected, strict=True):
        if isinstance(value, list):
            _assert_equal(got, value)
        elif isinstance(value, Tensor):
            assert torch.equal(got, value)
        else:
            assert got == value
    every = requested(*ROWS, "received", "full", top=3, member=_random(1, 3, 7) > 0, rows=[4, 0])
    for some in (requested(), requested(*ROWS, top=3), every):
        _assert_equal(extension.ops.forward(*arguments, *some), extension.ops.forward(*expected, *some))
    assert (packed.requested, packed.names, packed.order) == (0, (), ())
    out, stats, *_ = extension.ops.forward(*arguments, *requested())
    for gradients in (2, 7):
        before = (out, torch.ones_like(out), stats, None)
        _assert_equal(
            extension.ops.backward(*before, *arguments, gradients),
            extension.ops.backward(*before, *expected, gradients),
        )


def _assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 5, 3)}, "k has an unexpected shape"),
        ({"q": torch.zeros(1, 2, 4, 8)[..., ::2]}, "q must be contiguous in its last dimension"),
        ({"q": torch.zeros(1, 2, 4, 4, dtype=torch.float64)}, "dtype"),
        ({"mask": [0, 0, 0]}, "nodes of 7 integers"),
        ({"mask": [6, 0, 0, 0, 0, -1, -1]}, "do not precede it"),
        ({"mask": [8, -1, 0, 0, 0, -1, -1]}, "do not precede it"),
        ({"mask": [1, 0, 0, 0, 0, 0, -1]}, "refers to a missing tensor"),
        ({"mask": [9, 0, 0, 0, 0, -1, -1]}, "unknown kind"),
        ({"mask": [5, 0, 0, 0, 0, 0, -1], "mask_tensors": [torch.zeros(1, 3).long()]}, "must be int64 of shape"),
        ({"mask": [3, 0, -1, 0, 0, 0, -1], "mask_tensors": [torch.ones(1, 1, 2, 2) > 0]}, "must not be empty"),
        ({"mask": [3, 0, 0, 0, 0, 0, -1], "mask_tensors": [torch.ones(1, 1, 0, 2) > 0]}, "must have four dimensions"),
        ({"relative": torch.zeros(2, 3)}, "relative must be"),
        ({"dropout": 2.0}, r"dropout must be in \[0, 1\]"),
        ({"weight": torch.zeros(3)}, "weight must be"),
        ({"weight": torch.zeros(4), "scale": 0.5}, "scale must be 1"),
        ({"normalizer": 3}, "normalizer has an unknown kind"),
        ({"normalizer": 2, "alpha": 1.0}, "alpha must be"),
    ],
)
def test_operator_rejects_invalid_arguments(change: dict[str, Any], message: str) -> None:
    """Anyone can call an operator: it must not read out of bounds."""
    valid = {"q": torch.zeros(1, 2, 4, 4), "k": torch.zeros(1, 2, 5, 4), "v": torch.zeros(1, 2, 5, 3)}
    extension.ops.forward(*packed_arguments(**valid), *requested())
    with pytest.raises(RuntimeError, match=message):
        extension.ops.forward(*packed_arguments(**{**valid, **change}), *requested())


def test_operator_rejects_malformed_packed_arguments() -> None:
    q, k, v, tensors, present_mask, packed, seed = packed_arguments(**_CASES["all biases"])
    with pytest.raises(RuntimeError, match="fewer tensors than present_mask says"):
        extension.ops.forward(q, k, v, tensors[:2], present_mask, packed, seed, *requested())
    for wrong in (packed[:9], packed.double(), torch.stack([packed, packed], 1)[:, 0]):
        with pytest.raises(RuntimeError, match="at least 10 contiguous int64 values"):
            extension.ops.forward(q, k, v, tensors, present_mask, wrong, seed, *requested())


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("nonfinite", [torch.nan, torch.inf, -torch.inf])
def test_finite_checks_every_element(dtype: torch.dtype, nonfinite: float) -> None:
    """In rows with and without gaps, and on many threads; the largest finite values are accepted."""
    shapes = ((2, 3, 5, 7), (1, 2, 4, 1), (2, 3, 300, 70))
    for shape, gaps in itertools.product(shapes, (False, True)):
        x = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if gaps else x
        finite = torch.zeros(1, 1, 1, 1, dtype=dtype)
        assert extension.ops.finite(x, -x, finite)
        for index in ((0, 0, 0, 0), (-1, -1, -1, -1), (0, 1, 3, -1)):
            y = x.clone()
            y[index] = nonfinite
            assert not extension.ops.finite(y, finite, finite)
            assert not extension.ops.finite(finite, y, finite)
            assert not extension.ops.finite(finite, finite, y)
    # Unsupported dtypes and layouts are not checked.
    assert not extension.ops.finite(x.double(), finite, finite)
    assert not extension.ops.finite(finite, x.mT, finite)
    assert extension.ops.finite(x[:, :, :0], finite, x[..., :0])


@pytest.mark.parametrize("dtype", _DTYPES)
def test_plain_passes_opcheck(dtype: torch.dtype) -> None:
    q, k, v = _qkv(dtype).values()
    statistics = extension.request(("max", "top_weights", "top_keys", "received"), is_last=False)
    assert len(extension.ops.plain(q, k, v, 0, 0)) == 1
    assert len(extension.ops.plain(q, k, v, 3, statistics)) == 5
    _check("plain", q, k, v, 0, 0)
    _check("plain", q, k, v, 3, statistics)
    # For other arguments it returns nothing, and so does the fake.
    for others in ((q[0], k, v), (q, k[:1], v), (q.mT.contiguous().mT, k, v), (q, k.double(), v), (q[:, :3], k, v)):
        assert extension.ops.plain(*others, 0, 0) == []
        _check("plain", *others, 0, 0)
    with pytest.raises(RuntimeError, match="top, row_indices and member"):
        extension.ops.plain(q, k, v, 2, 0)


def test_every_operator_that_returns_tensors_has_a_fake() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("regard_native::")}
    with_tensors = {
        name for name in names if "Tensor" in str(getattr(extension.ops, name[15:]).default._schema).split("->")[1]
    }
    assert with_tensors == {f"regard_native::{name}" for name in ("forward", "plain", "backward")}
    assert [name for name in with_tensors if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta")] == []


# ---------------------------------------------------------------------------------------------------------------------
# The differentiable operator, which compiled graphs contain.

_COMPONENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, log-sum-exp": {"mask": mask.causal(align="end"), "summary": Summary(lse=True)},
    "gaussian": {"score": score.Gaussian(1.5), "normalizer": normalizer.Softmax(sink=0.5)},
    "learned": {"bias": position.ALiBi(torch.tensor([0.5, 0.2, 0.1, 0.3], requires_grad=True), align="end")},
    "sigmoid, dropout": {"normalizer": normalizer.Sigmoid(-1.0), "dropout": 0.3, "seed": 3},
    "summaries": {
        "summary": Summary(max=True, top=2, received=True, mass=summary.groups(torch.arange(7) % 2), rows=(0,))
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", _COMPONENTS)
def test_differentiable_operator_passes_opcheck(name: str, dtype: torch.dtype) -> None:
    q, k, v = (x.requires_grad_() for x in _qkv(dtype).values())
    components = _COMPONENTS[name]
    order = ("score", "normalizer", "mask", "bias", "softcap")
    problem = make_problem(
        q,
        k,
        v,
        *[components.get(part) for part in order],
        components.get("dropout", 0.0),
        components.get("seed"),
        components.get("summary"),
    )
    numbers = Numbers()
    text = serialize(problem.plan, numbers)
    tensors = [x.detach().requires_grad_(x.requires_grad) for x in problem.tensors]
    arguments = (tensors, "cpu", text, numbers.ints, numbers.floats)
    torch.library.opcheck(torch.ops.regard.forward.default, arguments)


def test_lse_gradient_uses_native_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(2, 3, 5, 7, requires_grad=True)
    gradients = []
    for backend in ("cpu", "reference"):
        _, attention = regard.attention(q, q, q, mask=mask.causal(), summary=Summary(lse=True), backend=backend)
        with monkeypatch.context() as patch:
            patch.setattr(tiled, "backward", None)  # calling it would fail
            gradients.append(torch.autograd.grad(attention.lse.square().sum(), q)[0])
    torch.testing.assert_close(*gradients)


def test_custom_mask_falls_back_to_another_backend() -> None:
    @dataclass(frozen=True)
    class Even(Mask):
        def allowed(self, tile: Tile) -> Tensor:
            return tile.key % 2 == 0

    q = torch.randn(1, 2, 5, 7)
    for of in (Even(), mask.causal() & ~Even()):
        reasons = regard.explain(q, q, q, mask=of).reasons
        assert reasons["cpu"] == "it does not support the mask Even"
        out = regard.attention(q, q, q, mask=of)
        torch.testing.assert_close(out, regard.attention(q, q, q, mask=of, backend="reference"))
