"""The equation, materialized: all scores at once. Any device, any score, derivatives of every order and direction.

Memory is L x S. This backend serves where `backend="reference"` asks for it, second derivatives of the others, and what no
other serves: normalizers and statistics of the user in compiled graphs, and functions whose tensors `torch.func` hides. Then
it warns.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.backends.equation import aggregate, can_be_empty, masked_scores, scores
from regard.components.component import fill
from regard.components.tensor_ops import widen
from regard.components.tile import Tile
from regard.plan.nonfinite import zero_nonfinite
from regard.plan.problem import Plan, sizes

# See `Backend`.
about = "the equation, materialized: everything, in quadratic memory"
is_automatic = False
is_fastest_for: frozenset[torch.dtype] = frozenset()
masks_nonfinite = False
supported = None
is_differentiable = True
has_all_derivatives = True
is_dispatched = True
saved = 0


def is_for(device_type: str) -> bool:
    """It runs on every device."""
    return True


def refuse(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """Return None: it serves everything."""
    return None


# The reasons that a warning was given for: each is given once.
_warned: set[str] = set()


def warn(reason: str, q: Tensor, k: Tensor) -> None:
    """Warn that this backend serves instead of one in linear memory, and why.

    While torch.compile traces, the warning is given by the compiler; it is no part of the graph.
    """
    if torch.compiler.is_dynamo_compiling():
        from torch._dynamo.comptime import comptime

        comptime(_warn_at_compile_time)
    else:
        _warn(reason, q, k)


def _warn_at_compile_time(context: Any) -> None:
    """`_warn`, with the locals of `warn` as the compiler sees them: sizes may be symbols, and their hints are named."""
    reason, q, k = (context.get_local(name) for name in ("reason", "q", "k"))
    _warn(reason.as_python_constant(), q.as_fake(), k.as_fake())


def _warn(reason: str, q: Tensor, k: Tensor) -> None:
    if reason in _warned:
        return
    _warned.add(reason)
    sizes = [n.node.hint if isinstance(n, torch.SymInt) else int(n) for n in (*q.shape[:3], k.shape[2])]
    count = math.prod(sizes) * (8 if q.dtype == torch.float64 else 4)
    warnings.warn(
        f"attention: {reason}. The call is computed by backend='reference', whose L x S matrices take {count:,} bytes each "
        f"(B x H x L x S = {' x '.join(map(str, sizes))}).",
        stacklevel=2,
    )


def forward(plan: Plan, tensors: Sequence[Tensor], is_last: bool = False) -> tuple[Tensor, ...]:
    """Return all outputs of a problem, in the order of `Plan.outputs`."""
    # Widened once for all uses, so that the parts of a gradient are summed before they are rounded.
    tensors = zero_nonfinite(plan, tensors)
    plan = fill(plan, [widen(x) if x.is_floating_point() else x for x in tensors])
    q, k, v = (widen(x) for x in tensors[:3])
    size = sizes(q, k)
    tile = Tile((0, size.B), (0, size.H), (0, size.L), (0, size.S), size, q.device)
    s = masked_scores(plan, scores(plan, q, k, tile), tile)
    empty = None
    if size.S == 0:
        # One masked key gives every row something to normalize over.
        s, v = torch.nn.functional.pad(s, (0, 1), value=-math.inf), torch.nn.functional.pad(v, (0, 0, 0, 1))
        if plan.summary.mass is not None:
            mass = torch.nn.functional.pad(plan.summary.mass, (0, 1))
            plan = dataclasses.replace(plan, summary=dataclasses.replace(plan.summary, mass=mass))
    if size.S == 0 or can_be_empty(plan):
        empty = s.detach().amax(-1, keepdim=True) == -math.inf
    names = plan.outputs
    results = aggregate(plan, s, v, tile, [(0, s.shape[-1])], names, empty)
    if size.S == 0:
        across = [statistic.name for statistic in plan.summary.statistics if statistic.axes.endswith("S")]
        results = [x[..., :0] if name in across else x for name, x in zip(names, results, strict=True)]
    return results[0].to(tensors[2].dtype), *results[1:]
