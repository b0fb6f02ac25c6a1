"""Ask the library and the oracle the same, outputs, summaries and gradients, and hold one against the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support import oracle
from support.budget import OverBudgetError, Yardstick, check, related
from support.problems import Problem
from torch import Tensor

import regard

Tensors = dict[str, Tensor]

# The kernels under test, and the precision that they work in on half-precision inputs: float32 inside, or (None) that of
# the inputs. A new kernel joins every test here.
KERNELS: dict[str, torch.dtype | None] = {"reference": torch.float32, "tiled": torch.float32}


# How often the plain way is measured again where a kernel is over budget.
_AGAIN = 32
# How often the signs of the rows are drawn to find out how large the terms of a gradient are.
_SIGNS = 3


@dataclass
class Truth:
    """What the oracle says of a problem: outputs and gradients by name, the former also with all else it knows; the
    weights of the sum that is differentiated; the rows (B, H, L) which NaN or inf reaches."""

    exact: Tensors
    straight: Tensors
    outputs: dict[str, Yardstick]
    gradients: dict[str, Yardstick]
    cotangents: Tensors
    grain: float
    tainted: Tensor


def wanted(problem: Problem) -> list[str]:
    """The differentiable outputs of a problem, by name."""
    names = ("out", *(problem.summary.outputs if problem.summary else ()))
    return [name for name in names if name != "top_keys"]


def truth(problem: Problem, precision: torch.dtype | None = torch.float32) -> Truth:
    """The oracle's answers, and those of the plain way in a precision (None = that of q)."""
    straight_dtype = precision or problem.dtype
    grain = 1.0
    if problem.dtype == torch.float64:
        # The inputs are numbers of float32: there the errors of the plain way can be seen, and scaled down.
        straight_dtype, grain = torch.float32, torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    exact, leaves = solved(problem, torch.float64)
    weights = _cotangents(problem, exact)
    exact_gradients = gradients_of(exact, weights, leaves)
    sizes = _sizes(exact, weights, leaves)
    cancelled = _cancelled(exact, weights, leaves, problem.choices.get("dropout") or 0.0)
    straight, leaves = solved(problem, straight_dtype)
    straight_gradients = gradients_of(straight, weights, leaves)
    outputs = {name: Yardstick(exact[name], straight[name], grain) for name in weights}
    gradients = {
        n: Yardstick(x, straight_gradients[n], grain, sizes[n], cancelled[n]) for n, x in exact_gradients.items()
    }
    return Truth(exact, straight, related(outputs), related(gradients, 1.0), weights, grain, problem.reached.any(-1))


