"""The equation, materialised: all scores at once. Any device, any score, derivatives of every order and direction.

Memory is L x S; nothing chooses this kernel but you, by `kernel="reference"`, and second derivatives of the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.kernels.equation import can_be_empty, finish, forbid, scores
from regard.problem import Plan, sizes, without_nonfinite
from regard.score import widen
from regard.tile import Tile
from regard.word import fill

# It keeps nothing for its backward pass, which computes all again.
EXTRAS = 0


def forward(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs without a graph, as the operator of compiled graphs wants them."""
    with torch.no_grad():
        return run(plan, tensors)


def backward(
    plan: Plan,
    tensors: Sequence[Tensor],
    kept: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors that are `wanted`, from those of the outputs (None = zero)."""
    leaves = [x.detach().requires_grad_(want) for x, want in zip(tensors, wanted, strict=True)]
    with torch.enable_grad():
        outputs = run(plan, leaves)
    pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if g is not None and x.requires_grad]
    inputs = [x for x in leaves if x.requires_grad]
    found = iter(torch.autograd.grad([x for x, _ in pairs], inputs, [g for _, g in pairs], materialize_grads=True))
    return tuple([next(found) if want else None for want in wanted])


def refuse(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """It serves everything."""
    return None


def run(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """All outputs of a problem, in the order of `Plan.outputs`."""
    # Widened once for all its uses: the parts of a gradient are summed up before they are rounded.
    tensors = without_nonfinite(plan, tensors)
    plan = fill(plan, [widen(x) if x.is_floating_point() else x for x in tensors])
    q, k, v = (widen(x) for x in tensors[:3])
    size = sizes(q, k)
    tile = Tile((0, size.B), (0, size.H), (0, size.L), (0, size.S), size, q.device)
    s = forbid(plan, scores(plan, q, k, tile), tile)
    empty = None
    if size.S == 0:
        # One key that nobody may attend to gives every row something to normalise over.
        s, v = torch.nn.functional.pad(s, (0, 1), value=-math.inf), torch.nn.functional.pad(v, (0, 0, 0, 1))
        if plan.summary.mass is not None:
            mass = torch.nn.functional.pad(plan.summary.mass, (0, 1))
            plan = dataclasses.replace(plan, summary=dataclasses.replace(plan.summary, mass=mass))
    if size.S == 0 or can_be_empty(plan):
        empty = s.detach().amax(-1, keepdim=True) == -math.inf
    names = plan.outputs
    results = finish(plan, s, v, tile, [(0, s.shape[-1])], names, empty)
    if size.S == 0:
        across = ("received", "rows", "full")
        results = [x[..., :0] if name in across else x for name, x in zip(names, results, strict=True)]
    return results[0].to(tensors[2].dtype), *results[1:]
