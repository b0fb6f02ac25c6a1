"""torch's fused attention, for plain problems that it computes at full speed and within the contract of backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.backends import machine
from regard.backends.backend import Supported
from regard.components.component import fill
from regard.components.mask import Band
from regard.components.normalizer import Softmax
from regard.components.score import Product
from regard.plan.nonfinite import nan_causal_rows, zero_nonfinite
from regard.plan.problem import Plan, sizes

# See `Backend`.
about = "torch's fused attention, for plain problems"
is_automatic = True
# In bfloat16, torch computes on the matrix units (AMX) of the CPUs that have them: 2 to 4 times as fast as the native
# kernels, which widen to float32.
is_fastest_for = frozenset({torch.bfloat16} if machine.HAS_MATRIX_UNITS else ())
masks_nonfinite = False
supported = Supported(scores={Product}, normalizers={Softmax}, masks={Band}, biases=(), statistics=())
is_differentiable = True
has_all_derivatives = False
is_dispatched = True
saved = 0


def is_for(device_type: str) -> bool:
    """It runs on every device."""
    return True


def refuse(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """Return why it cannot serve a problem without materializing the weights or breaking the contract; None if it can."""
    q, k, v = tensors[:3]
    size = sizes(q, k)
    score = plan.score
    if isinstance(score, Product) and (score.key_bias is not None or score.query_bias is not None):
        return "the score adds a bias per query or key, which it takes as an L x S matrix only"
    if isinstance(plan.normalizer, Softmax) and plan.normalizer.sink is not None:
        return "it supports softmax without a sink only"
    if plan.softcap is not None:
        return "it does not support softcap"
    if plan.bias is not None:
        return "it takes a bias as an L x S matrix only"
    if plan.dropout:
        return "its dropout does not follow the seed, and materializes the weights on the CPU"
    if not _is_causal(plan) and plan.mask is not None:
        return "it takes masks other than causal ones as L x S matrices only"
    if isinstance(plan.mask, Band) and size.offset(plan.mask.align) != 0:
        return 'its causal mask supports align="start" only'
    if q.shape[-1] != v.shape[-1]:
        return f"it materializes the weights if the widths of q ({q.shape[-1]}) and v ({v.shape[-1]}) differ"
    if not q.numel() or not k.numel():
        return "an axis has size zero"
    if not q.dtype == k.dtype == v.dtype:
        return "the score is computed in float32"
    return None


def _is_causal(plan: Plan) -> bool:
    return isinstance(plan.mask, Band) and plan.mask.left is None and plan.mask.right == 0


def forward(plan: Plan, tensors: Sequence[Tensor], is_last: bool = False) -> tuple[Tensor, ...]:
    """Return the output of a problem that it does not refuse."""
    q, k, v = zero_nonfinite(plan, tensors)[:3]
    assert isinstance(plan.score, Product)
    grouped = bool(q.shape[1] != k.shape[1])
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=_is_causal(plan), scale=plan.score.scale, enable_gqa=grouped
    )
    return (nan_causal_rows(fill(plan, tensors), out, k.shape[2]),)
