"""Attention inside torch's own layers, recorded without disabling their fast path.

An active `TorchFunctionMode` disables the fast path of `nn.TransformerEncoder` and `nn.MultiheadAttention`, and changes
what they return for padding. The recording modes are therefore removed while such a layer runs, and the functions that
these layers call are patched instead. The patches hold for the whole process; they reach a mode only from a thread that
runs such a layer inside a watch.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode


class RefCountedPatch:
    """A process-wide change, applied when the first block is entered, in any thread, and undone when the last is left.

    Args:
        apply: applies the change and returns the stack that undoes it.
    """

    def __init__(self, apply: Callable[[], ExitStack]) -> None:
        self._apply = apply
        self._lock = threading.Lock()
        self._count = 0
        self._undo = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._count:
                self._undo = self._apply()
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if not self._count:
                    self._undo.close()


class RecordingMode(Protocol):
    """A mode that handles attention calls."""

    def handle(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of `function`, whose key in `FUNCTIONS` is `name`."""

    def on_softmax(self, weights: Tensor) -> None:
        """Receive the result of a softmax."""


class _ThreadState(threading.local):
    """The nesting depth of torch's layers in this thread, and the modes removed meanwhile, outermost first."""

    def __init__(self) -> None:
        self.depth = 0
        self.modes: list[Any] = []


_thread = _ThreadState()
_TORCH_LAYERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
# The functions that compute attention in these layers.
FUNCTIONS: dict[str, tuple[Any, str]] = {
    "sdpa": (F, "scaled_dot_product_attention"),
    "mha": (F, "multi_head_attention_forward"),
    "fast_mha": (torch, "_native_multi_head_attention"),
    "fast_layer": (torch, "_transformer_encoder_layer_fwd"),
    "softmax": (F, "softmax"),
}


def is_torch_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer of torch that may take the fast path: it contains only modules of torch."""
    return type(module) in _TORCH_LAYERS and all(
        type(part).__module__.startswith("torch.nn.") for part in module.modules()
    )


def enter_layer() -> None:
    """Note that this thread enters a torch layer, and remove the recording modes at the outermost one."""
    _thread.depth += 1
    if _thread.depth == 1:
        while (stack := _get_current_function_mode_stack()) and hasattr(stack[-1], "on_softmax"):  # type: ignore[no-untyped-call]
            _thread.modes.insert(0, _pop_mode())  # type: ignore[no-untyped-call]


def exit_layer() -> None:
    """Note that this thread leaves a torch layer, and restore the recording modes after the outermost one."""
    _thread.depth -= 1
    if _thread.depth == 0:
        modes, _thread.modes = _thread.modes, []
        for mode in modes:
            _push_mode(mode)  # type: ignore[no-untyped-call]


@contextmanager
def dispatch_to(mode: TorchFunctionMode) -> Iterator[None]:
    """Send patched calls in the block to a mode that is disabled because it is handling a call."""
    _thread.modes.append(mode)
    try:
        yield
    finally:
        _thread.modes.pop()


def unpatched(function: Any) -> Any:
    """Return the function behind a patch. Torch passes the patch to modes where it looks a function up by its name."""
    while hasattr(function, "patched_function"):
        function = function.patched_function
    return function


def _patch_functions() -> ExitStack:
    stack = ExitStack()
    for name, (owner, attribute) in FUNCTIONS.items():
        original = getattr(owner, attribute)
        patch = _observe_softmax(original) if name == "softmax" else _dispatch(name, original)
        patch.patched_function, patch.is_active = original, True
        setattr(owner, attribute, patch)
        stack.callback(_restore, owner, attribute, patch)
    return stack


def _restore(owner: Any, attribute: str, patch: Any) -> None:
    # A patch that was set on top of this one stays, and may keep calling this one.
    patch.is_active = False
    if getattr(owner, attribute) is patch:
        setattr(owner, attribute, patch.patched_function)


def _dispatch(name: str, original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def patch(*args: Any, **kwargs: Any) -> Any:
        modes = _thread.modes
        if not modes or not patch.is_active:  # type: ignore[attr-defined]
            return original(*args, **kwargs)
        # The innermost mode handles the call. The others are enabled meanwhile, and handle what it calls.
        _thread.modes = []
        try:
            with ExitStack() as stack:
                for mode in modes[:-1]:
                    stack.enter_context(mode)
                return modes[-1].handle(name, original, args, kwargs)
        finally:
            _thread.modes = modes

    return patch


def _observe_softmax(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def patch(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        for mode in _thread.modes if patch.is_active else ():  # type: ignore[attr-defined]
            mode.on_softmax(out)
        return out

    return patch


patched = RefCountedPatch(_patch_functions)
