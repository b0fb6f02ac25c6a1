"""Key/value cache for incremental decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from regard import check


class KeyValueCache:
    """Cache of the keys and values of one attention layer.

    A growing cache starts empty. Each call of its layer appends the keys and values of the new tokens:

    >>> layer = regard.nn.MultiheadAttention(16, 4, batch_first=True)
    >>> x = torch.randn(2, 5, 16)
    >>> whole, _ = layer(x, mask=mask.causal(), need_weights=False)
    >>> cache = regard.nn.KeyValueCache()
    >>> out, _ = layer(x[:, :4], mask=mask.causal(), cache=cache)  # the prompt
    >>> out, _ = layer(x[:, 4:], cache=cache)  # one token, which attends to all five
    >>> cache.length, torch.allclose(out, whole[:, 4:], atol=1e-6)
    (5, True)

    A fixed cache holds the keys and values of another sequence, such as the output of an encoder, and is only read:

    >>> memory = layer.remember(x)
    >>> out, _ = layer(x[:, 4:], cache=memory)
    >>> torch.allclose(out, layer(x[:, 4:], x)[0], atol=1e-6)
    True

    Without gradients, tokens are written into buffers whose size doubles when they are full, so n tokens take O(n)
    copies. With gradients (outside of `torch.no_grad()`), each step allocates new tensors, so that tensors saved for
    the backward pass are never overwritten.

    Args:
        keys: initial keys, (B, G, S, D), or with other leading dimensions.
        values: initial values, (B, G, S, E).
        fixed: whether the cache is read-only.

    Source: Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need" (2019), section 2.4.
    """

    # The first `length` tokens of the buffers are valid.
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
        """The cached keys (B, G, S, D), or None if the cache is empty."""
        return None if self._keys is None else self._keys[..., : self.length, :]

    @property
    def values(self) -> Tensor | None:
        """The cached values (B, G, S, E), or None if the cache is empty."""
        return None if self._values is None else self._values[..., : self.length, :]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys (B, G, L, D) and values (B, G, L, E). Return all keys (B, G, S, D) and values (B, G, S, E)."""
        if self.fixed:
            raise ValueError("KeyValueCache: the cache is fixed; expected a growing one, KeyValueCache(), to append to")
        _check_new_tokens("keys", keys, self._keys, "(..., L, D)")
        _check_new_tokens("values", values, self._values, "(..., L, E)")
        if values.shape[:-1] != keys.shape[:-1]:
            shapes = f"keys has shape {tuple(keys.shape)} but values has {tuple(values.shape)}"
            raise ValueError(f"KeyValueCache: {shapes}; expected the same, except for the last dimension")
        self._keys = _append(self._keys, self.length, keys)
        self._values = _append(self._values, self.length, values)
        self.length += keys.shape[-2]
        return self._keys[..., : self.length, :], self._values[..., : self.length, :]

    def reorder(self, rows: Tensor) -> None:
        """Replace the batch by a selection of its rows, such as the surviving hypotheses of a beam search.

        Args:
            rows: int64 or int32 (N,), batch indices from 0 to B - 1. Rows may repeat.
        """
        fits = isinstance(rows, Tensor) and rows.dtype in (torch.int64, torch.int32)
        if not fits or rows.dim() != 1:
            raise check.error("KeyValueCache: rows", rows, "an int64 tensor of shape (N,), batch indices", fits)
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)

    def __repr__(self) -> str:
        return f"KeyValueCache(length={self.length}, fixed={self.fixed})"


def _check_new_tokens(name: str, x: Tensor, buffer: Tensor | None, axes: str) -> None:
    """Raise unless keys or values of new tokens match the cached ones in dtype and shape."""
    fits = check.is_float_tensor(x)
    if not fits or x.dim() < 2:
        raise check.error(f"KeyValueCache: {name}", x, f"a float tensor of shape {axes}", fits)
    if buffer is None:
        return
    if x.dtype != buffer.dtype:
        raise TypeError(f"KeyValueCache: {name} has dtype {x.dtype}; expected {buffer.dtype}, the dtype of the cache")
    if x.shape[:-2] != buffer.shape[:-2] or x.shape[-1] != buffer.shape[-1]:
        expected = f"a float tensor of shape {(*buffer.shape[:-2], 'L', buffer.shape[-1])}, as in the cache"
        raise check.error(f"KeyValueCache: {name}", x, expected.replace("'", ""), True)


def _append(buffer: Tensor | None, length: int, new: Tensor) -> Tensor:
    """Write `new` after the first `length` tokens of a buffer. Return the buffer, which is a new one if it was full."""
    if buffer is None:
        return new
    if torch.is_grad_enabled():
        return torch.cat([buffer[..., :length, :], new], -2)
    end = length + new.shape[-2]
    # Inference tensors cannot be written outside of inference mode.
    is_read_only = buffer.is_inference() and not torch.is_inference_mode_enabled()
    if end > buffer.shape[-2] or is_read_only:
        larger = new.new_empty(*new.shape[:-2], max(end, 2 * length), new.shape[-1])
        larger[..., :length, :] = buffer[..., :length, :]
        buffer = larger
    buffer[..., length:end, :] = new
    return buffer
