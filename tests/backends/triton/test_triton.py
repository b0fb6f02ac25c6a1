"""The Triton kernels in the interpreter on the CPU: every supported component against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.cases import BASE, CASES
from support.compare import compare, compare_output, compute_reference, run_backend
from support.problems import Problem, fixed_choices, make_problem, problems
from torch._subclasses.fake_tensor import FakeTensorMode

import regard
from regard import Summary, mask, normalizer, position, score
from regard.backends import choose
from regard.backends.registry import BACKENDS
from regard.backends.triton import backend, launch

# The interpreter warns about log2(0), the row sum of an empty row.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

# The interpreter takes milliseconds per tile. There are two tiles of queries and two of keys. Additive scores, the
# slowest, have smaller tensors.
_SIZES: dict[str, Any] = {"L": 35, "S": 67}
_ADDITIVE_SIZES: dict[str, Any] = {"L": 13, "S": 37, "B": 1}


def _refusal(problem: Problem) -> str | None:
    leaves = {name: x.detach() for name, x in problem.tensors.items()}
    return regard.explain(**problem.arguments(leaves)).reasons["triton"]


def _supported_cases() -> list[Any]:
    """Each case with its summary, or all summaries, and without any: only then do the kernels compute the gradients.

    `make test` runs one case of each kind, `make test-all` all of them.
    """
    cases, kinds = [], set()
    for name, choices in CASES.items():
        case_sizes = _ADDITIVE_SIZES if choices.get("score") == "additive" else _SIZES
        if not {"mask", "bias"} & {*choices}:
            case_sizes = {**case_sizes, "B": 1}  # only masks and biases differ by batch row
        kind = (
            name.split(":")[0],
            *(choices.get(component) for component in ("mask a", "score", "bias", "normalizer", "summary")),
        )
        for summary in dict.fromkeys((None, choices.get("summary", "all"))):
            case = {**BASE, **case_sizes, **choices, "summary": summary}
            if _refusal(make_problem(fixed_choices(case))) is None:
                is_quick = kind not in kinds
                kinds.add(kind)
                cases.append(pytest.param(case, id=f"{name}, {summary}", marks=() if is_quick else pytest.mark.slow))
    return cases


_SUPPORTED = _supported_cases()


def test_supported_cases_number() -> None:
    assert len(_SUPPORTED) > 150


@pytest.mark.parametrize("case", _SUPPORTED)
def test_component(case: dict[str, Any]) -> None:
    problem = make_problem(fixed_choices(case))
    compare(problem, "triton", compute_reference(problem))


# Problems that the backend refuses, by a part of the reason.
_REFUSED = {
    "float64": {"dtype": torch.float64},
    "the score FunctionScore": {"score": "lambda", "L": 5, "S": 7, "heads": (1, 1)},
    "Sparsemax": {"normalizer": "sparsemax"},
    "the mask Where": {"mask": "a", "mask a": "where"},
    "up to 64 largest": {"summary": "top", "top": 90},
    "width is 300": {"D": 300},
}


@pytest.mark.parametrize("reason", _REFUSED)
def test_refuse_unsupported_problems(reason: str) -> None:
    problem = make_problem(fixed_choices({**BASE, "summary": None, **_REFUSED[reason]}))
    refusal = _refusal(problem)
    assert refusal is not None and reason in refusal, refusal
    with pytest.raises(ValueError, match="backend is 'triton', which cannot serve this problem"):
        regard.attention(**problem.arguments(problem.tensors), backend="triton")


@pytest.mark.parametrize(("size", "reason"), [((1, 65_536, 1), "up to 65,535"), ((8, 4096, 65_536), "31 bits")])
def test_refuse_large_problems(size: tuple[int, int, int], reason: str) -> None:
    q = torch.zeros(1).expand(*size, 1)
    assert reason in str(regard.explain(q, q[:, :, :1], q[:, :, :1]).reasons["triton"])


def test_interpreter_is_not_chosen_automatically(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 5, 8)
    with regard.record_backends() as ran:
        regard.attention(q, q, q, mask=mask.dense(torch.ones(5, 5, dtype=torch.bool)), softcap=3.0)
        regard.attention(q.double(), q.double(), q.double())
    assert "triton" not in ran
    monkeypatch.delenv("TRITON_INTERPRET")
    assert regard.explain(q, q, q).reasons["triton"] == "the tensors are on cpu"


@pytest.mark.parametrize(
    ("arguments", "expected", "has_flags"),
    [
        ({}, "sdpa", False), ({"mask": mask.causal()}, "sdpa", True), ({"softcap": 3.0}, "triton", False),
        ({"mask": mask.causal() & mask.window(3, 0)}, "triton", False), ({"backend": "tiled"}, "tiled", False),
        ({"mask": mask.causal(), "backend": "reference"}, "reference", True),
    ],
)  # fmt: skip
def test_backend_chosen_for_cuda_tensors(
    arguments: dict[str, Any], expected: str, has_flags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the Triton kernels mask NaN themselves; the other backends get flags of nonfinite values."""
    monkeypatch.setattr(backend, "_unsupported_gpu", lambda device: None)
    monkeypatch.setattr(
        choose,
        "flag_nonfinite",
        lambda plan, tensors: (replace(plan, nonfinite_q=True) if plan.mask is not None else plan, tensors),
    )
    calls: list[tuple[str, bool]] = []

    def forward(name: str, plan: Any, tensors: Any, is_last: bool = False) -> Any:
        calls.append((name, plan.nonfinite_q is not None))
        return (tensors[0],) * (1 + BACKENDS[name].saved)

    for name, module in BACKENDS.items():
        monkeypatch.setattr(module, "forward", partial(forward, name))
    # Fake tensors have no values: the operator of compiled graphs takes them.
    monkeypatch.setattr(choose.compiled_ops, "run", forward)
    with FakeTensorMode():
        q = torch.empty(1, 2, 5, 8, device="cuda")
        assert regard.attention(q, q, q, **arguments).device.type == "cuda"
    assert calls == [(expected, has_flags)]


