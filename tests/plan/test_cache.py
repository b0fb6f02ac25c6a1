"""What is remembered of calls, so that the next one need not be checked again, changes no answer and holds no tensor."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import budget
from support.budget import Yardstick
from torch import Tensor
from torch._subclasses import FakeTensorMode

import regard
from regard import Summary, mask, normalizer, position, score, summary
from regard.backends import autograd
from regard.backends.cpu import pack
from regard.plan import cache

_B, _H, _L, _S, _D = 2, 4, 5, 7, 8


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    _forget()
    yield
    _forget()


def _forget() -> None:
    regard.clear_caches()


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _qkv(seed: int = 0) -> list[Tensor]:
    return [
        x.requires_grad_()
        for x in (
            _random(_B, _H, _L, _D, seed=seed),
            _random(_B, 2, _S, _D, seed=seed),
            _random(_B, 2, _S, 3, seed=seed),
        )
    ]


# Words with other numbers in their tensors for every seed, and all else the same.
_WORDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "nothing": lambda seed: {},
    "causal": lambda seed: {"mask": mask.causal("end")},
    "lengths": lambda seed: {"mask": mask.lengths([3 + seed, 2]) & mask.causal("end")},
    "documents": lambda seed: {"mask": mask.documents((torch.arange(_L) // (2 + seed), torch.arange(_S) // (2 + seed)))},
    "blocks": lambda seed: {"mask": mask.blocks(_random(3, 4, seed=seed) > 0, 2) | mask.prefix(1 + seed)},
    "dense": lambda seed: {"mask": ~mask.dense(_random(_L, _S, seed=seed) > 0)},
    "bias": lambda seed: {"bias": _random(_L, _S, seed=seed), "softcap": 3.0},
    "ALiBi": lambda seed: {"bias": position.ALiBi(_random(_H, seed=seed).abs(), "end")},
    "T5": lambda seed: {"bias": position.T5(_random(8, _H, seed=seed), max_distance=16, align="end")},
    "sink": lambda seed: {"normalizer": normalizer.Softmax(_random(_H, seed=seed)), "mask": mask.window(3, 1, "end")},
    "sigmoid": lambda seed: {"normalizer": normalizer.Sigmoid(_random(_H, seed=seed))},
    "entmax": lambda seed: {"normalizer": normalizer.Entmax(1.5)},
    "cosine": lambda seed: {"score": score.Cosine(_random(_H, seed=seed).abs() + 0.1), "bias": _random(_S, seed=seed)},
    "bilinear": lambda seed: {"score": score.Bilinear(_random(_D, _D, seed=seed)), "normalizer": normalizer.Softmax(0.5)},
    "gaussian": lambda seed: {"score": score.Gaussian(_random(_H, seed=seed).abs() + 1)},
    "additive": lambda seed: {"score": score.Additive(_random(_D, seed=seed)), "mask": mask.causal(1)},
    "dropout": lambda seed: {"dropout": 0.5, "seed": seed, "mask": mask.lengths([3, 2 + seed])},
    "summaries": lambda seed: {
        "summary": Summary(True, True, True, 2, True, summary.groups(torch.arange(_S) % (2 + seed), 3), (0, -1)),
        "normalizer": normalizer.Softmax(_random(_H, seed=seed)), "dropout": 0.1, "seed": torch.tensor(seed),
    },
    "function": lambda seed: {"score": lambda q, k: q @ k.mT * (1 + seed)},
}  # fmt: skip


def _flat(answer: Any) -> list[Tensor]:
    if isinstance(answer, Tensor):
        return [answer]
    out, seen = answer
    return [out, *(x for x in seen if isinstance(x, Tensor)), *(seen.top or ())]


def _answer(words: dict[str, Any], x: list[Tensor]) -> list[Tensor]:
    outputs = _flat(regard.attention(*x, **words))
    floats = [y for y in outputs if y.requires_grad]
    return [*outputs, *torch.autograd.grad(floats, x, [torch.ones_like(y) for y in floats])]


def _same(found: list[Tensor], told: list[Tensor]) -> None:
    for got, expected in zip(found, told, strict=True):
        assert torch.equal(got, expected) or bool(expected.isnan().any())
        torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("name", _WORDS)
def test_a_call_that_is_known_gives_the_same_bits(name: str) -> None:
    """With other numbers in all tensors than the call that it is known by."""
    told = []
    for seed in (0, 1):
        _forget()
        told.append(_answer(_WORDS[name](seed), _qkv(seed)))
    _forget()
    for seed in (0, 1, 0, 1):
        _same(_answer(_WORDS[name](seed), _qkv(seed)), told[seed])
    assert len(cache._entries) == (0 if name == "function" else 1)


@pytest.mark.parametrize("wild", [torch.nan, torch.inf])
def test_nan_in_a_call_that_is_known(wild: float) -> None:
    for name in ("lengths", "causal", "dropout"):
        x = _qkv()
        _answer(_WORDS[name](0), x)
        with torch.no_grad():
            x[1][1, :, -1], x[0][0, 0, 0] = wild, wild
        found = _answer(_WORDS[name](0), x)
        _forget()
        _same(found, _answer(_WORDS[name](0), x))


def _held(word: Any) -> list[Tensor]:
    if isinstance(word, Tensor):
        return [word]
    parts = vars(word).values() if hasattr(word, "__dataclass_fields__") else ()
    return [x for part in parts for x in _held(part)]


def _remembered(name: str) -> list[weakref.ref[Tensor]]:
    """References to all tensors of a call that was made and is over."""
    x, words = _qkv(), _WORDS[name](0)
    for _ in range(3):
        _answer(words, x)
    return [weakref.ref(y) for part in (*x, *words.values()) for y in _held(part)]


@pytest.mark.parametrize("name", _WORDS)
def test_no_tensor_is_kept_alive(name: str) -> None:
    references = _remembered(name)
    gc.collect()
    assert len(references) >= 3
    assert [r for r in references if r() is not None] == []


def test_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.plan.cache._MAX_ENTRIES", 3)
    for left in range(10):
        words = {"mask": mask.window(left, 0, "end")}
        _same(_answer(words, _qkv()), _answer(words, _qkv()))
        assert len(cache._entries) <= 3
    assert pack._packed_args.cache_info().maxsize is not None


def test_numbers_that_are_equal_are_not_the_same() -> None:
    """What is known of True is not true of 1."""
    q, k, v = _qkv()
    regard.attention(q, k, v, summary=Summary(lse=True))
    with pytest.raises(TypeError, match="summary: lse is 1"):
        regard.attention(q, k, v, summary=Summary(lse=1))  # type: ignore[arg-type]
    regard.attention(q, k, v, softcap=1.0)
    with pytest.raises(TypeError, match="softcap is True"):
        regard.attention(q, k, v, softcap=True)


def test_words_that_were_copied_or_changed() -> None:
    x, word = _qkv(), mask.window(1, 0, "end")
    told = {left: _answer({"mask": mask.window(left, 0, "end")}, x) for left in (1, 3)}
    _same(_answer({"mask": copy.deepcopy(word)}, x), told[1])
    object.__setattr__(word, "left", 3)
    _same(_answer({"mask": word}, x), told[3])
    n = torch.tensor([3, 2])
    first = _answer({"mask": mask.lengths(n)}, x)
    n += 1
    assert not torch.equal(_answer({"mask": mask.lengths(n)}, x)[0], first[0])


def test_a_seed_that_is_not_given_is_drawn_each_time() -> None:
    q, k, v = _qkv()
    torch.manual_seed(0)
    first, second = (regard.attention(q, k, v, dropout=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(regard.attention(q, k, v, dropout=0.5), first)
    assert torch.equal(regard.attention(q, k, v, dropout=0.5), second)
    assert not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("before", ["fake", "inference", "vmap", "traced"])
def test_after_calls_of_other_kinds(before: str) -> None:
    """What was found without numbers, without gradients, or in a graph, is good for a call that has them."""
    words = ({"softcap": 2.0}, _WORDS["lengths"](0), _WORDS["sink"](0))
    told = [_answer(word, _qkv()) for word in words]
    _forget()
    q, k, v = (x.detach() for x in _qkv())
    if before == "fake":
        with FakeTensorMode() as mode:
            assert regard.attention(*(mode.from_tensor(x) for x in (q, k, v)), softcap=2.0).shape == (_B, _H, _L, 3)
    for word in words:
        if before == "inference":
            with torch.inference_mode():
                regard.attention(q, k, v, **word)
        elif before == "vmap":
            torch.func.vmap(lambda q, word=word: regard.attention(q, k, v, **word))(torch.stack([q, q]))
        elif before == "traced":
            torch.jit.trace(lambda q, word=word: regard.attention(q, k, v, **word), (q,), check_trace=False)
    for word, expected in zip(words, told, strict=True):
        _same(_answer(word, _qkv()), expected)


def test_many_threads() -> None:
    names = [name for name in _WORDS if name != "function"]
    told = {name: _answer(_WORDS[name](0), _qkv()) for name in names}
    _forget()
    wrong: list[str] = []

    def run(start: int) -> None:
        for i in range(2 * len(names)):
            name = names[(start + i) % len(names)]
            pairs = zip(_answer(_WORDS[name](0), _qkv()), told[name], strict=True)
            if not all(torch.equal(x, y) or bool(y.isnan().any()) for x, y in pairs):
                wrong.append(name)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------------------------------------------------------------
# The two ways into autograd.


@pytest.mark.parametrize("name", _WORDS)
def test_both_ways_into_autograd_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = _answer(_WORDS[name](0), _qkv())
    monkeypatch.setattr(autograd, "_is_transformed", lambda: True)
    _same(_answer(_WORDS[name](0), _qkv()), told)


@pytest.mark.parametrize("name", ["causal", "sink", "bias"])
def test_second_derivatives_and_mapped_gradients(name: str) -> None:
    """The graph of the backward pass is made where it is asked for, and the pass is mapped where it has to be."""
    x, words = _qkv(), _WORDS[name](0)
    out = regard.attention(*x, **words)
    weights = torch.stack([_random(*out.shape, seed=seed) for seed in range(3)])
    mapped = torch.func.vmap(lambda weight: torch.autograd.grad(out, x, weight, retain_graph=True))(weights)
    for i, weight in enumerate(weights):
        for got, expected in zip(mapped, torch.autograd.grad(out, x, weight, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], expected)
    seconds = {}
    for kernel, dtype in (("cpu", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        x = [y.detach().to(dtype).requires_grad_() for y in _qkv()]
        first = torch.autograd.grad(regard.attention(*x, **words, backend=kernel).square().sum(), x, create_graph=True)
        assert all(y.requires_grad for y in first)
        seconds[kernel, dtype] = torch.autograd.grad(sum(y.square().sum() for y in first), x)  # type: ignore[arg-type]
    got, straight, exact = seconds.values()
    for which, *found in zip("qkv", got, straight, exact, strict=True):
        budget.check(f"second derivative of {which}", found[0], Yardstick(exact=found[2], straight=found[1]))
