"""A score that a user writes: a Python function of q and k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard import check
from regard.score import Score, for_queries, widen
from regard.tile import Sizes, Tile


@dataclass(frozen=True)
class Python(Score):
    """A score that a user wrote: `function(q, k)` takes q (b, H, l, D) and k (b, H, s, D), any part of the whole, and
    gives scores (b, H, l, s). `captured` are the leaf tensors it closes over that want a gradient.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    captured: tuple[Tensor, ...] = ()

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
    def of(function: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor) -> Python:
        """Wrap a function, and find what it closes over by scoring one pair and walking the graph that it leaves."""
        if not q.numel() or not k.numel() or torch.compiler.is_compiling():
            return Python(function)
        one_q = widen(q[:1, :, :1].detach())
        one_k = for_queries(widen(k[:1, :, :1].detach()), q)
        with torch.enable_grad():
            trial = Python(function)._call(one_q, one_k)
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
        return Python(function, tuple(leaves.values()))
