"""Which module of a model is running, in which forward pass, and which of the model's attention layers it is."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from regard.watch.capture import torch_layers


class ModuleTracker:
    """The stack of running modules of a model, in the thread that created the tracker.

    call: index of the forward pass of the model; -1 before the first. on_exit: called with the arguments and the output of a
    module that ends, while it is still the running one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.call = -1
        self.on_exit: Callable[[Any, Any], None] | None = None
        self._stack: list[tuple[nn.Module, str]] = []
        self._names = {id(module): _strip_compiled(name) for name, module in model.named_modules()}
        self._torch_layers = {id(module) for module in model.modules() if torch_layers.is_torch_layer(module)}
        self._entered: set[str] = set()  # the modules that ran in this pass
        self._roots: set[str] = set()  # those of them that were called from outside of the model
        self._counts: Counter[str] = Counter()  # attention calls in this pass, by name
        self._layers: dict[tuple[str, int], int] = {}
        # The kinds of a module's calls with as many queries as keys, and with other numbers.
        self._kinds: dict[str, tuple[str, str]] = {}
        self._groups: dict[int, int] = {}
        self._attention_names: dict[str, str | None] = {}
        self._owner = threading.get_ident()

    @property
    def is_outside(self) -> bool:
        """Whether no module of the model is running, or one is recomputed during a backward pass."""
        return not self._stack or torch._C._current_graph_task_id() != -1

    @contextmanager
    def track(self) -> Iterator[None]:
        """Follow the model's modules in the block, by global hooks: hooks on a module disable torch's fast path."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._exit, always_call=True),
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
        if not self._stack:
            if self.call < 0 or name in self._entered or any(_is_submodule(name, root) for root in self._roots):
                # A module that already ran in this pass, alone or within a larger one, starts the next pass.
                self.call += 1
                self._entered.clear()
                self._roots.clear()
                self._counts.clear()
            self._roots.add(name)
        self._entered.add(name)
        self._stack.append((module, name))
        if id(module) in self._torch_layers:
            torch_layers.enter_layer()

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        # If a hook before `_enter` raises, this one is called for a module that was never entered.
        if self._stack and self._stack[-1][0] is module and threading.get_ident() == self._owner:
            if self.on_exit is not None:
                self.on_exit(args, output)
            self._stack.pop()
            if id(module) in self._torch_layers:
                torch_layers.exit_layer()

    def name(self, submodule: str = "") -> str:
        """Return the name of the running module, followed by that of a submodule."""
        name = self._stack[-1][1]
        return f"{name}.{submodule}" if name and submodule else name or submodule

    def layer_index(self, name: str) -> int:
        """Count one more attention call of a module, and return which of the model's attention layers it is.

        The first pass defines the order, and later passes keep it. A module that is used as several layers has one
        index for each of them.
        """
        key = name, self._counts[name]
        self._counts[name] += 1
        return self._layers.setdefault(key, len(self._layers))

    def forget_layers(self, name: str) -> None:
        """Take back the indices that the last run of a module was given."""
        while self._layers and next(reversed(self._layers))[0] == name:
            self._layers.popitem()

    def kind(self, name: str, is_causal: bool, queries: int, keys: int) -> str:
        """Return "cross", "decoder" or "self", from the attributes of the module, its name, and the mask."""
        if name not in self._kinds:
            declared = _declared_kind(self._stack[-1][0], name)
            self._kinds[name] = declared or "self", declared or ("self" if self._has_memory() else "cross")
        if is_causal and self._kinds[name][0] == "self":
            # A single query with a key/value cache has no causal mask: remember the module.
            self._kinds[name] = "decoder", "decoder"
        return self._kinds[name][queries != keys]

    def _has_memory(self) -> bool:
        """Whether a running model keeps the states of earlier texts (XLNet), as further keys of its self-attention."""
        return any(hasattr(getattr(module, "config", None), "mem_len") for module, _ in self._stack)

    def attention_module(self) -> str | None:
        """Return the name of the running module, or its class if it has none, if either speaks of attention."""
        module, name = self._stack[-1]
        if name not in self._attention_names:
            kind = type(module).__name__
            is_named = "attn" in name.lower() or "attention" in f"{name} {kind}".lower()
            self._attention_names[name] = (name or kind) if is_named else None
        return self._attention_names[name]

    def num_heads(self) -> int | None:
        """Return the number of heads that the running module declares, itself or in its config, or None."""
        module = self._stack[-1][0]
        for owner in (module, getattr(module, "config", None)):
            for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"):
                heads = getattr(owner, name, None)
                if isinstance(heads, int) and heads > 0:
                    return heads
        return None

    def queries_per_key_head(self) -> int:
        """Return how many query heads share a key/value head in the running module of transformers; 1 if unknown."""
        module = self._stack[-1][0]
        if id(module) not in self._groups:
            groups = getattr(module, "num_key_value_groups", 1)
            self._groups[id(module)] = groups if isinstance(groups, int) and groups > 0 else 1
        return self._groups[id(module)]


_CROSS = ("cross", "encdec", "encoder_attn", "multihead_attn")


def _declared_kind(module: nn.Module, name: str) -> str | None:
    """Return "cross" or "decoder" where the attributes of a module, or its name, say so."""
    last = ".".join(name.split(".")[-2:]).lower()  # in BERT, "crossattention.self"
    if getattr(module, "is_cross_attention", None) is True or any(part in last for part in _CROSS):
        return "cross"
    is_decoder = getattr(module, "is_causal", None) is True or getattr(module, "is_decoder", None) is True
    return "decoder" if is_decoder else None


def _is_submodule(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")


def _strip_compiled(name: str) -> str:
    """Return a module's name without the `_orig_mod` that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part and part != "_orig_mod")
