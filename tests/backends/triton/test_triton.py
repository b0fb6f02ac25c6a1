"""The Triton kernels, by the interpreter on the CPU: every word that they serve against the oracle, as for every kernel."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.cases import CASES, PLAIN
from support.compare import ask, judge, judge_output, truth
from support.problems import Problem, decided, make, problems
from torch._subclasses.fake_tensor import FakeTensorMode

import regard
from regard import Summary, mask, normalizer, position, score
from regard.backends import choose
from regard.backends.registry import BACKENDS
from regard.backends.triton import backend as serve
from regard.backends.triton import launch, tuning
from regard.backends.triton import mask as gpu_mask
from regard.backends.triton.bias_grad import unfold
from regard.components.tile import Grid, Sizes

# What is empty has no logarithm, which the interpreter minds and a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

# The interpreter needs milliseconds for a tile: there are two of queries and two of keys, and of additive scores, which take
# the longest, fewer numbers.
_FEW: dict[str, Any] = {"L": 41, "S": 75}
_FEWER: dict[str, Any] = {"L": 13, "S": 37, "B": 1}


def _why_not(problem: Problem) -> str | None:
    leaves = {name: x.detach() for name, x in problem.tensors.items()}
    return regard.explain(**problem.ask(leaves)).reasons["triton"]


def _served() -> list[Any]:
    """Each case with the summary it names, or with all, and without any: then the kernels take the gradients themselves. One of
    each kind is run by `make test`, the others by `make test-all`.
    """
    cases, kinds = [], set()
    for name, choices in CASES.items():
        few = _FEWER if choices.get("score") == "additive" else _FEW
        kind = (
            name.split(":")[0],
            *(choices.get(word) for word in ("mask a", "score", "bias", "normalizer", "summary")),
        )
        for summary in dict.fromkeys((None, choices.get("summary", "all"))):
            case = {**PLAIN, **few, **choices, "summary": summary}
            if _why_not(make(decided(case))) is None:
                quick = kind not in kinds
                kinds.add(kind)
                cases.append(pytest.param(case, id=f"{name}, {summary}", marks=() if quick else pytest.mark.slow))
    return cases


_SERVED = _served()


def test_most_is_served() -> None:
    assert len(_SERVED) > 150


@pytest.mark.parametrize("case", _SERVED)
def test_word(case: dict[str, Any]) -> None:
    problem = make(decided(case))
    judge(problem, "triton", truth(problem))


# What the kernels leave to others, by a part of the reason.
_LEFT = {
    "float64": {"dtype": torch.float64},
    "neither": {"score": "lambda", "L": 5, "S": 7, "heads": (1, 1)},
    "Sparsemax": {"normalizer": "sparsemax"},
    "masks in Python": {"mask": "a", "mask a": "where"},
    "64 largest": {"summary": "top", "top": 90},
    "300": {"D": 300},
}


@pytest.mark.parametrize("reason", _LEFT)
def test_what_is_left_to_others(reason: str) -> None:
    problem = make(decided({**PLAIN, "summary": None, **_LEFT[reason]}))
    found = _why_not(problem)
    assert found is not None and reason in found, found
    with pytest.raises(ValueError, match="kernel is 'gpu', which cannot serve this problem"):
        regard.attention(**problem.ask(problem.tensors), backend="triton")


@pytest.mark.parametrize(("size", "reason"), [((1, 65_536, 1), "65,535 heads"), ((8, 4096, 65_536), "31 bits")])
def test_what_is_too_much_is_left_to_others(size: tuple[int, int, int], reason: str) -> None:
    q = torch.zeros(1).expand(*size, 1)
    assert reason in str(regard.explain(q, q[:, :, :1], q[:, :, :1]).reasons["triton"])


@pytest.mark.parametrize("row", [128, 256, 512, 1024])
@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_tiles_fit_the_shared_memory(row: int, shared: int) -> None:
    for shape in (tuning._FEW[256], tuning._DEFAULT[64], tuning.Shape(128, 128, 8, 3)):
        found = tuning.fitting(shape, row, shared)
        assert tuning._taken(found, row) <= shared or found.keys == tuning._FEWEST
        assert found.queries == shape.queries and (found == shape or tuning._taken(shape, row) > shared)


def test_nobody_is_interpreted_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 5, 8)
    with regard.record_backends() as ran:
        regard.attention(q, q, q, mask=mask.dense(torch.ones(5, 5, dtype=torch.bool)), softcap=3.0)
        regard.attention(q.double(), q.double(), q.double())
    assert "triton" not in ran
    monkeypatch.delenv("TRITON_INTERPRET")
    assert regard.explain(q, q, q).reasons["triton"] == "the tensors are on cpu"


@pytest.mark.parametrize(
    ("words", "served", "flags"),
    [
        ({}, "sdpa", False), ({"mask": mask.causal()}, "sdpa", True), ({"softcap": 3.0}, "triton", False),
        ({"mask": mask.causal() & mask.window(3, 0)}, "triton", False), ({"backend": "tiled"}, "tiled", False),
        ({"mask": mask.causal(), "backend": "reference"}, "reference", True),
    ],
)  # fmt: skip
def test_who_serves_tensors_of_a_gpu(
    words: dict[str, Any], served: str, flags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the kernels of the GPU keep NaN from leaking by themselves; the others are told where it is."""
    monkeypatch.setattr(serve, "_unfit", lambda device: None)
    monkeypatch.setattr(
        choose,
        "flag_nonfinite",
        lambda plan, tensors: (replace(plan, nonfinite_q=True) if plan.mask is not None else plan, tensors),
    )
    asked: list[tuple[str, bool]] = []

    def forward(name: str, plan: Any, tensors: Any, is_last: bool = False) -> Any:
        asked.append((name, plan.nonfinite_q is not None))
        return (tensors[0],) * (1 + BACKENDS[name].saved)

    for name, backend in BACKENDS.items():
        monkeypatch.setattr(backend, "forward", partial(forward, name))
    with FakeTensorMode():
        q = torch.empty(1, 2, 5, 8, device="cuda")
        assert regard.attention(q, q, q, **words).device.type == "cuda"
    assert asked == [(served, flags)]


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    q = torch.randn(1, 2, 5, 8)
    assert "pip install 'regard[gpu]'" in str(regard.explain(q, q, q).reasons["triton"])


