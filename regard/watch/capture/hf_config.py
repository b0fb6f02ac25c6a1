"""What makes a model's attention readable for the time of a watch, where it is hidden in a compiled graph or a library."""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from regard.watch.capture.patch import Counted

# Hugging Face's ways to attend that can be seen as they are.
_SEEN = {"sdpa", "eager", "flex_attention", "regard", None}
# A compiled module warns of hooks that no module knows of, for they run once more for it. Ours are meant to.
_HOOKS = re.compile(r"Using `torch\.compile\(module\)` when there are global hooks")
_OURS = ("ignore", _HOOKS, UserWarning, None, 0)
_changing = threading.Lock()
_changed: dict[int, list[Any]] = {}  # by the id of a config: the config, what it said, how many need the change


@contextmanager
def readable(model: nn.Module) -> Iterator[None]:
    """Have the model call what can be seen, for the time of the block; models that share a config, and several threads,
    may be in such blocks at once.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules or "torch.nn.attention.flex_attention" in sys.modules:
            stack.enter_context(_uncompiled())
        for config in _hidden(model):
            stack.enter_context(_by_sdpa(config))
        yield


def _run_uncompiled() -> ExitStack:
    stack = ExitStack()
    stack.enter_context(torch.compiler.set_stance("force_eager"))
    # Put in by hand: `warnings.filterwarnings` would have Python forget all that it has warned of once.
    filters: Any = warnings.filters
    filters.insert(0, _OURS)

    def undo() -> None:
        with suppress(ValueError):  # where somebody has cleared them
            filters.remove(_OURS)

    stack.callback(undo)
    return stack


_uncompiled = Counted(_run_uncompiled)


def _hidden(model: nn.Module) -> list[Any]:
    """The configs of Hugging Face's modules that attend by a kernel out of sight."""
    found: dict[int, Any] = {}
    refused = set()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) not in _SEEN:
            found[id(config)] = config
            if getattr(module, "_supports_sdpa", True) is False:
                refused.add(id(config))
    return [config for key, config in found.items() if key not in refused]


@contextmanager
def _by_sdpa(config: Any) -> Iterator[None]:
    with _changing:
        entry = _changed.setdefault(id(config), [config, config._attn_implementation, 0])
        entry[2] += 1
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        with _changing:
            entry[2] -= 1
            if not entry[2]:
                config._attn_implementation = entry[1]
                del _changed[id(config)]
