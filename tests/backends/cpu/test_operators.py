"""The operators of the native library, as torch knows them: schemas, graphs, and what they tell without computing."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard import Summary, mask, normalizer, position, score, summary
from regard.backends.cpu import extension
from regard.backends.tiled import backend as tiled
from regard.components.mask import Mask
from regard.components.serialization import Numbers, serialize
from regard.components.tile import Tile

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _call(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """Arguments that forward and backward take alike; L = 5, S = 7, two query heads for each of two others."""
    call = {
        "q": _random(2, 4, 5, 3, dtype=dtype),
        "k": _random(2, 2, 7, 3, dtype=dtype),
        "v": _random(2, 2, 7, 6, dtype=dtype),
    }
    call |= dict.fromkeys(("weight", "key_bias", "query_bias", "bias", "relative", "sink"))
    call |= {
        "mask_tensors": [],
        "mask": [],
        "scale": 0.5,
        "softcap": 0.0,
        "normalizer": 0,
        "alpha": 2.0,
        "dropout": 0.0,
        "seed": 0,
    }
    call["pairs"] = True
    return {**call, **changes}


# Every word that adds a tensor; a mask of arithmetic, and one that is read.
_CALLS = {
    **{str(dtype): _call(dtype) for dtype in _FLOATS},
    "words": _call(
        key_bias=_random(2, 2, 7), query_bias=_random(2, 4, 5), bias=_random(1, 4, 1, 7), relative=_random(4, 5 + 7 - 1 + 64),
        sink=_random(4), softcap=2.0, dropout=0.3, seed=7, mask=[0, 2, 3, 1, 0, 0, -1, -1],
    ),
    "additive": _call(weight=_random(4, 3), scale=1.0, bias=_random(7)[None, None, None]),
    "entmax": _call(normalizer=2, alpha=1.5),
    "sigmoid": _call(normalizer=1, sink=_random(4)),
    "dense": _call(mask_tensors=[_random(2, 1, 5, 7) > 0], mask=[4, 0, 0, 0, 0, 0, 0, -1]),
    "gaps": _call(q=_random(2, 5, 4, 3).transpose(1, 2), v=_random(2, 2, 7, 8)[..., 1:7]),
}  # fmt: skip


def _check(name: str, *arguments: Any) -> None:
    torch.library.opcheck(getattr(extension.ops, name).default, arguments)


@pytest.mark.parametrize("name", _CALLS)
def test_forward(name: str) -> None:
    call = _CALLS[name]
    for top, wanted in ((0, 0), (3, 7), (0, 2), (3, 15)):
        _check("forward", *call.values(), top, None, [], wanted)


@pytest.mark.parametrize("name", _CALLS)
def test_forward_with_all_weights(name: str) -> None:
    call = _CALLS[name]
    for member, numbers, wanted in ((None, [], 16), (_random(1, 3, 7) > 0, [4, 0], 48), (None, [2], 8)):
        _check("forward", *call.values(), 2, member, numbers, wanted)


def _all_gradients(call: dict[str, Any]) -> int:
    """The bits that ask for all gradients that there are."""
    bits = ((8, "key_bias"), (16, "q"), (32, "bias"), (64, "relative"), (128, "sink"), (256, "weight"))
    return 7 | sum(bit for bit, word in bits if call[word] is not None)


@pytest.mark.parametrize("name", _CALLS)
def test_backward(name: str) -> None:
    call = _CALLS[name]
    out, stats, *exact = extension.ops.forward(*call.values(), 0, None, [], 0)
    dlse = None if call["normalizer"] else _random(2, 4, 5)
    for wanted in (7, 2, _all_gradients(call)):
        _check("backward", (exact or [out])[0], torch.ones_like(out), stats, dlse, *call.values(), wanted)


def _told(call: dict[str, Any]) -> tuple[Any, ...]:
    """The same words, packed."""
    words = [call[name] for name in ("weight", "key_bias", "query_bias", "bias", "relative", "sink")]
    reals = struct.pack("4d", *[call[name] for name in ("scale", "softcap", "alpha", "dropout")])
    numbers = [call["normalizer"], int(call["pairs"]), *struct.unpack("4q", reals), *call["mask"]]
    tensors = [word for word in words if word is not None] + call["mask_tensors"]
    there = sum(1 << i for i, word in enumerate(words) if word is not None)
    return call["q"], call["k"], call["v"], tensors, there, torch.tensor(numbers), call["seed"]


@pytest.mark.parametrize("name", _CALLS)
def test_words_that_are_packed(name: str) -> None:
    """They give the same as one by one, and tell the same of it."""
    call = _CALLS[name]
    told = _told(call)
    for asked in ((0, None, [], 0), (3, None, [], 7), (3, _random(1, 3, 7) > 0, [4, 0], 63)):
        _check("forward_told", *told, *asked)
        _equal(extension.ops.forward_told(*told, *asked), extension.ops.forward(*call.values(), *asked))
    out, stats, *exact = extension.ops.forward(*call.values(), 0, None, [], 0)
    before = ((exact or [out])[0], torch.ones_like(out), stats, None)
    for wanted in (2, _all_gradients(call)):
        _check("backward_told", *before, *told, wanted)
        _equal(
            extension.ops.backward_told(*before, *told, wanted), extension.ops.backward(*before, *call.values(), wanted)
        )


def _equal(found: list[Tensor], told: list[Tensor]) -> None:
    assert len(found) == len(told)
    assert all(torch.equal(x, y) for x, y in zip(found, told, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 5, 3)}, "k has another shape"),
        ({"q": torch.zeros(1, 2, 4, 8)[..., ::2]}, "gaps in its last axis"),
        ({"q": torch.zeros(1, 2, 4, 4, dtype=torch.float64)}, "type"),
        ({"mask": [0, 0, 0]}, "nodes of 8 numbers"),
        ({"mask": [5, 0, 0, 0, 0, 0, -1, -1]}, "do not come before it"),
        ({"mask": [1, 0, 0, 0, 0, 0, -1, 0]}, "names a tensor that is not there"),
        ({"mask": [9, 0, 0, 0, 0, 0, -1, -1]}, "of no known kind"),
        ({"relative": torch.zeros(2, 3)}, "relative must be"),
        ({"dropout": 2.0}, "dropout must be from 0 to 1"),
        ({"weight": torch.zeros(3)}, "weight must be"),
        ({"weight": torch.zeros(4), "scale": 0.5}, "scale 1"),
        ({"normalizer": 3}, "normalizer must be"),
        ({"normalizer": 2, "alpha": 1.0}, "alpha must be"),
    ],
)
def test_an_operator_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    """Anyone may call an operator: it must not read what is not there."""
    q, k, v = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 3)
    words = {"q": q, "k": k, "v": v, "weight": None, "key_bias": None, "query_bias": None}
    words |= {
        "bias": None,
        "relative": None,
        "sink": None,
        "mask_tensors": [],
        "mask": [],
        "scale": 1.0,
        "softcap": 0.0,
        "normalizer": 0,
        "alpha": 2.0,
    }
    words |= {"dropout": 0.0, "seed": 0, "pairs": True, "top": 0, "member": None, "numbers": [], "wanted": 0}
    extension.ops.forward(**words)
    with pytest.raises(RuntimeError, match=message):
        extension.ops.forward(**{**words, **change})


def test_packed_words_that_do_not_fit() -> None:
    q, k, v, tensors, there, told, seed = _told(_CALLS["words"])
    with pytest.raises(RuntimeError, match="fewer tensors than told"):
        extension.ops.forward_told(q, k, v, tensors[:2], there, told, seed, 0, None, [], 0)
    for wrong in (told[:5], told.double(), torch.stack([told, told], 1)[:, 0]):
        with pytest.raises(RuntimeError, match="at least 6 contiguous whole numbers"):
            extension.ops.forward_told(q, k, v, tensors, there, wrong, seed, 0, None, [], 0)


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("wild", [torch.nan, torch.inf, -torch.inf])
def test_finite(dtype: torch.dtype, wild: float) -> None:
    """Every number is looked at, in rows with and without gaps, and on many threads; the largest ones are finite."""
    shapes = ((2, 3, 5, 7), (1, 2, 4, 1), (2, 3, 300, 70))
    for shape, gaps in itertools.product(shapes, (False, True)):
        x = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if gaps else x
        fine = torch.zeros(1, 1, 1, 1, dtype=dtype)
        assert extension.ops.finite(x, -x, fine)
        for place in ((0, 0, 0, 0), (-1, -1, -1, -1), (0, 1, 3, -1)):
            y = x.clone()
            y[place] = wild
            assert not extension.ops.finite(y, fine, fine)
            assert not extension.ops.finite(fine, y, fine)
            assert not extension.ops.finite(fine, fine, y)
    # What the kernels do not read is left to others.
    assert not extension.ops.finite(x.double(), fine, fine)
    assert not extension.ops.finite(fine, x.mT, fine)
    assert extension.ops.finite(x[:, :, :0], fine, x[..., :0])


@pytest.mark.parametrize("dtype", _FLOATS)
def test_plain(dtype: torch.dtype) -> None:
    q, k, v = list(_call(dtype).values())[:3]
    assert extension.ops.plain(q, k, v) is not None
    _check("plain", q, k, v)
    # What is out of the ordinary is left to others, and the fake knows it.
    for others in ((q[0], k, v), (q, k[:1], v), (q.mT.contiguous().mT, k, v), (q, k.double(), v), (q[:, :3], k, v)):
        assert extension.ops.plain(*others) is None
        _check("plain", *others)


def test_none_is_left_out() -> None:
    """Whatever gives tensors can be part of a graph."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("regard_native::")}
    giving = {
        name for name in names if "Tensor" in str(getattr(extension.ops, name[15:]).default._schema).split("->")[1]
    }
    operators = ("forward", "plain", "backward", "forward_told", "backward_told")
    assert {f"regard_native::{name}" for name in operators} <= giving
    assert [name for name in giving if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta")] == []


# ---------------------------------------------------------------------------------------------------------------------
# The operator that has gradients, and that compiled graphs hold.

_WORDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, log-sum-exp": {"mask": mask.causal(align="end"), "summary": Summary(lse=True)},
    "gaussian": {"score": score.Gaussian(1.5), "normalizer": normalizer.Softmax(sink=0.5)},
    "learned": {"bias": position.ALiBi(torch.tensor([0.5, 0.2, 0.1, 0.3], requires_grad=True), align="end")},
    "sigmoid, dropout": {"normalizer": normalizer.Sigmoid(-1.0), "dropout": 0.3, "seed": 3},
    "views": {"summary": Summary(max=True, top=2, received=True, mass=summary.groups(torch.arange(7) % 2), rows=(0,))},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", _WORDS)
def test_the_differentiable_operator(name: str, dtype: torch.dtype) -> None:
    q, k, v = (x.requires_grad_() for x in list(_call(dtype).values())[:3])
    words = _WORDS[name]
    order = ("score", "normalizer", "mask", "bias", "softcap")
    posed = regard.plan.assemble.make_problem(
        q,
        k,
        v,
        *[words.get(word) for word in order],
        words.get("dropout", 0.0),
        words.get("seed"),
        words.get("summary"),
    )
    numbers = Numbers()
    text = serialize(posed.plan, numbers)
    tensors = [x.detach().requires_grad_(x.requires_grad) for x in posed.tensors]
    arguments = (tensors, "cpu", text, numbers.ints, numbers.floats)
    torch.library.opcheck(torch.ops.regard.forward.default, arguments)


def test_a_loss_of_the_log_sum_exp_alone_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(2, 3, 5, 7, requires_grad=True)
    told = []
    for kernel in ("cpu", "reference"):
        _, seen = regard.attention(q, q, q, mask=mask.causal(), summary=Summary(lse=True), backend=kernel)
        with monkeypatch.context() as patch:
            patch.setattr(tiled, "backward", None)  # who calls it fails
            told.append(torch.autograd.grad(seen.lse.square().sum(), q)[0])
    torch.testing.assert_close(*told)


def test_a_mask_of_the_users_own_is_left_to_others() -> None:
    @dataclass(frozen=True)
    class Even(Mask):
        def allowed(self, tile: Tile) -> Tensor:
            return tile.key % 2 == 0

    q = torch.randn(1, 2, 5, 7)
    for of in (Even(), mask.causal() & ~Even()):
        reasons = regard.explain(q, q, q, mask=of).reasons
        assert reasons["cpu"] == "it has no masks in Python"
        out = regard.attention(q, q, q, mask=of)
        torch.testing.assert_close(out, regard.attention(q, q, q, mask=of, backend="reference"))
