"""The plan cache changes no result and holds no tensor."""

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
from support.budget import ErrorBudget
from torch import Tensor
from torch._subclasses import FakeTensorMode

import regard
from regard import Summary, mask, normalizer, position, score, summary
from regard.backends import autograd
from regard.backends.cpu import pack
from regard.components.tile import Sizes
from regard.plan import cache

_B, _H, _L, _S, _D = 2, 4, 5, 7, 8


@pytest.fixture(autouse=True)
def _clear_caches() -> Iterator[None]:
    _clear()
    yield
    _clear()


def _clear() -> None:
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


# Arguments whose tensors have other contents per seed, and are the same otherwise.
_ARGUMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "defaults": lambda seed: {},
    "causal": lambda seed: {"mask": mask.causal("end")},
    "lengths": lambda seed: {"mask": mask.lengths([3 + seed, 2]) & mask.causal(_S - _L)},
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
    out, stats = answer
    return [out, *(x for x in stats if isinstance(x, Tensor)), *(stats.top or ())]


def _results(arguments: dict[str, Any], x: list[Tensor]) -> list[Tensor]:
    outputs = _flat(regard.attention(*x, **arguments))
    floats = [y for y in outputs if y.requires_grad]
    return [*outputs, *torch.autograd.grad(floats, x, [torch.ones_like(y) for y in floats])]


def _assert_equal(results: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y) or bool(y.isnan().any())
        torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.parametrize("name", _ARGUMENTS)
def test_cached_call_gives_same_bits(name: str) -> None:
    """Also if the contents of all tensors differ from those of the cached call."""
    expected = []
    for seed in (0, 1):
        _clear()
        expected.append(_results(_ARGUMENTS[name](seed), _qkv(seed)))
    _clear()
    for seed in (0, 1, 0, 1):
        _assert_equal(_results(_ARGUMENTS[name](seed), _qkv(seed)), expected[seed])
    assert len(cache._entries) == (0 if name == "function" else 1)


@pytest.mark.parametrize("nonfinite", [torch.nan, torch.inf])
def test_cached_call_with_nonfinite_values(nonfinite: float) -> None:
    for name in ("lengths", "causal", "dropout"):
        x = _qkv()
        _results(_ARGUMENTS[name](0), x)
        with torch.no_grad():
            x[1][1, :, -1], x[0][0, 0, 0] = nonfinite, nonfinite
        found = _results(_ARGUMENTS[name](0), x)
        _clear()
        _assert_equal(found, _results(_ARGUMENTS[name](0), x))


def _tensors_of(component: Any) -> list[Tensor]:
    if isinstance(component, Tensor):
        return [component]
    parts = vars(component).values() if hasattr(component, "__dataclass_fields__") else ()
    return [x for part in parts for x in _tensors_of(part)]


def _make_calls(name: str) -> list[weakref.ref[Tensor]]:
    """Make calls and return weak references to all of their tensors."""
    x, arguments = _qkv(), _ARGUMENTS[name](0)
    for _ in range(3):
        _results(arguments, x)
    return [weakref.ref(y) for part in (*x, *arguments.values()) for y in _tensors_of(part)]


@pytest.mark.parametrize("name", _ARGUMENTS)
def test_cache_holds_no_tensors(name: str) -> None:
    references = _make_calls(name)
    gc.collect()
    assert len(references) >= 3
    assert [r for r in references if r() is not None] == []


def test_cache_size_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.plan.cache._MAX_ENTRIES", 3)
    for left in range(10):
        arguments = {"mask": mask.window(left, 0, "end")}
        _assert_equal(_results(arguments, _qkv()), _results(arguments, _qkv()))
        assert len(cache._entries) <= 3
    assert pack._packed_args.cache_info().maxsize is not None