def _sizes(outputs: Tensors, weights: Tensors, leaves: Tensors) -> dict[str, float]:
    """How large the terms of the gradients are: under other signs of the rows, what cancels does so no longer.

    In the gradient of a bias even the terms of one row cancel: there each pair has a sign of its own. And where one key has
    all the weight, next to nothing is left of the weight times its derivative, which is of the size of 1.
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
    """How large the gradients are before the mean over the row is subtracted: dS = P dP - P (sum of P dP). Where a row has
    one key these are equal, and what is left of them is what the two were rounded by: as sums over the values, in
    proportion to the terms of these. Of each row by itself, so that under other signs of the rows, what cancels does so no
    longer.
    """
    values = leaves["v"].detach().repeat_interleave(outputs["full"].shape[1] // max(leaves["v"].shape[1], 1), 1)
    pairs = outputs["full"].detach() * (weights["out"].abs() @ values.abs().mT / (1 - rate if rate < 1 else 1.0))
    generator, largest = torch.Generator().manual_seed(0), dict.fromkeys(leaves, 0.0)
    for _ in range(_SIGNS):
        signs = torch.randint(2, (*pairs.shape[:3], 1), generator=generator) * 2.0 - 1
        for name, x in gradients_of({"": outputs["scores"]}, {"": pairs * signs}, leaves).items():
            largest[name] = max(largest[name], x.abs().max().item() if x.numel() else 0.0)
    return largest


def solved(problem: Problem, dtype: torch.dtype, blur: torch.Generator | None = None) -> tuple[Tensors, Tensors]:
    """What the oracle says in some precision, and the leaves that its graph starts from: with a `blur`, the numbers of the
    problem are off by up to a unit of the last place.
    """
    leaves = {name: x.detach().to(dtype) for name, x in problem.clean.items()}
    if blur is not None:
        noise = {
            n: (torch.rand(x.shape, generator=blur, dtype=dtype) - 0.5) * torch.finfo(dtype).eps
            for n, x in leaves.items()
        }
        leaves = {name: torch.where(x.isfinite(), x + x * noise[name], x) for name, x in leaves.items()}
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    return problem.solve(leaves), leaves


def _cotangents(problem: Problem, exact: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(len(problem.choices))
    result = {}
    for name in wanted(problem):
        # Numbers that every dtype can hold.
        result[name] = torch.randn(exact[name].shape, generator=generator).bfloat16().double()
    # Where a derivative jumps, rounding decides which one a kernel finds; where NaN is, there is nothing to compare.
    scale = exact["scores"].detach()
    scale = scale[scale.isfinite()].abs().max().item() if scale.isfinite().any() else 1.0
    margin = 256 * torch.finfo(torch.float32).eps * max(scale, 1.0)
    rows = oracle.kinks(exact, margin, problem.alpha, problem.summary.top if problem.summary else 0)
    silent = {"max": rows["max"] | rows["weights"], "top_weights": rows["top"] | rows["weights"]}
    for name, weights in result.items():
        if name == "received":
            result[name] = weights * (not bool(rows["weights"].any()))
        elif name == "rows":
            chosen = silent.get(name, rows["weights"])[:, :, list(problem.summary.row_numbers)]  # type: ignore[union-attr]
            result[name] = weights.masked_fill(chosen[..., None], 0.0)
        else:
            flags = silent.get(name, rows["weights"])
            result[name] = weights.masked_fill(flags.view(*flags.shape, *[1] * (weights.dim() - 3)), 0.0)
    return result


def gradients_of(outputs: Tensors, weights: Tensors, leaves: Tensors) -> Tensors:
    """The gradients of the weighted sum of the outputs; 0 where there is none."""
    used = [name for name in weights if outputs[name].requires_grad]
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if used:
        given = [weights[name].to(outputs[name].dtype) for name in used]
        sums = [outputs[name] for name in used]
        found = torch.autograd.grad(sums, list(leaves.values()), given, allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(leaves.items(), found, strict=True)
    }


def ask(problem: Problem, kernel: str | None, leaves: Tensors) -> Tensors:
    """The library's outputs and summaries, by name; it proves that this kernel ran."""
    with regard.record_backends() as ran:
        answer = regard.attention(**problem.ask(leaves), backend=kernel)
    assert kernel is None or ran == [kernel], f"{ran} ran instead of {kernel}"
    if problem.summary is None:
        return {"out": answer}
    out, seen = answer
    found = {"out": out, **{name: x for name, x in seen._asdict().items() if x is not None and name != "top"}}
    if seen.top is not None:
        found["top_weights"], found["top_keys"] = seen.top
    return found


def fresh(problem: Problem) -> Tensors:
    """The tensors of a problem as new leaves, laid out as they are."""
    return {name: x.detach().requires_grad_() for name, x in problem.tensors.items()}


def judge(problem: Problem, kernel: str, told: Truth) -> None:
    """Raise an AssertionError unless a kernel gives what the oracle says, within the budget.

    The largest error is often that of a single number: of the one large weight, or of the one score beside a threshold,
    where derivatives magnify what was rounded. The plain way may be right there by luck, and once in a thousand problems
    the kernel is not; so where a kernel is over budget, the plain way is measured again.
    """
    try:
        compare_all(problem, kernel, told)
    except OverBudgetError:
        compare_all(problem, kernel, measured_again(problem, told))


def measured_again(problem: Problem, told: Truth) -> Truth:
    """The same truth with yardsticks that know more errors of the plain way: on the same numbers, rounded once more."""
    outputs, gradients = dict(told.outputs), dict(told.gradients)
    for seed in range(_AGAIN):
        blur = torch.Generator().manual_seed(seed)
        straight, leaves = solved(problem, told.straight["out"].dtype, blur)
        found = gradients_of(straight, told.cotangents, leaves)
        for yardsticks, again in ((outputs, straight), (gradients, found)):
            for name, y in yardsticks.items():
                yardsticks[name] = replace(y, least=max(y.least, replace(y, straight=again[name]).error))
    return replace(told, outputs=outputs, gradients=gradients)


