"""A score that a user writes: a Python function of q and k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from regard import check
from regard.components.score import Score
from regard.components.tensor_ops import for_queries, widen
from regard.components.tile import Sizes, Tile


@dataclass(frozen=True)
class FunctionScore(Score):
    """A score that a user wrote: `function(q, k)` takes q (b, H, l, D) and k (b, H, s, D), any part of the whole, and
    gives scores (b, H, l, s). q and k come in float32, or in float64 for float64 inputs.

    `captured` are the leaf tensors it closes over that want a gradient; None where they cannot be told, since torch.func
    is transforming them: only a kernel of differentiable steps gives them their gradients. In a graph that is compiled, none
    are looked for: there a kernel of differentiable steps serves every function.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    captured: tuple[Tensor, ...] | None = ()

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        """Any widths that the function takes will do."""

    def scores(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
        return self._call(q, for_queries(k, q))

    def _call(self, q: Tensor, k: Tensor) -> Tensor:
        out = self.function(q, k)
        expected = (*q.shape[:-1], k.shape[-2])
        name = f"score: what the function gives for parts of q {tuple(q.shape)} and k {tuple(k.shape)}"
        check.floats(name, out, (expected,), f"{expected}")
        return out

    @staticmethod
    def of(function: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor) -> FunctionScore:
        """Wrap a function, and find what it closes over by scoring one pair and walking the graph that it leaves."""
        if torch.compiler.is_compiling() or not q.numel() or not k.numel():
            return FunctionScore(function)
        # A pair of its own making: what the answer is wrapped in, or hangs on, comes from the function alone.
        one_q, one_k = (
            torch.ones(1, q.shape[1], 1, x.shape[3], dtype=widen(x[:0]).dtype, device=x.device) for x in (q, k)
        )
        with torch.enable_grad():
            trial = FunctionScore(function)._call(one_q, one_k)
        # Every transform of torch.func that is under way wraps it once.
        while torch._C._functorch.is_functorch_wrapped_tensor(trial):
            if torch._C._functorch.is_batchedtensor(trial) or trial.requires_grad or _has_tangent(trial):
                return FunctionScore(function, None)
            trial = torch._C._functorch.get_unwrapped(trial)
        if _has_tangent(trial):
            return FunctionScore(function, None)
        leaves: dict[int, Tensor] = {}
        seen, todo = set(), [trial.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                leaves[id(leaf)] = leaf
            todo.extend(parent for parent, _ in node.next_functions)
        return FunctionScore(function, tuple(leaves.values()))


def _has_tangent(x: Tensor) -> bool:
    """Does it carry a derivative in forward mode?"""
    return unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