def test_refusal_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    q = torch.randn(1, 2, 5, 8)
    assert "pip install 'regard[gpu]'" in str(regard.explain(q, q, q).reasons["triton"])


_SUPPORTED_CHOICES = {
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


def _compare_if_supported(problem: Problem) -> None:
    if _refusal(problem) is None:
        compare(problem, "triton", compute_reference(problem))


@settings(max_examples=12, derandomize=True, **_COMMON)  # type: ignore[arg-type]
@given(problems(among=_SUPPORTED_CHOICES))
def test_random_problems(problem: Problem) -> None:
    _compare_if_supported(problem)


@pytest.mark.slow
@settings(max_examples=1000, derandomize=True, **_COMMON)  # type: ignore[arg-type]
@given(problems(among=_SUPPORTED_CHOICES))
def test_many_random_problems(problem: Problem) -> None:
    _compare_if_supported(problem)


# ---------------------------------------------------------------------------------------------------------------------
# Few queries: heads share a tile, and the keys are split among programs.

_FEW_QUERIES_CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": "a & b", "mask a": "lengths", "mask b": "causal", "align": "end"},
    "sink": {"with a sink": True},
    "alibi": {"bias": "alibi", "dropout": 0.3, "seed": 7},
    "lse": {"summary": "lse", "dtype": torch.bfloat16},
    "all": {"summary": "all", "normalizer": "sigmoid"},
}


@pytest.mark.parametrize("choices", _FEW_QUERIES_CHOICES.values(), ids=_FEW_QUERIES_CHOICES)
@pytest.mark.parametrize(("heads", "L"), [((1, 4), 1), ((2, 1), 3)])
def test_few_queries(heads: tuple[int, int], L: int, choices: dict[str, Any]) -> None:
    problem = make_problem(fixed_choices({**BASE, "L": L, "S": 71, "heads": heads, "summary": None, **choices}))
    compare(problem, "triton", compute_reference(problem))


