"""The equation, materialised: all scores at once. Any device, any score, derivatives of every order and direction.

Memory is L x S; nothing chooses this kernel but you, by `kernel="reference"`, and second derivatives of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.kernels.equation import can_be_empty, finish, forbid, scores
from regard.problem import Plan, sizes
from regard.score import widen
from regard.tile import Tile
from regard.word import fill


def refuse(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """It serves everything."""
    return None


def run(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """All outputs of a problem, in the order of `Plan.outputs`."""
    plan = fill(plan, tensors)
    q, k, v = (widen(x) for x in tensors[:3])
    size = sizes(q, k)
    tile = Tile((0, size.B), (0, size.H), (0, size.L), (0, size.S), size, q.device)
    s = forbid(plan, scores(plan, q, k, tile), tile)
    empty = None
    if size.S == 0:
        # One key that nobody may attend to gives every row something to normalise over.
        s, v = torch.nn.functional.pad(s, (0, 1), value=-math.inf), torch.nn.functional.pad(v, (0, 0, 0, 1))
    if size.S == 0 or can_be_empty(plan):
        empty = s.detach().amax(-1, keepdim=True) == -math.inf
    names = plan.outputs
    results = finish(plan, s, v, tile, [(0, s.shape[-1])], names, empty)
    if size.S == 0:
        across = ("received", "rows", "full")
        results = [x[..., :0] if name in across else x for name, x in zip(names, results, strict=True)]
    return results[0].to(tensors[2].dtype), *results[1:]
