"""Scores defined by a Python function of q and k."""

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
from regard.tracing import is_symbolic, is_tracing


@dataclass(frozen=True)
class FunctionScore(Score):
    """A score defined by a user: `function(q, k)` maps parts q (b, H, l, D) and k (b, H, s, D) to scores (b, H, l, s).
    q and k are float32, or float64 for float64 inputs.

    Args:
        function: the function.
        captured: leaf tensors in the closure of the function that require a gradient. None if they are unknown, because
            torch.func transforms them; then only a backend of differentiable torch operations gives them gradients.
            Compiled graphs always use such a backend, so there `captured` is empty.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    captured: tuple[Tensor, ...] | None = ()

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        """Accept any widths; the function checks them itself."""

    def scores(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
        return self._call(q, for_queries(k, q))

    def _call(self, q: Tensor, k: Tensor) -> Tensor:
        out = self.function(q, k)
        expected = (*q.shape[:-1], k.shape[-2])
        name = f"score: the result of the function for parts q {tuple(q.shape)} and k {tuple(k.shape)}"
        check.float_tensor(name, out, (expected,), f"{expected}")
        return out

    @staticmethod
    def of(function: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor) -> FunctionScore:
        """Wrap a function. Its captured tensors are found by scoring one pair and traversing the autograd graph."""
        if is_symbolic(q, k) or is_tracing() or not q.numel() or not k.numel():
            return FunctionScore(function)
        # A new pair of vectors, so that wrappers and graph of the result come from the function only.
        one_q, one_k = (
            torch.ones(1, q.shape[1], 1, x.shape[3], dtype=widen(x[:0]).dtype, device=x.device) for x in (q, k)
        )
        with torch.enable_grad():
            trial = FunctionScore(function)._call(one_q, one_k)
        # Each active transform of torch.func wraps the result once.
        while torch._C._functorch.is_functorch_wrapped_tensor(trial):
            if torch._C._functorch.is_batchedtensor(trial) or trial.requires_grad or _has_tangent(trial):
                return FunctionScore(function, None)
            trial = torch._C._functorch.get_unwrapped(trial)
        if _has_tangent(trial):
            return FunctionScore(function, None)
        leaves: dict[int, Tensor] = {}
        visited, todo = set(), [trial.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                leaves[id(leaf)] = leaf
            todo.extend(parent for parent, _ in node.next_functions)
        return FunctionScore(function, tuple(leaves.values()))


def _has_tangent(x: Tensor) -> bool:
    """Return whether a tensor has a tangent of forward-mode AD."""
    return unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
