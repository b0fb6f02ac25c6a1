"""The keys and values of earlier tokens, kept for decoding step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from regard import check


class KeyValueCache:
    """The keys and values of the tokens so far, for one layer of attention.

    A growing cache starts empty, and takes those of new tokens in every call of its layer:

    >>> cache = KeyValueCache()
    >>> out, _ = layer(prompt, mask=mask.causal(), cache=cache)
    >>> out, _ = layer(token, cache=cache)  # one query, which attends to all keys so far

    A fixed one holds those of another sequence, such as an encoder's outputs, and is only read:

    >>> memory = layer.remember(encoded)
    >>> out, _ = layer(token, cache=memory)

    Without gradients, tokens are written into buffers that double when they are full: n tokens take O(n) copies. With
    gradients (outside of `torch.no_grad()`), every step makes new tensors: what autograd keeps is never overwritten.

    Args:
        keys: keys to start with, (B, G, S, D), or with other axes before (S, D).
        values: their values, (B, G, S, E).
        fixed: it is read, and never appended to.

    Source: Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need" (2019), section 2.4.
    """

    # Of the buffers, `length` places are taken.
    _keys: Tensor | None = None
    _values: Tensor | None = None
    length = 0
    fixed = False

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None, *, fixed: bool = False) -> None:
        if keys is not None or values is not None or fixed:
            self.append(keys, values)  # type: ignore[arg-type]
        self.fixed = fixed

    @property
    def keys(self) -> Tensor | None:
        """All keys so far, (B, G, S, D); None where there are none."""
        return None if self._keys is None else self._keys[..., : self.length, :]

    @property
    def values(self) -> Tensor | None:
        """All values so far, (B, G, S, E); None where there are none."""
        return None if self._values is None else self._values[..., : self.length, :]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys (B, G, L, D) and values (B, G, L, E) of L tokens; give all so far, (B, G, S, D) and (B, G, S, E)."""
        if self.fixed:
            raise ValueError("KeyValueCache: it is fixed; expected one that grows, KeyValueCache(), to append to")
        _check("keys", keys, self._keys, "(..., L, D)")
        _check("values", values, self._values, "(..., L, E)")
        if values.shape[:-1] != keys.shape[:-1]:
            shapes = f"keys has shape {tuple(keys.shape)} but values has {tuple(values.shape)}"
            raise ValueError(f"KeyValueCache: {shapes}; expected the same, but for the last axis")
        self._keys = _appended(self._keys, self.length, keys)
        self._values = _appended(self._values, self.length, values)
        self.length += keys.shape[-2]
        return self._keys[..., : self.length, :], self._values[..., : self.length, :]

    def reorder(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order: those of the hypotheses that a beam search goes on with.

        Args:
            rows: int64 or int32 (N,), from 0 to B - 1; a row may be named several times, or not at all.
        """
        fits = isinstance(rows, Tensor) and rows.dtype in (torch.int64, torch.int32)
        if not fits or rows.dim() != 1:
            raise check.wrong("KeyValueCache: rows", rows, "int64 of shape (N,), the numbers of batch rows", fits)
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)

    def __repr__(self) -> str:
        return f"KeyValueCache(length={self.length}, fixed={self.fixed})"


def _check(name: str, x: Tensor, buffer: Tensor | None, axes: str) -> None:
    """Raise unless the keys or values of new tokens fit those of the earlier ones."""
    fits = check.is_floats(x)
    if not fits or x.dim() < 2:
        raise check.wrong(f"KeyValueCache: {name}", x, f"floats of shape {axes}", fits)
    if buffer is None:
        return
    if x.dtype != buffer.dtype:
        raise TypeError(f"KeyValueCache: {name} has dtype {x.dtype}; expected {buffer.dtype}, as earlier ones have")
    if x.shape[:-2] != buffer.shape[:-2] or x.shape[-1] != buffer.shape[-1]:
        expected = f"floats of shape {(*buffer.shape[:-2], 'L', buffer.shape[-1])}, as earlier ones have"
        raise check.wrong(f"KeyValueCache: {name}", x, expected.replace("'", ""), True)


def _appended(buffer: Tensor | None, length: int, new: Tensor) -> Tensor:
    """A buffer whose first `length` places are taken, with `new` in the next ones: the same one if it has room."""
    if buffer is None:
        return new
    if torch.is_grad_enabled():
        return torch.cat([buffer[..., :length, :], new], -2)
    end = length + new.shape[-2]
    # What was made in inference mode cannot be written to outside of it.
    sealed = buffer.is_inference() and not torch.is_inference_mode_enabled()
    if end > buffer.shape[-2] or sealed:
        room = new.new_empty(*new.shape[:-2], max(end, 2 * length), new.shape[-1])
        room[..., :length, :] = buffer[..., :length, :]
        buffer = room
    buffer[..., length:end, :] = new
    return buffer
