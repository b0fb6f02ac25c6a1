"""A word of the vocabulary as a part of a layer: what it learns is the layer's to learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from regard.components.component import fill, split

W = TypeVar("W")


class ComponentModule(nn.Module, Generic[W]):
    """A score, normalizer, mask or bias whose tensors belong to a layer: parameters learn, are saved and moved with it, and
    other tensors are saved and moved. Called, it gives the word.

    >>> slope = ComponentModule(position.ALiBi(nn.Parameter(torch.ones(8))))
    >>> attention(q, k, v, bias=slope())  # slope.slopes learns

    Args:
        word: one of `regard.score`, `regard.normalizer`, `regard.mask` or `regard.position`.
    """

    def __init__(self, word: W) -> None:
        super().__init__()
        tensors: list[Tensor] = []
        self.plan = split(word, tensors)
        self.names = list(_names(word))
        for name, tensor in zip(self.names, tensors, strict=True):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self) -> W:
        """The word, with the tensors as they are now."""
        if not self.names:
            return self.plan
        return fill(self.plan, [getattr(self, name) for name in self.names])

    def extra_repr(self) -> str:
        return type(self.plan).__name__


def _names(word: Any, path: str = "") -> Iterator[str]:
    """The names of the tensors in a word, in the order of `split`."""
    if isinstance(word, Tensor):
        yield path
    elif isinstance(word, tuple) or (dataclasses.is_dataclass(word) and not isinstance(word, type)):
        named = (
            enumerate(word)
            if isinstance(word, tuple)
            else [(f.name, getattr(word, f.name)) for f in dataclasses.fields(word)]
        )
        for name, part in named:
            yield from _names(part, f"{path}_{name}" if path else str(name))