def compare_all(problem: Problem, kernel: str, told: Truth) -> None:
    leaves = fresh(problem)
    found = ask(problem, kernel, leaves)
    assert set(found) - {"top_keys"} == set(told.cotangents), f"{set(found)} were given"
    assert found["out"].dtype == problem.dtype
    clear = ~told.tainted
    for name in told.cotangents:
        judge_output(problem, name, found[name], told, kernel)
    if "top_keys" in found:
        judge_top(problem, found["top_weights"], found["top_keys"], told)
    # Rows that NaN reaches give NaN to the gradients of all that they attend to, and of every parameter.
    gradients = gradients_of(found, told.cotangents, leaves)
    places = {"q": clear[..., None]}
    if told.tainted.any():
        touched = (told.tainted[..., None] & problem.allowed).any(2)
        touched = touched.unflatten(1, (problem.tensors["k"].shape[1], -1)).any(2)[..., None]
        places |= {"k": ~touched, "v": ~touched}
    for name, gradient in gradients.items():
        if name in "qkv" or not told.tainted.any():
            assert gradient.dtype == problem.tensors[name].dtype
            check(f"gradient of {name}", gradient, told.gradients[name], places.get(name))


def _see_nan(problem: Problem, where: str) -> Tensor:
    """The rows (B, H, L) that attend to NaN in k or v, or as NaN: what comes of inf is what arithmetic makes of it."""
    q, k = (problem.tensors[name].isnan().any(-1) for name in ("q", where))
    k = k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)
    return ((q[..., :, None] | k[..., None, :]) & problem.allowed).any(-1)


def judge_output(problem: Problem, name: str, got: Tensor, told: Truth, kernel: str = "") -> None:
    """One output, where NaN does not reach, and NaN where it does."""
    tainted, where = told.tainted, None
    if tainted.any():
        if name in ("out", "lse"):
            # The kernels of the GPU take q, k and v as they are, unless they are made of others.
            as_it_is = kernel == "triton" and problem.choices["score"] in ("scaled_dot", "dot")
            nan = _see_nan(problem, "k") if as_it_is else tainted
            assert bool(got[nan].isnan().all()), f"{name}: rows that attend to NaN are not NaN"
            if name == "out":
                assert bool(got[_see_nan(problem, "v")].isnan().any(-1).all()), "NaN of a value is lost"
        if name == "received":
            where = ~(tainted[..., None] & problem.allowed).any(2)
        elif name == "rows":
            chosen = list(problem.summary.row_numbers)  # type: ignore[union-attr]
            where = ~(tainted[..., None] & problem.allowed)[:, :, chosen]
        elif name == "full":
            where = ~(tainted[..., None] & problem.allowed)
        else:
            where = ~tainted.view(*tainted.shape, *[1] * (got.dim() - 3))
    exact = told.outputs[name]
    if name in ("received", "rows", "full") and where is not None:
        # What a row may not attend to has no weight, even in a row of NaN.
        cleared = [x.detach().masked_fill(tainted[..., None], 0.0) for x in (told.exact["full"], told.straight["full"])]
        chosen = list(problem.summary.row_numbers)  # type: ignore[union-attr]
        take = {"received": lambda x: x.sum(2), "rows": lambda x: x[:, :, chosen], "full": lambda x: x}[name]
        exact = replace(exact, exact=take(cleared[0]), straight=take(cleared[1]))
    check(name, got, exact, where)


def judge_top(problem: Problem, weights: Tensor, keys: Tensor, told: Truth) -> None:
    """The keys named are those that have the weights; -1 names none."""
    clear = ~told.tainted[..., None]
    full, there = told.exact["full"].detach(), told.exact["scores"].detach() > -torch.inf
    count = keys.shape[-1]
    expected = there.sum(-1, keepdim=True).clamp(max=count)
    assert bool((((keys >= 0).sum(-1, keepdim=True) == expected) | ~clear).all()), "top: keys are missing, or invented"
    assert bool(((keys < 0) <= (weights == 0)).logical_or(~clear).all()), "top: a weight without a key"
    sorted_keys = keys.sort(-1).values
    twice = (sorted_keys[..., 1:] == sorted_keys[..., :-1]) & (sorted_keys[..., 1:] >= 0)
    assert not bool((twice & clear).any()), "top: a key is named twice"
    if full.shape[-1]:
        named = torch.where(keys >= 0, full.gather(-1, keys.clamp(min=0)), 0.0)
        straight = torch.where(keys >= 0, told.straight["full"].detach().gather(-1, keys.clamp(min=0)), 0.0)
        check(
            "top weights at their keys",
            weights,
            replace(told.outputs["top_weights"], exact=named, straight=straight),
            clear,
        )
