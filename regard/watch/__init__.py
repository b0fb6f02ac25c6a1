"""Watch what any PyTorch model attends to, in memory linear in length.

with regard.watch(model) as seen:
    model(**inputs)
seen[0].top.keys
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from regard.summary import Seen, Summary
from regard.watch.intercept import Intercept
from regard.watch.record import Record, Watched

__all__ = ["Record", "Watched", "watch"]


@contextmanager
def watch(
    model: nn.Module,
    *,
    top: int = 8,
    received: bool = True,
    entropy: bool = True,
    rows: Sequence[int] | None = None,
    layers: Collection[int] | None = None,
) -> Iterator[Watched]:
    """Record what a model attends to while it runs inside the `with` block, in this thread.

    Every call of `regard.attention`, `F.scaled_dot_product_attention` and `nn.MultiheadAttention` under the model is seen,
    those of Hugging Face models among them, whatever their `attn_implementation`: it is "sdpa" inside the block, and what it
    was after.
    The model's outputs stay what they are, within rounding.

    Args:
        model: any module; transformers models, `nn.Transformer` and hand-written ones.
        top: how many of the largest weights of each row to keep.
        received: keep how much attention each key got.
        entropy: keep the entropy of each row.
        rows: keep the whole weights of these queries.
        layers: keep these layers alone, numbered in the order of the calls.

    Yields:
        `Watched`: a sequence of `Record`, one per call of attention.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(top, int) or top < 1:
        raise ValueError(f"top: {top!r}; expected a whole number > 0: how many weights of each row to keep")
    watched, place = Watched(), _Place()
    summary = Summary(max=True, top=top, received=received, entropy=entropy, rows=tuple(rows or ()))

    def wanted() -> Summary | None:
        if not place.path:
            return None  # some other model, run inside the block
        if layers is None or place.layer in layers:
            return summary
        place.layer += 1
        return None

    def tell(seen: Seen, shape: tuple[int, int, int, int], causal: bool) -> None:
        _, heads, queries, keys = shape
        assert seen.top is not None and seen.max is not None
        watched.records.append(
            Record(
                name=place.path[-1],
                layer=place.layer,
                call=place.call,
                kind="cross" if place.cross[-1] or _is_cross(place.path) else "self",
                causal=causal,
                heads=heads,
                queries=queries,
                keys=keys,
                top=seen.top,
                max=seen.max,
                received=seen.received,
                entropy=seen.entropy,
                rows=seen.rows,
            )
        )
        place.layer += 1

    with ExitStack() as stack:
        stack.enter_context(_implementation(model, "sdpa"))
        stack.enter_context(place.follow(model))
        stack.enter_context(Intercept(wanted, tell))
        yield watched
    if not watched.records and place.call >= 0 and layers is None:
        warnings.warn(
            f"no attention was seen in {type(model).__name__}: it calls neither regard.attention, "
            "F.scaled_dot_product_attention nor nn.MultiheadAttention",
            stacklevel=3,
        )


class _Place:
    """Where in the model the thread is: the names of the modules it is inside of, the run, and the layer."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.cross: list[bool] = []  # does the module itself say that it attends to another sequence?
        self.call = -1
        self.layer = 0
        self._owner = threading.get_ident()

    @contextmanager
    def follow(self, model: nn.Module) -> Iterator[None]:
        """Keep the place up to date by hooks on every module, for the time of the block."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name)))
            handles.append(module.register_forward_hook(self._leaving, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == self._owner:
                if not self.path:
                    self.call, self.layer = self.call + 1, 0
                self.path.append(name)
                self.cross.append(getattr(module, "is_cross_attention", None) is True)

        return hook

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == self._owner and self.path:
            self.path.pop()
            self.cross.pop()


def _is_cross(path: Sequence[str]) -> bool:
    """Do the names of the modules say that another sequence is attended to?"""
    last = path[-1].lower()
    return any(sign in last for sign in ("cross", "encdec", "encoder_attn", "multihead_attn"))


@contextmanager
def _implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Have Hugging Face's modules call torch's attention, for the time of the block."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
