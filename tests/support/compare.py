"""Compare outputs, summaries and gradients of a backend with those of the float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support import oracle
from support.budget import ErrorBudget, OverBudgetError, assert_within_budget, link_budgets
from support.problems import Problem
from torch import Tensor

import regard

Tensors = dict[str, Tensor]

# The backends under test, and their internal precision for half-precision inputs: float32, or None for that of the
# inputs. A backend listed here takes part in every comparison.
BACKENDS: dict[str, torch.dtype | None] = {"reference": torch.float32, "tiled": torch.float32}


# How often the error of the baseline is measured again if a backend exceeds its budget.
_REMEASUREMENTS = 32
# Number of random sign patterns used to estimate the magnitude of the terms of a gradient.
_SIGNS = 3


@dataclass
class Reference:
    """The expected results of a problem.

    Args:
        exact: all results of the float64 oracle, by name.
        baseline: the same in the precision of the backend.
        outputs: error budgets of the differentiable outputs, by name.
        gradients: error budgets of the gradients, by name of the tensor.
        cotangents: the gradients of the loss with respect to the outputs.
        eps_ratio: see `ErrorBudget`.
        tainted: bool (B, H, L), rows that NaN or inf reaches.
    """

    exact: Tensors
    baseline: Tensors
    outputs: dict[str, ErrorBudget]
    gradients: dict[str, ErrorBudget]
    cotangents: Tensors
    eps_ratio: float
    tainted: Tensor


def differentiable_outputs(problem: Problem) -> list[str]:
    """Return the names of the differentiable outputs of a problem."""
    names = ("out", *(problem.summary.outputs if problem.summary else ()))
    return [name for name in names if name != "top_keys"]


def compute_reference(problem: Problem, precision: torch.dtype | None = torch.float32) -> Reference:
    """Compute the results of the oracle, and the baseline in a precision (None for that of q)."""
    baseline_dtype = precision or problem.dtype
    eps_ratio = 1.0
    if problem.dtype == torch.float64:
        # The inputs are exact in float32. The errors of a float32 baseline are measurable, and scaled to float64.
        baseline_dtype, eps_ratio = torch.float32, torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    exact, leaves = evaluate_oracle(problem, torch.float64)
    weights = _cotangents(problem, exact)
    exact_gradients = gradients_of(exact, weights, leaves)
    sizes = _sizes(exact, weights, leaves)
    cancelled = _cancelled(exact, weights, leaves, problem.choices.get("dropout") or 0.0)
    baseline, leaves = evaluate_oracle(problem, baseline_dtype)
    baseline_gradients = gradients_of(baseline, weights, leaves)
    outputs = {name: ErrorBudget(exact[name], baseline[name], eps_ratio) for name in weights}
    gradients = {
        n: ErrorBudget(x, baseline_gradients[n], eps_ratio, sizes[n], cancelled[n]) for n, x in exact_gradients.items()
    }
    return Reference(
        exact,
        baseline,
        link_budgets(outputs),
        link_budgets(gradients, 1.0),
        weights,
        eps_ratio,
        problem.reached.any(-1),
    )


def _sizes(outputs: Tensors, weights: Tensors, leaves: Tensors) -> dict[str, float]:
    """Estimate the magnitude of the terms of each gradient: with random signs per row, terms no longer cancel.

    In the gradient of a bias the terms of one row cancel too, so each pair gets its own sign. If one key has all the
    weight, the weight times its derivative nearly vanishes, although the terms are of the order of 1.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = dict.fromkeys(leaves, 0.0)
    for _ in range(_SIGNS):
        flipped = {}
        for name, x in weights.items():
            signs = torch.randint(2, x.shape[:3], generator=generator) * 2.0 - 1
            flipped[name] = x * signs.view(*signs.shape, *[1] * (x.dim() - 3))
        for name, gradient in gradients_of(outputs, flipped, leaves).items():
            sizes[name] = max(sizes[name], gradient.abs().max().item() if gradient.numel() else 0.0)
    biases = {name: x for name, x in leaves.items() if name.startswith("bias")}
    if biases:
        pairs, full = gradients_of(outputs, weights, {"": outputs["bias"]})[""], outputs["full"].detach()
        for terms in [pairs, full] * _SIGNS:
            signs = torch.randint(2, pairs.shape, generator=generator) * 2.0 - 1
            for name, gradient in gradients_of({"": outputs["bias"]}, {"": terms * signs}, biases).items():
                sizes[name] = max(sizes[name], gradient.abs().max().item() if gradient.numel() else 0.0)
    return sizes


