"""A module that holds the parameters of a component."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from regard.components.component import fill, split

C = TypeVar("C")


class ComponentModule(nn.Module, Generic[C]):
    """Module that registers the tensors of a score, normalizer, mask or position bias. Calling it returns the
    component.

    An `nn.Parameter` becomes a parameter of the module, any other tensor a buffer.

    >>> alibi = regard.nn.ComponentModule(position.ALiBi(nn.Parameter(torch.ones(8))))
    >>> list(alibi.state_dict())
    ['slopes']
    >>> q = k = v = torch.randn(2, 8, 10, 16)
    >>> regard.attention(q, k, v, bias=alibi()).sum().backward()
    >>> alibi.slopes.grad.shape
    torch.Size([8])

    Args:
        word: one of `regard.score`, `regard.normalizer`, `regard.mask` or `regard.position`.
    """

    def __init__(self, word: C) -> None:
        super().__init__()
        tensors: list[Tensor] = []
        self.plan = split(word, tensors)
        self.names = list(_names(word))
        for name, tensor in zip(self.names, tensors, strict=True):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self) -> C:
        """Return the component with the current tensors of the module."""
        if not self.names:
            return self.plan
        return fill(self.plan, [getattr(self, name) for name in self.names])

    def extra_repr(self) -> str:
        return type(self.plan).__name__


def _names(component: Any, path: str = "") -> Iterator[str]:
    """Yield the names of the tensors of a component, in the order of `split`."""
    if isinstance(component, Tensor):
        yield path
    elif isinstance(component, tuple) or (dataclasses.is_dataclass(component) and not isinstance(component, type)):
        named = (
            enumerate(component)
            if isinstance(component, tuple)
            else [(f.name, getattr(component, f.name)) for f in dataclasses.fields(component)]
        )
        for name, part in named:
            yield from _names(part, f"{path}_{name}" if path else str(name))