_NATIVE = {
    "score": ("scaled_dot", "dot", "cosine", "bilinear", "gaussian", "distance", "additive"),
    "normalizer": ("softmax", "softmax", "sigmoid"),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "summary": (None, None, "lse", "all"),
    "L": (1, 5, 31, 37),
    "S": (1, 13, 31, 67),
    "heads": ((1, 1), (1, 2), (2, 1)),
    "B": (1, 2),
}
_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def _judge_if_served(problem: Problem) -> None:
    if _why_not(problem) is None:
        judge(problem, "triton", truth(problem))


@settings(max_examples=12, derandomize=True, **_COMMON)  # type: ignore[arg-type]
@given(problems(among=_NATIVE))
def test_random(problem: Problem) -> None:
    _judge_if_served(problem)


@pytest.mark.slow
@settings(max_examples=1000, derandomize=True, **_COMMON)  # type: ignore[arg-type]
@given(problems(among=_NATIVE))
def test_many_random(problem: Problem) -> None:
    _judge_if_served(problem)


# ---------------------------------------------------------------------------------------------------------------------
# Few queries: heads share a tile, and the keys are split.

_WORDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": "a & b", "mask a": "lengths", "mask b": "causal", "align": "end"},
    "sink": {"with a sink": True},
    "alibi": {"bias": "alibi", "dropout": 0.3, "seed": 7},
    "lse": {"summary": "lse", "dtype": torch.bfloat16},
    "all": {"summary": "all", "normalizer": "sigmoid"},
}


@pytest.mark.parametrize("words", _WORDS.values(), ids=_WORDS)
@pytest.mark.parametrize(("heads", "L"), [((2, 4), 1), ((4, 1), 3)])
def test_few_queries(heads: tuple[int, int], L: int, words: dict[str, Any]) -> None:
    problem = make(decided({**PLAIN, "L": L, "S": 263, "heads": heads, "summary": None, **words}))
    judge(problem, "triton", truth(problem))