def _cancelled(outputs: Tensors, weights: Tensors, leaves: Tensors, rate: float) -> dict[str, float]:
    """Estimate the magnitude of the gradients before the row mean is subtracted: dS = P dP - P (sum of P dP).

    If a row has one key, the two terms are equal and their difference is pure rounding error, which is proportional to
    the terms of the sums over E. Rows get random signs, so that they do not cancel one another.
    """
    values = leaves["v"].detach().repeat_interleave(outputs["full"].shape[1] // max(leaves["v"].shape[1], 1), 1)
    pairs = outputs["full"].detach() * (weights["out"].abs() @ values.abs().mT / (1 - rate if rate < 1 else 1.0))
    generator, largest = torch.Generator().manual_seed(0), dict.fromkeys(leaves, 0.0)
    for _ in range(_SIGNS):
        signs = torch.randint(2, (*pairs.shape[:3], 1), generator=generator) * 2.0 - 1
        for name, x in gradients_of({"": outputs["scores"]}, {"": pairs * signs}, leaves).items():
            largest[name] = max(largest[name], x.abs().max().item() if x.numel() else 0.0)
    return largest


def evaluate_oracle(
    problem: Problem, dtype: torch.dtype, noise_generator: torch.Generator | None = None
) -> tuple[Tensors, Tensors]:
    """Return the results of the oracle in a precision, and the leaf tensors of its graph.

    With a `noise_generator`, the inputs and the scores are perturbed by up to one unit in the last place: inputs alone
    change nothing where a softcap or a bias rounds the scores to the same values.
    """

    def perturb(x: Tensor) -> Tensor:
        noise = (torch.rand(x.shape, generator=noise_generator, dtype=dtype) - 0.5) * torch.finfo(dtype).eps
        return torch.where(x.isfinite(), x + x.detach() * noise, x)

    leaves = {name: x.detach().to(dtype) for name, x in problem.clean.items()}
    if noise_generator is not None:
        leaves = {name: perturb(x) for name, x in leaves.items()}
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    return problem.solve(leaves, None if noise_generator is None else perturb), leaves


def _cotangents(problem: Problem, exact: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(len(problem.choices))
    result = {}
    for name in differentiable_outputs(problem):
        # Values that every dtype represents exactly.
        result[name] = torch.randn(exact[name].shape, generator=generator).bfloat16().double()
    # Where a derivative jumps, rounding decides which side a backend is on: these rows get a cotangent of 0.
    scale = exact["scores"].detach()
    scale = scale[scale.isfinite()].abs().max().item() if scale.isfinite().any() else 1.0
    margin = 256 * torch.finfo(torch.float32).eps * max(scale, 1.0)
    rows = oracle.kinks(exact, margin, problem.alpha, problem.summary.top if problem.summary else 0)
    jumps = {"max": rows["max"] | rows["weights"], "top_weights": rows["top"] | rows["weights"]}
    for name, weights in result.items():
        if name == "received":
            result[name] = weights * (not bool(rows["weights"].any()))
        elif name == "rows":
            chosen = jumps.get(name, rows["weights"])[:, :, list(problem.summary.row_numbers)]  # type: ignore[union-attr]
            result[name] = weights.masked_fill(chosen[..., None], 0.0)
        else:
            flags = jumps.get(name, rows["weights"])
            result[name] = weights.masked_fill(flags.view(*flags.shape, *[1] * (weights.dim() - 3)), 0.0)
    return result


def gradients_of(outputs: Tensors, weights: Tensors, leaves: Tensors) -> Tensors:
    """Return the gradients of the weighted sum of the outputs; 0 where autograd returns None."""
    used = [name for name in weights if outputs[name].requires_grad]
    results: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if used:
        grad_outputs = [weights[name].to(outputs[name].dtype) for name in used]
        sums = [outputs[name] for name in used]
        results = torch.autograd.grad(sums, list(leaves.values()), grad_outputs, allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(leaves.items(), results, strict=True)
    }


def run_backend(problem: Problem, backend: str | None, leaves: Tensors) -> Tensors:
    """Return the outputs and summaries of a backend by name; assert that this backend ran."""
    with regard.record_backends() as ran:
        result = regard.attention(**problem.arguments(leaves), backend=backend)
    assert backend is None or ran == [backend], f"{ran} ran instead of {backend}"
    if problem.summary is None:
        return {"out": result}
    out, summary = result
    results = {"out": out, **{name: x for name, x in summary._asdict().items() if x is not None and name != "top"}}
    if summary.top is not None:
        results["top_weights"], results["top_keys"] = summary.top
    return results


def new_leaves(problem: Problem) -> Tensors:
    """Return the tensors of a problem as new leaves, with the same memory layout."""
    return {name: x.detach().requires_grad_() for name, x in problem.tensors.items()}


def compare(problem: Problem, backend: str, reference: Reference) -> None:
    """Raise an AssertionError if the results of a backend exceed their error budgets.

    The largest error is often that of a single element, such as the one score next to a threshold, where derivatives
    magnify rounding errors. The error of the baseline may be small there by chance, so that about one correct result in
    1000 exceeds its budget. Therefore the baseline is measured again before the comparison fails.
    """
    try:
        compare_once(problem, backend, reference)
    except OverBudgetError:
        compare_once(problem, backend, remeasure_baseline(problem, reference))


def remeasure_baseline(problem: Problem, reference: Reference) -> Reference:
    """Return the reference with budgets that include the baseline errors on perturbed copies of the inputs."""
    outputs, gradients = dict(reference.outputs), dict(reference.gradients)
    for seed in range(_REMEASUREMENTS):
        noise_generator = torch.Generator().manual_seed(seed)
        baseline, leaves = evaluate_oracle(problem, reference.baseline["out"].dtype, noise_generator)
        results = gradients_of(baseline, reference.cotangents, leaves)
        for budgets, again in ((outputs, baseline), (gradients, results)):
            for name, y in budgets.items():
                budgets[name] = replace(y, least=max(y.least, replace(y, baseline=again[name]).error))
    return replace(reference, outputs=outputs, gradients=gradients)


def compare_once(problem: Problem, backend: str, reference: Reference) -> None:
    leaves = new_leaves(problem)
    results = run_backend(problem, backend, leaves)
    assert set(results) - {"top_keys"} == set(reference.cotangents), f"got {set(results)}"
    assert results["out"].dtype == problem.dtype
    clear = ~reference.tainted
    for name in reference.cotangents:
        compare_output(problem, name, results[name], reference, backend)
    if "top_keys" in results:
        compare_top(problem, results["top_weights"], results["top_keys"], reference)
    # Rows that NaN reaches propagate NaN to the gradients of all keys they attend to, and of every parameter.
    gradients = gradients_of(results, reference.cotangents, leaves)
    selected = {"q": clear[..., None]}
    if reference.tainted.any():
        touched = (reference.tainted[..., None] & problem.allowed).any(2)
        touched = touched.unflatten(1, (problem.tensors["k"].shape[1], -1)).any(2)[..., None]
        selected |= {"k": ~touched, "v": ~touched}
    for name, gradient in gradients.items():
        if name in "qkv" or not reference.tainted.any():
            assert gradient.dtype == problem.tensors[name].dtype
            assert_within_budget(f"gradient of {name}", gradient, reference.gradients[name], selected.get(name))


def _rows_with_nan(problem: Problem, where: str) -> Tensor:
    """Return the rows (B, H, L) whose query is NaN or that attend to NaN in k or v; inf is not included."""
    q, k = (problem.tensors[name].isnan().any(-1) for name in ("q", where))
    k = k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)
    return ((q[..., :, None] | k[..., None, :]) & problem.allowed).any(-1)


def compare_output(problem: Problem, name: str, got: Tensor, reference: Reference, backend: str = "") -> None:
    """Compare one output where NaN does not reach, and assert that it is NaN elsewhere."""
    tainted, where = reference.tainted, None
    if tainted.any():
        if name in ("out", "lse"):
            # The Triton kernels read q, k and v themselves, unless a score transforms them first.
            keeps_inf = backend == "triton" and problem.choices["score"] in ("scaled_dot", "dot")
            nan = _rows_with_nan(problem, "k") if keeps_inf else tainted
            assert bool(got[nan].isnan().all()), f"{name}: rows that attend to NaN are not NaN"
            if name == "out":
                assert bool(got[_rows_with_nan(problem, "v")].isnan().any(-1).all()), "NaN of a value is lost"
        if name == "received":
            where = ~(tainted[..., None] & problem.allowed).any(2)
        elif name == "rows":
            chosen = list(problem.summary.row_numbers)  # type: ignore[union-attr]
            where = ~(tainted[..., None] & problem.allowed)[:, :, chosen]
        elif name == "full":
            where = ~(tainted[..., None] & problem.allowed)
        else:
            where = ~tainted.view(*tainted.shape, *[1] * (got.dim() - 3))
    exact = reference.outputs[name]
    if name in ("received", "rows", "full") and where is not None:
        # Masked keys have weight 0, even in a row of NaN.
        cleared = [
            x.detach().masked_fill(tainted[..., None], 0.0)
            for x in (reference.exact["full"], reference.baseline["full"])
        ]
        chosen = list(problem.summary.row_numbers)  # type: ignore[union-attr]
        take = {"received": lambda x: x.sum(2), "rows": lambda x: x[:, :, chosen], "full": lambda x: x}[name]
        exact = replace(exact, exact=take(cleared[0]), baseline=take(cleared[1]))
    assert_within_budget(name, got, exact, where)


def compare_top(problem: Problem, weights: Tensor, keys: Tensor, reference: Reference) -> None:
    """Compare the top keys with their weights; -1 stands for no key."""
    clear = ~reference.tainted[..., None]
    full, present = reference.exact["full"].detach(), reference.exact["scores"].detach() > -torch.inf
    count = keys.shape[-1]
    expected = present.sum(-1, keepdim=True).clamp(max=count)
    assert bool((((keys >= 0).sum(-1, keepdim=True) == expected) | ~clear).all()), "top: wrong number of keys"
    assert bool(((keys < 0) <= (weights == 0)).logical_or(~clear).all()), "top: a weight without a key"
    sorted_keys = keys.sort(-1).values
    twice = (sorted_keys[..., 1:] == sorted_keys[..., :-1]) & (sorted_keys[..., 1:] >= 0)
    assert not bool((twice & clear).any()), "top: duplicate key"
    if full.shape[-1]:
        at_keys = torch.where(keys >= 0, full.gather(-1, keys.clamp(min=0)), 0.0)
        baseline = torch.where(keys >= 0, reference.baseline["full"].detach().gather(-1, keys.clamp(min=0)), 0.0)
        assert_within_budget(
            "top weights at their keys",
            weights,
            replace(reference.outputs["top_weights"], exact=at_keys, baseline=baseline),
            clear,
        )
