"""Where in a model a thread is: which module, which run of the model, which of its attentions."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from regard.watch.capture import torch_layers


class Place:
    """Where in the model the thread that made this is.

    call: the run of the model, from 0; -1 before the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.call = -1
        self._path: list[tuple[nn.Module, str]] = []
        self._names = {id(module): _plain(name) for name, module in model.named_modules()}
        self._torch_own = {id(module) for module in model.modules() if torch_layers.is_torch_own(module)}
        self._entered: set[str] = set()  # what ran in this run
        self._whole: set[str] = set()  # of these, what the model's user called
        self._times: Counter[str] = Counter()  # how often each name has attended in this run
        self._layers: dict[tuple[str, int], int] = {}
        self._causal: set[str] = set()
        self._owner = threading.get_ident()

    @property
    def is_outside(self) -> bool:
        """Is some other model run, or a part of this one that is computed again for its gradients?"""
        return not self._path or torch._C._current_graph_task_id() != -1

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Keep the place up to date for the time of the block, by hooks that no module knows of: those that stand on a
        module itself turn torch's fast path off.
        """
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(id(module))
        if name is None or threading.get_ident() != self._owner:
            return
        if not self._path:
            if self.call < 0 or name in self._entered or any(_is_part(name, whole) for whole in self._whole):
                # What ran in this run, by itself or in something larger, begins another.
                self.call += 1
                self._entered.clear()
                self._whole.clear()
                self._times.clear()
            self._whole.add(name)
        self._entered.add(name)
        self._path.append((module, name))
        if id(module) in self._torch_own:
            torch_layers.enter()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # A hook that fails before ours has us leave what we never entered.
        if self._path and self._path[-1][0] is module and threading.get_ident() == self._owner:
            self._path.pop()
            if id(module) in self._torch_own:
                torch_layers.leave()

    def name(self, within: str = "") -> str:
        """The name of the module, and of what attends within it where torch calls no module."""
        return ".".join(part for part in (self._path[-1][1], within) if part)

    def number(self, name: str) -> int:
        """Count one more attention, and say which of the model's it is. The first run gives the order: a module that
        attends again in a later run keeps its number, and one that several layers share has one for each of its turns.
        """
        turn = name, self._times[name]
        self._times[name] += 1
        return self._layers.setdefault(turn, len(self._layers))

    def kind(self, name: str, causal: bool, queries: int, keys: int) -> str:
        """Whether it is "cross", "decoder" or "self": by what the module says of itself, by its name, and by the mask."""
        module = self._path[-1][0]
        last = name.rsplit(".", 1)[-1].lower()
        if getattr(module, "is_cross_attention", None) is True or any(sign in last for sign in _CROSS):
            return "cross"
        said = getattr(module, "is_causal", None) is True or getattr(module, "is_decoder", None) is True
        if causal or said or name in self._causal:
            # One token that looks back at a cache has no mask to know it by.
            self._causal.add(name)
            return "decoder"
        return "self" if queries == keys else "cross"

    def heads(self) -> int | None:
        """How many heads the module says that it has, where one that wrote its attention by hand says so."""
        for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"):
            found = getattr(self._path[-1][0], name, None)
            if isinstance(found, int) and found > 0:
                return found
        return None


_CROSS = ("cross", "encdec", "encoder_attn", "multihead_attn")


def _is_part(name: str, whole: str) -> bool:
    return not whole or name == whole or name.startswith(f"{whole}.")


def _plain(name: str) -> str:
    """The name without what torch.compile wraps around a module."""
    return ".".join(part for part in name.split(".") if part and part != "_orig_mod")
