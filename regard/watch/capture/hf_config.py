"""Temporary settings that make a model call attention functions which can be observed.

Compiled graphs run uncompiled, and Hugging Face models whose attention runs in a library of its own use SDPA.
"""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regard.watch.capture.torch_layers import RefCountedPatch

# Values of `_attn_implementation` whose attention calls can be intercepted.
_OBSERVABLE = {"sdpa", "eager", "flex_attention", "regard", None}
# A compiled module warns about global hooks, which run once more for it. Here they are intended.
_HOOKS_MESSAGE = re.compile(r"Using `torch\.compile\(module\)` when there are global hooks")
_FILTER = ("ignore", _HOOKS_MESSAGE, UserWarning, None, 0)


@dataclass
class _Override:
    config: Any  # keeps the object, and with it its id, alive
    implementation: str
    count: int = 0


_lock = threading.Lock()
_overrides: dict[int, _Override] = {}  # by the id of the config


@contextmanager
def observable(model: nn.Module) -> Iterator[None]:
    """Make the attention of a model observable in the block.

    Blocks may overlap, in several threads and for models that share a config.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules or "torch.nn.attention.flex_attention" in sys.modules:
            stack.enter_context(_uncompiled())
        for config in _opaque_configs(model):
            stack.enter_context(_use_sdpa(config))
        yield


def _disable_compiled_graphs() -> ExitStack:
    stack = ExitStack()
    stack.enter_context(torch.compiler.set_stance("force_eager"))
    # Not by `warnings.filterwarnings`, which resets Python's registry of the warnings shown so far.
    filters: Any = warnings.filters
    filters.insert(0, _FILTER)

    def remove_filter() -> None:
        with suppress(ValueError):  # the filters may have been reset
            filters.remove(_FILTER)

    stack.callback(remove_filter)
    return stack


_uncompiled = RefCountedPatch(_disable_compiled_graphs)


def _opaque_configs(model: nn.Module) -> list[Any]:
    """Return the configs of Hugging Face modules whose attention cannot be observed, if they support SDPA."""
    configs: dict[int, Any] = {}
    without_sdpa = set()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) not in _OBSERVABLE:
            configs[id(config)] = config
            if getattr(module, "_supports_sdpa", True) is False:
                without_sdpa.add(id(config))
    return [config for key, config in configs.items() if key not in without_sdpa]


@contextmanager
def _use_sdpa(config: Any) -> Iterator[None]:
    with _lock:
        override = _overrides.setdefault(id(config), _Override(config, config._attn_implementation))
        override.count += 1
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        with _lock:
            override.count -= 1
            if not override.count:
                config._attn_implementation = override.implementation
                del _overrides[id(config)]