@pytest.mark.parametrize("words", ["plain", "causal", "sink", "lse"])
@pytest.mark.parametrize("L", [1, 3])
def test_keys_are_split(words: str, L: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no backward pass follows."""
    parts: list[int] = []
    split = launch._parts
    monkeypatch.setattr(launch, "_parts", lambda call: parts.append(split(call)) or parts[-1])
    problem = make(decided({**PLAIN, "L": L, "S": 263, "B": 1, "heads": (2, 2), "summary": None, **_WORDS[words]}))
    told = truth(problem)
    with torch.no_grad():
        found = ask(problem, "triton", problem.tensors)
    assert parts[0] > 1
    for name, x in found.items():
        judge_output(problem, name, x, told, "triton")


def _assert_as_good(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """As near to the exact result as the plain one in float32 is, but for a few roundings, and finite in the same places."""
    there = exact.isfinite()
    assert torch.equal(got.isfinite(), there)
    error, allowed = (
        float((x.double() - exact).detach()[there].abs().amax()) if there.any() else 0.0 for x in (got, plain)
    )
    size = float(exact.detach()[there].abs().amax()) if there.any() else 0.0
    assert error <= 3 * allowed + 8 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("word", [normalizer.Softmax(), normalizer.Sigmoid()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(("key", "softcap"), [(7, None), (133, 2.0)])
@pytest.mark.parametrize(
    ("where", "wild"), [("q", torch.nan), ("k", torch.inf), ("k", -torch.inf), ("v", torch.inf), (None, 0.0)]
)
def test_what_is_wild_is_as_arithmetic_makes_it(
    where: str | None, wild: float, key: int, softcap: float | None, word: normalizer.Normalizer
) -> None:
    """In tiles where all may attend, and where only some may: the same as if what is masked out were not there."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": (2, 2, 37, 8), "k": (2, 1, 135, 8), "v": (2, 1, 135, 8)}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    if where is not None:
        tensors[where][0, 0, min(key, tensors[where].shape[2] - 1), 3] = wild
    tensors["k"][1, 0, 100, 0], tensors["v"][1, 0, 71, 2] = torch.nan, -torch.inf  # beyond the length: it may not leak
    words: dict[str, Any] = {"normalizer": word, "softcap": softcap, "summary": Summary(lse=True)}
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    out, seen = regard.attention(**leaves, **words, mask=mask.lengths([135, 70]), backend="triton")
    got = [[out[b], seen.lse[b]] for b in range(2)]
    got[1] += [x[1] for x in torch.autograd.grad(out[1].square().sum(), list(leaves.values()))]
    for b, length in enumerate((135, 70)):
        answers = []
        for dtype in (torch.float32, torch.float64):
            some = {name: x[b : b + 1, :, :length].to(dtype).requires_grad_() for name, x in tensors.items()}
            out, seen = regard.attention(**some, **words, backend="reference")
            answers.append([out[0], seen.lse[0]])
            if b == 1:
                answers[-1] += [x[0] for x in torch.autograd.grad(out.square().sum(), list(some.values()))]
        for x, plain, exact in zip(got[b], *answers, strict=True):
            assert bool((x[:, exact.shape[1] :] == 0).all()), "what is beyond the length has a gradient"
            _assert_as_good(x[:, : exact.shape[1]], plain, exact)


# ---------------------------------------------------------------------------------------------------------------------
# Additive scores: the fast form, that with a bound, and tanh itself, forward and backward.


@pytest.mark.parametrize("reach", [1.0, 9.0, 60.0], ids=["fast", "bounded", "tanh"])
@pytest.mark.parametrize("per_head", [False, True])
def test_additive(per_head: bool, reach: float) -> None:
    generator = torch.Generator().manual_seed(1)

    def tensors() -> list[torch.Tensor]:
        q, k = (torch.randn(1, h, n, 13, generator=generator) * reach / 3 for h, n in ((4, 37), (2, 70)))
        w = torch.randn(*((4,) if per_head else ()), 13, generator=generator)
        return [x.clamp(-reach, reach) for x in (q, k)] + [torch.randn(1, 2, 70, 5, generator=generator), w]

    given = tensors()
    cotangent = torch.randn(1, 4, 37, 5, generator=generator)
    answers = {}
    for name, kernel, dtype in (
        ("exact", "reference", torch.float64),
        ("plain", "reference", None),
        ("triton", "triton", None),
    ):
        q, k, v, w = (x.to(dtype or x.dtype).requires_grad_() for x in given)
        out = regard.attention(q, k, v, score=score.Additive(w), mask=mask.causal("end"), backend=kernel)
        answers[name] = [out, *torch.autograd.grad(out, (q, k, v, w), cotangent.to(out.dtype))]
    for exact, plain, got in zip(*answers.values(), strict=True):
        _assert_as_good(got, plain, exact)


# ---------------------------------------------------------------------------------------------------------------------
# Masks as parts and lists.

_IDS = torch.arange(67) // 23
_MASKS = {
    "causal": mask.causal(),
    "window": mask.causal() & mask.window(9, 0),
    "lengths": mask.lengths(torch.tensor([40, 0])),
    "documents": mask.documents(_IDS) & mask.causal(),
    "either": mask.causal() & mask.lengths(torch.tensor([50, 9])) | mask.prefix(3),
    "denied": ~(mask.causal() & ~mask.documents(_IDS)) | mask.dense(torch.eye(67, dtype=torch.bool)),
    "blocks": mask.blocks(torch.eye(3, dtype=torch.bool)[None, None], size=(23, 23)),
    "all": ~(mask.causal() & ~mask.causal()),
    "nothing": mask.causal() & ~mask.causal(),
}