# Arguments that depend on no length, and those of a call of L queries and S keys that do.
_FREE: dict[str, dict[str, Any]] = {
    "defaults": {"dropout": 0.1},
    "causal": {"mask": mask.causal("end") & ~mask.window(1, 0, "end")},
    "lengths": {"mask": mask.lengths([3, 2]) | mask.prefix(1)},
    "alibi": {"bias": position.ALiBi(align="end")},
    "t5": {"bias": position.T5(_random(8, _H), align=-2)},
    "summary": {"summary": Summary(lse=True, top=2, received=True), "softcap": 2.0},
    "sink": {"normalizer": normalizer.Softmax(_random(_H)), "score": score.Cosine(_random(_H).exp())},
}
_BOUND: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "tensor": lambda L, S: {"bias": _random(L, S)},
    "dense": lambda L, S: {"mask": mask.causal("end") & mask.dense(_random(L, S) > 0)},
    "documents": lambda L, S: {"mask": mask.documents((torch.arange(L) // 2, torch.arange(S) // 2))},
    "blocks": lambda L, S: {"mask": mask.blocks(_random(1, 2) > 0)},
    "rows": lambda L, S: {"summary": Summary(rows=-1)},
    "mass": lambda L, S: {"summary": Summary(mass=summary.groups(list(range(S))))},
}


def _at_length(L: int, S: int, arguments: dict[str, Any]) -> list[Tensor]:
    x = [_random(_B, heads, n, width) for heads, n, width in ((_H, L, _D), (2, S, _D), (2, S, 3))]
    return _flat(regard.attention(*x, **arguments, **({"seed": 3} if "dropout" in arguments else {})))


@pytest.mark.parametrize("name", [*_FREE, *_BOUND])
def test_entry_is_shared_between_lengths_where_nothing_depends_on_them(name: str) -> None:
    """As in decoding with a growing cache. Results equal those of calls that find nothing in the cache."""
    lengths, found = ((1, 7), (1, 8), (3, 9), (3, 2), (5, 5), (6, 6)), {}
    for L, S in lengths:
        arguments = _FREE[name] if name in _FREE else _BOUND[name](L, S)
        found[L, S] = _at_length(L, S, arguments)
    # Without an alignment, L = S is another case than L != S.
    assert len(cache._entries) == (2 if name in _FREE else len(lengths))
    for L, S in lengths:
        _clear()
        arguments = _FREE[name] if name in _FREE else _BOUND[name](L, S)
        _assert_equal(found[L, S], _at_length(L, S, arguments))


def test_checks_read_lengths_only_where_classes_say_so() -> None:
    """`check` of a class whose plans are cached for all lengths reads neither L nor S."""

    class NoLengths(Sizes):
        L = property(lambda self: pytest.fail("L is read"))  # type: ignore[assignment]
        S = property(lambda self: pytest.fail("S is read"))  # type: ignore[assignment]

        def __init__(self) -> None:
            self.__dict__.update(B=_B, H=_H, G=2)

    size, device = NoLengths(), torch.device("cpu")
    for arguments in _FREE.values():
        for component in arguments.values():
            if isinstance(component, mask.Mask):
                component.check(size, device)
            elif isinstance(component, position.Bias | normalizer.Normalizer | Summary):
                component.check(size)
    for table in (score._SCORES, normalizer._NORMALIZERS, position._BIASES):
        for kind in table.values():
            assert not kind.depends_on_lengths
            example = kind.example(_H, _D) if table is score._SCORES else kind.example(_H)
            example.check(size, *((_D, _D) if table is score._SCORES else ()))


def test_cache_distinguishes_types_of_equal_values() -> None:
    """True and 1 are equal, but have different cache keys."""
    q, k, v = _qkv()
    regard.attention(q, k, v, summary=Summary(lse=True))
    with pytest.raises(TypeError, match="summary: lse is 1"):
        regard.attention(q, k, v, summary=Summary(lse=1))  # type: ignore[arg-type]
    regard.attention(q, k, v, softcap=1.0)
    with pytest.raises(TypeError, match="softcap is True"):
        regard.attention(q, k, v, softcap=True)


def test_cache_with_copied_or_modified_components() -> None:
    x, component = _qkv(), mask.window(1, 0, "end")
    expected = {left: _results({"mask": mask.window(left, 0, "end")}, x) for left in (1, 3)}
    _assert_equal(_results({"mask": copy.deepcopy(component)}, x), expected[1])
    object.__setattr__(component, "left", 3)
    _assert_equal(_results({"mask": component}, x), expected[3])
    n = torch.tensor([3, 2])
    first = _results({"mask": mask.lengths(n)}, x)
    n += 1
    assert not torch.equal(_results({"mask": mask.lengths(n)}, x)[0], first[0])


def test_default_seed_is_drawn_per_call() -> None:
    q, k, v = _qkv()
    torch.manual_seed(0)
    first, second = (regard.attention(q, k, v, dropout=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(regard.attention(q, k, v, dropout=0.5), first)
    assert torch.equal(regard.attention(q, k, v, dropout=0.5), second)
    assert not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("before", ["fake", "inference", "vmap", "traced"])
def test_cache_after_calls_in_other_modes(before: str) -> None:
    """Entries made with fake tensors, in inference mode or in a graph do not affect later calls."""
    arguments = ({"softcap": 2.0}, _ARGUMENTS["lengths"](0), _ARGUMENTS["sink"](0))
    expected = [_results(component, _qkv()) for component in arguments]
    _clear()
    q, k, v = (x.detach() for x in _qkv())
    if before == "fake":
        with FakeTensorMode() as mode:
            assert regard.attention(*(mode.from_tensor(x) for x in (q, k, v)), softcap=2.0).shape == (_B, _H, _L, 3)
    for component in arguments:
        if before == "inference":
            with torch.inference_mode():
                regard.attention(q, k, v, **component)
        elif before == "vmap":
            torch.func.vmap(lambda q, component=component: regard.attention(q, k, v, **component))(torch.stack([q, q]))
        elif before == "traced":
            torch.jit.trace(
                lambda q, component=component: regard.attention(q, k, v, **component), (q,), check_trace=False
            )
    for component, tensors in zip(arguments, expected, strict=True):
        _assert_equal(_results(component, _qkv()), tensors)


def test_cache_is_thread_safe() -> None:
    names = [name for name in _ARGUMENTS if name != "function"]
    expected = {name: _results(_ARGUMENTS[name](0), _qkv()) for name in names}
    _clear()
    mismatches: list[str] = []

    def run(start: int) -> None:
        for i in range(2 * len(names)):
            name = names[(start + i) % len(names)]
            pairs = zip(_results(_ARGUMENTS[name](0), _qkv()), expected[name], strict=True)
            if not all(torch.equal(x, y) or bool(y.isnan().any()) for x, y in pairs):
                mismatches.append(name)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mismatches == []


# ---------------------------------------------------------------------------------------------------------------------
# The two paths into autograd.


@pytest.mark.parametrize("name", _ARGUMENTS)
def test_both_autograd_paths_give_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _results(_ARGUMENTS[name](0), _qkv())
    monkeypatch.setattr(autograd, "is_transformed", lambda: True)
    _assert_equal(_results(_ARGUMENTS[name](0), _qkv()), expected)


@pytest.mark.parametrize("name", ["causal", "sink", "bias"])
def test_second_derivatives_and_vmapped_gradients(name: str) -> None:
    """The backward pass is differentiable and can be vmapped."""
    x, arguments = _qkv(), _ARGUMENTS[name](0)
    out = regard.attention(*x, **arguments)
    weights = torch.stack([_random(*out.shape, seed=seed) for seed in range(3)])
    mapped = torch.func.vmap(lambda weight: torch.autograd.grad(out, x, weight, retain_graph=True))(weights)
    for i, weight in enumerate(weights):
        for got, expected in zip(mapped, torch.autograd.grad(out, x, weight, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], expected)
    seconds = {}
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        x = [y.detach().to(dtype).requires_grad_() for y in _qkv()]
        first = torch.autograd.grad(
            regard.attention(*x, **arguments, backend=backend).square().sum(), x, create_graph=True
        )
        assert all(y.requires_grad for y in first)
        seconds[backend, dtype] = torch.autograd.grad(sum(y.square().sum() for y in first), x)  # type: ignore[arg-type]
    got, baseline, exact = seconds.values()
    for which, *found in zip("qkv", got, baseline, exact, strict=True):
        budget.assert_within_budget(
            f"second derivative of {which}", found[0], ErrorBudget(exact=found[2], baseline=found[1])
        )