@pytest.mark.parametrize("name", ["plain", "causal", "sink", "lse"])
@pytest.mark.parametrize("L", [1, 3])
def test_forward_splits_keys(name: str, L: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys are split where no backward pass follows."""
    splits: list[int] = []
    num_splits = launch._num_splits
    monkeypatch.setattr(launch, "_num_splits", lambda call: splits.append(num_splits(call)) or splits[-1])
    problem = make_problem(
        fixed_choices(
            {**BASE, "L": L, "S": 263, "B": 1, "heads": (2, 2), "summary": None, **_FEW_QUERIES_CHOICES[name]}
        )
    )
    reference = compute_reference(problem)
    with torch.no_grad():
        results = run_backend(problem, "triton", problem.tensors)
    assert splits[0] > 1
    for output, x in results.items():
        compare_output(problem, output, x, reference, "triton")


def _assert_accurate(result: torch.Tensor, baseline: torch.Tensor, exact: torch.Tensor) -> None:
    """Assert that the same elements are finite, and the error is at most 3 times that of float32 plus 8 eps."""
    is_finite = exact.isfinite()
    assert torch.equal(result.isfinite(), is_finite)
    error, baseline_error = (
        float((x.double() - exact).detach()[is_finite].abs().amax()) if is_finite.any() else 0.0
        for x in (result, baseline)
    )
    size = float(exact.detach()[is_finite].abs().amax()) if is_finite.any() else 0.0
    assert error <= 3 * baseline_error + 8 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("weigh", [normalizer.Softmax(), normalizer.Sigmoid()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(("key", "softcap"), [(7, None), (69, 2.0)])
@pytest.mark.parametrize(
    ("where", "nonfinite"), [("q", torch.nan), ("k", torch.inf), ("k", -torch.inf), ("v", torch.inf), (None, 0.0)]
)
def test_nonfinite_values_do_not_leak_through_mask(
    where: str | None, nonfinite: float, key: int, softcap: float | None, weigh: normalizer.Normalizer
) -> None:
    """In full and in partial tiles, results are the same as without the masked keys."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": (2, 2, 19, 8), "k": (2, 1, 71, 8), "v": (2, 1, 71, 8)}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    if where is not None:
        tensors[where][0, 0, min(key, tensors[where].shape[2] - 1), 3] = nonfinite
    tensors["k"][1, 0, 60, 0], tensors["v"][1, 0, 38, 2] = torch.nan, -torch.inf  # beyond the length
    arguments: dict[str, Any] = {"normalizer": weigh, "softcap": softcap, "summary": Summary(lse=True)}
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    out, summary = regard.attention(**leaves, **arguments, mask=mask.lengths([71, 38]), backend="triton")
    results = [[out[b], summary.lse[b]] for b in range(2)]
    results[1] += [x[1] for x in torch.autograd.grad(out[1].square().sum(), list(leaves.values()))]
    for b, length in enumerate((71, 38)):
        expected = []
        for dtype in (torch.float32, torch.float64):
            unmasked = {name: x[b : b + 1, :, :length].to(dtype).requires_grad_() for name, x in tensors.items()}
            out, summary = regard.attention(**unmasked, **arguments, backend="reference")
            expected.append([out[0], summary.lse[0]])
            if b == 1:
                expected[-1] += [x[0] for x in torch.autograd.grad(out.square().sum(), list(unmasked.values()))]
        for x, baseline, exact in zip(results[b], *expected, strict=True):
            assert bool((x[:, exact.shape[1] :] == 0).all()), "keys beyond the length have a gradient"
            _assert_accurate(x[:, : exact.shape[1]], baseline, exact)


# ---------------------------------------------------------------------------------------------------------------------
# Additive scores: the fast formula, the bounded one, and tanh itself, forward and backward.


@pytest.mark.parametrize("limit", [1.0, 9.0, 60.0], ids=["fast", "bounded", "tanh"])
@pytest.mark.parametrize("per_head", [False, True])
def test_additive_score(per_head: bool, limit: float) -> None:
    generator = torch.Generator().manual_seed(1)

    def tensors() -> list[torch.Tensor]:
        q, k = (torch.randn(1, h, n, 13, generator=generator) * limit / 3 for h, n in ((4, 19), (2, 37)))
        w = torch.randn(*((4,) if per_head else ()), 13, generator=generator)
        return [x.clamp(-limit, limit) for x in (q, k)] + [torch.randn(1, 2, 37, 5, generator=generator), w]

    inputs = tensors()
    cotangent = torch.randn(1, 4, 19, 5, generator=generator)
    results = {}
    for name, backend_name, dtype in (
        ("exact", "reference", torch.float64),
        ("baseline", "reference", None),
        ("triton", "triton", None),
    ):
        q, k, v, w = (x.to(dtype or x.dtype).requires_grad_() for x in inputs)
        out = regard.attention(q, k, v, score=score.Additive(w), mask=mask.causal("end"), backend=backend_name)
        results[name] = [out, *torch.autograd.grad(out, (q, k, v, w), cotangent.to(out.dtype))]
    for exact, baseline, result in zip(*results.values(), strict=True):
        _assert_accurate(result, baseline, exact)


# ---------------------------------------------------------------------------------------------------------------------
# The rest of the contract.


def test_results_are_deterministic() -> None:
    q, k = (torch.randn(1, 4, 37, 16, requires_grad=True), torch.randn(1, 2, 40, 16, requires_grad=True))
    table = torch.randn(8, 4, requires_grad=True)
    results = []
    for _ in range(2):
        out = regard.attention(q, k, k, bias=position.T5(table, align="end"), dropout=0.2, seed=5, backend="triton")
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, table))])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_torch_compile() -> None:
    q = torch.randn(1, 2, 40, 16, requires_grad=True)

    def run(q: torch.Tensor) -> torch.Tensor:
        return regard.attention(q, q, q, mask=mask.causal(), softcap=5.0, backend="triton").square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), run(q))
    torch.testing.assert_close(torch.autograd.grad(compiled(q), q), torch.autograd.grad(run(q), q))