@pytest.mark.parametrize("name", _MASKS)
def test_the_terms_of_a_mask_say_what_it_says(name: str) -> None:
    size = Sizes(2, 1, 1, 67, 67)
    tile = regard.components.tile.Tile((0, 2), (0, 1), (0, 67), (0, 67), size, torch.device("cpu"))
    own = regard.plan.problem.align(_MASKS[name], None, size)[0]
    some = torch.zeros(2, 1, 67, 67, dtype=torch.bool)
    for term in gpu_mask.terms(own):
        every = torch.ones_like(some)
        for literal, denied in term:
            every &= literal.allowed(tile) ^ denied
        some |= every
    assert torch.equal(some, own.allowed(tile).expand_as(some))
    parts = serve._parts(own)
    assert parts is not None and parts[0] >= sum(len(term) for term in gpu_mask.terms(own))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", _MASKS)
def test_every_tile_that_holds_something_is_listed(name: str, turned: bool) -> None:
    size, (rows, columns) = Sizes(2, 1, 1, 67, 67), (32, 16)
    own = regard.plan.problem.align(_MASKS[name], None, size)[0]
    tile = regard.components.tile.Tile((0, 2), (0, 1), (0, 67), (0, 67), size, torch.device("cpu"))
    allowed = own.allowed(tile).expand(2, 1, 67, 67)[:, 0]
    order, counts = gpu_mask._lists(own, size, rows, columns, torch.device("cpu"), turned)
    grid = Grid.of(size, rows, columns, torch.device("cpu"))
    lines, places = (3, 5)[:: -1 if turned else 1]
    assert order.shape[1:] == (lines, places) and len(grid.first_query) == 3
    for b, line in itertools.product(range(2), range(lines)):
        full, partial = counts[b % len(counts), line].tolist()
        listed = order[b % len(order), line].tolist()
        for n, place in enumerate(listed):
            r, c = (place, line) if turned else (line, place)
            part = allowed[b, r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
            if n < full:
                assert part.shape == (rows, columns) and bool(part.all())
            elif n >= full + partial:
                assert not bool(part.any())


def test_sums_of_diagonals_become_sums_of_distances() -> None:
    T, R, C, L, S = 4, 3, 2, 11, 7
    full = torch.zeros(R * T, C * T)
    full[:L, :S] = torch.randn(L, S)
    diagonals = torch.zeros(1, R + C - 1, T, T)
    for r, c in itertools.product(range(R), range(C)):
        diagonals[0, r - c + C - 1] += full[r * T : (r + 1) * T, c * T : (c + 1) * T]
    table = unfold(diagonals, S)
    for distance in range(L + S - 1):
        torch.testing.assert_close(table[0, distance], full[:L, :S].diagonal(S - 1 - distance).sum())


# ---------------------------------------------------------------------------------------------------------------------
# The rest of the contract.


def test_the_same_bits_every_time() -> None:
    q, k = (torch.randn(1, 4, 37, 16, requires_grad=True), torch.randn(1, 2, 40, 16, requires_grad=True))
    table = torch.randn(8, 4, requires_grad=True)
    answers = []
    for _ in range(2):
        out = regard.attention(q, k, k, bias=position.T5(table, align="end"), dropout=0.2, seed=5, backend="triton")
        answers.append([out, *torch.autograd.grad(out.square().sum(), (q, k, table))])
    assert all(torch.equal(x, y) for x, y in zip(*answers, strict=True))


def test_a_compiled_graph_holds_it() -> None:
    q = torch.randn(1, 2, 40, 16, requires_grad=True)

    def run(q: torch.Tensor) -> torch.Tensor:
        return regard.attention(q, q, q, mask=mask.causal(), softcap=5.0, backend="triton").square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), run(q))
    torch.testing.assert_close(torch.autograd.grad(compiled(q), q), torch.autograd.grad(run(q), q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
def test_distances_are_gathered_along_diagonals_of_squares(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuning._INTERPRETED.queries != tuning._INTERPRETED.keys, "so that no axis is mistaken for another"
    monkeypatch.setattr(tuning, "is_interpreted", lambda: False)
    for architecture in ((8, 0), (8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(tuning, "_architecture", lambda device, found=architecture: found)
        for kernel in ("gather", "additive gather"):
            shape = tuning.shape(kernel, dtype, width, torch.device("cuda"))
            assert shape.queries == shape.keys
