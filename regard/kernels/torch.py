"""PyTorch's own fused attention, for the plain problems that it serves at full speed, under our contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.mask import Band
from regard.normalizer import Softmax
from regard.problem import Plan, sizes, without_nonfinite
from regard.score import Product
from regard.word import fill


def refuse(plan: Plan, tensors: Sequence[Tensor]) -> str | None:
    """Why it cannot serve a problem without materialising the weights or breaking the contract; None if it can."""
    q, k, v = tensors[:3]
    size = sizes(q, k)
    if not isinstance(plan.score, Product):
        return f"it has no score but the dot product, and {type(plan.score).__name__} is none"
    if plan.score.key_bias is not None or plan.score.query_bias is not None:
        return (
            "the score is a dot product and a bias per query and key, which it has only as a matrix of queries by keys"
        )
    if not (isinstance(plan.normalizer, Softmax) and plan.normalizer.sink is None):
        return "it has no normalizer but softmax without a sink"
    if plan.summary.outputs:
        return f"it gives no summaries ({', '.join(plan.summary.outputs)})"
    if plan.softcap is not None:
        return "it has no softcap"
    if plan.bias is not None:
        return "it has a bias only as a matrix of queries by keys"
    if plan.dropout:
        return "its dropout is not a function of the seed, and materialises the weights on the CPU"
    if not _is_causal(plan) and plan.mask is not None:
        return "it has masks only as a matrix of queries by keys, but for causal ones"
    if isinstance(plan.mask, Band) and size.offset(plan.mask.align) != 0:
        return 'its causal mask has align="start" alone'
    if q.shape[-1] != v.shape[-1]:
        return f"it materialises the weights where the widths of q ({q.shape[-1]}) and v ({v.shape[-1]}) differ"
    if not q.numel() or not k.numel():
        return "an axis has size zero"
    if not q.dtype == k.dtype == v.dtype:
        return "the score was widened to float32"
    return None


def _is_causal(plan: Plan) -> bool:
    return isinstance(plan.mask, Band) and plan.mask.left is None and plan.mask.right == 0


def run(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The output of a problem that it does not refuse."""
    q, k, v = without_nonfinite(plan, tensors)[:3]
    assert isinstance(plan.score, Product)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=_is_causal(plan), scale=plan.score.scale, enable_gqa=grouped
    )
    if plan.bad_q is not None:
        plan = fill(plan, tensors)
        # Queries, keys and values with NaN or inf were set to zero: NaN goes to the rows that attend to one.
        reached = plan.bad_k.cumsum(-1)[..., torch.arange(q.shape[2], device=q.device).clamp(max=k.shape[2] - 1)] > 0
        reached = reached.repeat_interleave(q.shape[1] // k.shape[1], 1) | plan.bad_q
        out = out.masked_fill(reached[..., None], torch.nan)
    return (out,)
