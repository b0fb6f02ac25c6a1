"""Components that are Python functions: scores of q and k, and biases of positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from regard import check
from regard.components.component import slots
from regard.components.position import Bias
from regard.components.score import Score
from regard.components.tensor_ops import for_queries, widen
from regard.components.tile import Sizes, Tile
from regard.tracing import is_symbolic, is_tracing

# Leaf tensors in the closure of a function that require a gradient. None if they are unknown, because torch.func transforms
# them; then only a backend of differentiable torch operations gives them gradients. Empty in compiled graphs, which record
# the function: see `components.graph`.
Captured = tuple[Tensor, ...] | None


@dataclass(frozen=True)
class FunctionScore(Score):
    """A score defined by a user: `function(q, k)` maps parts q (b, H, l, D) and k (b, H, s, D) to scores (b, H, l, s).
    q and k are float32, or float64 for float64 inputs.

    Args:
        function: the function.
        captured: see `Captured`.
    """

    takes_all_heads = True

    function: Callable[[Tensor, Tensor], Tensor]
    captured: Captured = ()

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        """Accept any widths; the function checks them itself."""

    def scores(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
        return self._call(q, for_queries(k, q))

    def _call(self, q: Tensor, k: Tensor) -> Tensor:
        out = self.function(q, k)
        check_scores(out, q, k)
        return out

    @staticmethod
    def of(function: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor) -> FunctionScore:
        """Wrap a function. Its captured tensors are found by scoring one pair."""
        score = FunctionScore(function)
        if is_symbolic(q, k) or is_tracing() or not q.numel() or not k.numel():
            return score
        # A new pair of vectors, so that wrappers and graph of the result come from the function only.
        one_q, one_k = (
            torch.ones(1, q.shape[1], 1, x.shape[3], dtype=widen(x[:0]).dtype, device=x.device) for x in (q, k)
        )
        with torch.enable_grad():
            return FunctionScore(function, _captured(score._call(one_q, one_k)))


@dataclass(frozen=True)
class FunctionBias(Bias):
    """A bias defined by a user: `function(batch, head, query, key)` maps index tensors, which broadcast to the shape
    (b, h, l, s) of a tile, to floats that are added to the scores, and broadcast to it, too.

    Args:
        function: the function.
        captured: see `Captured`.
    """

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    captured: Captured = ()

    def bias(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        out = self.function(tile.batch, tile.head, tile.query, tile.key)
        check_bias(out, tile.shape)
        return out.to(dtype)

    @staticmethod
    def of(
        function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], sizes: Sizes, q: Tensor, score: Score
    ) -> FunctionBias:
        """Wrap a function. Its captured tensors are found from its value for one pair. Those that the score closes over,
        too, get their gradient there.
        """
        bias = FunctionBias(function)
        if is_symbolic(q) or is_tracing() or not sizes.B * sizes.H * sizes.L * sizes.S:
            return bias
        pair = Tile((0, 1), (0, 1), (0, 1), (0, 1), sizes, q.device)
        with torch.enable_grad():
            captured = _captured(bias.bias(pair, torch.float64))
        if captured and isinstance(score, FunctionScore):
            captured = tuple([x for x in captured if all(x is not other for other in score.captured or ())])
        return FunctionBias(function, captured)


def check_scores(out: object, q: Tensor, k: Tensor) -> None:
    """Raise unless a function's result for q (b, H, l, D) and k (b, H, s, D) has the shape (b, H, l, s)."""
    expected = (*q.shape[:-1], k.shape[-2])
    name = f"score: the result of the function for parts q {tuple(q.shape)} and k {tuple(k.shape)}"
    check.float_tensor(name, out, (expected,), f"{expected}")


def check_bias(out: object, shape: Sequence[int]) -> None:
    """Raise unless the result of the function for a tile of this shape fits it."""
    check.result_for_tile("bias: the result of the function", out, shape, check.is_float_tensor(out), "float")


def captured_slots(score: Any, bias: Any) -> list[int]:
    """Return the indices of the tensors that a split score and bias close over."""
    functions = [part for part in (score, bias) if isinstance(part, FunctionScore | FunctionBias)]
    return [index for part in functions for index in slots(part.captured)]


def _captured(result: Tensor) -> Captured:
    """Return the leaves of the autograd graph of a function's result; None if a transform of torch.func hides them."""
    # Each active transform of torch.func wraps the result once.
    while torch._C._functorch.is_functorch_wrapped_tensor(result):
        if torch._C._functorch.is_batchedtensor(result) or result.requires_grad or _has_tangent(result):
            return None
        result = torch._C._functorch.get_unwrapped(result)
    if _has_tangent(result):
        return None
    leaves: dict[int, Tensor] = {}
    visited, todo = set(), [result.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves[id(leaf)] = leaf
        todo.extend(parent for parent, _ in node.next_functions)
    return tuple(leaves.values())


def _has_tangent(x: Tensor) -> bool:
    """Return whether a tensor has a tangent of forward-mode AD."""
    return unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
