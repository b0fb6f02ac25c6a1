"""Torch's own layers from inside: their attention is seen, and the fast path that they take stays.

Any mode that sees torch's functions turns the fast path of `nn.TransformerEncoder` and `nn.MultiheadAttention` off, and
with it what they give for padding. So a watch takes its modes off while such a layer runs, and the functions that those
layers call are exchanged instead. That holds for the whole process; only a thread that is inside, in a watch, is
answered.
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

from regard.watch.capture.patch import Counted


class Mode(Protocol):
    """A mode that answers calls of attention itself."""

    def answer(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what `function` does, which has this name in `FUNCTIONS`."""

    def see_softmax(self, weights: Tensor) -> None:
        """These are what a softmax gave."""


class _Thread(threading.local):
    """What a thread is inside of: how deep, and the modes that were taken off, the outermost first."""

    def __init__(self) -> None:
        self.depth = 0
        self.modes: list[Any] = []


_thread = _Thread()
_OWN = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
# What attends in there.
FUNCTIONS: dict[str, tuple[Any, str]] = {
    "sdpa": (F, "scaled_dot_product_attention"),
    "mha": (F, "multi_head_attention_forward"),
    "fast_mha": (torch, "_native_multi_head_attention"),
    "fast_layer": (torch, "_transformer_encoder_layer_fwd"),
    "softmax": (F, "softmax"),
}


def is_torch_own(module: nn.Module) -> bool:
    """Is it a layer of torch's that may take the fast path, with nothing inside that somebody else wrote?"""
    return type(module) in _OWN and all(type(part).__module__.startswith("torch.nn.") for part in module.modules())


def enter() -> None:
    """The thread enters one of torch's own layers."""
    _thread.depth += 1
    if _thread.depth == 1:
        while (stack := _get_current_function_mode_stack()) and hasattr(stack[-1], "see_softmax"):  # type: ignore[no-untyped-call]
            _thread.modes.insert(0, _pop_mode())  # type: ignore[no-untyped-call]


def leave() -> None:
    """The thread leaves what it entered last."""
    _thread.depth -= 1
    if _thread.depth == 0:
        modes, _thread.modes = _thread.modes, []
        for mode in modes:
            _push_mode(mode)  # type: ignore[no-untyped-call]


@contextmanager
def answered_by(mode: TorchFunctionMode) -> Iterator[None]:
    """Have a mode, which is off while it handles a call, answer what is called in the block."""
    _thread.modes.append(mode)
    try:
        yield
    finally:
        _thread.modes.pop()


def original(function: Any) -> Any:
    """What torch calls by its own name, and so may find exchanged."""
    return getattr(function, "exchanged_for", function)


def _exchange() -> ExitStack:
    stack = ExitStack()
    for name, (owner, attribute) in FUNCTIONS.items():
        before = getattr(owner, attribute)
        answer: Any = _seeing(before) if name == "softmax" else _answering(name, before)
        answer.exchanged_for = before
        setattr(owner, attribute, answer)
        stack.callback(setattr, owner, attribute, before)
    return stack


def _answering(name: str, before: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(before)
    def answer(*args: Any, **kwargs: Any) -> Any:
        modes = _thread.modes
        if not modes:
            return before(*args, **kwargs)
        # The last one answers; what it calls is seen by the others, which are on again meanwhile.
        _thread.modes = []
        try:
            with ExitStack() as stack:
                for mode in modes[:-1]:
                    stack.enter_context(mode)
                return modes[-1].answer(name, before, args, kwargs)
        finally:
            _thread.modes = modes

    return answer


def _seeing(before: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(before)
    def answer(*args: Any, **kwargs: Any) -> Any:
        out = before(*args, **kwargs)
        for mode in _thread.modes:
            mode.see_softmax(out)
        return out

    return answer


exchanged = Counted(_exchange)
