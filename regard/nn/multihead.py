"""Multi-head attention: `torch.nn.MultiheadAttention` extended by the components of regard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add, and_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import check
from regard.attention import AnyScore, attention
from regard.components.mask import Band, Mask, dense
from regard.components.normalizer import Normalizer
from regard.components.position import Bias, Rotary
from regard.components.score import Score
from regard.components.summary import Summary
from regard.components.tile import Sizes
from regard.nn.cache import KeyValueCache
from regard.nn.component import ComponentModule
from regard.nn.nested import attend_nested
from regard.nn.torch_masks import convert_masks, materialize_masks

_NAME = "MultiheadAttention"


def _keep_output(*_: Any) -> None:
    """Do nothing, as a hook."""


class MultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention: a drop-in replacement for `torch.nn.MultiheadAttention`, with the same arguments,
    parameters, defaults and results.

        head_h = attention(query W_h^Q, key W_h^K, value W_h^V)
        output = concat(head_1, ..., head_H) W^O

    Differences: memory is linear in the sequence length unless weights are requested. Requesting them does not change the
    output, and they are the weights before dropout. The attention output of a query that may attend to no key is 0, not NaN.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            `torch.nn.MultiheadAttention`.
        score: one of `regard.score`, or a function (q, k) -> scores; the scaled dot product by default.
        normalizer: one of `regard.normalizer`; softmax by default.
        position: `position.Rotary`, which rotates queries and keys, or a bias of the scores, `position.ALiBi` or
            `position.T5`.
        softcap: scores become softcap * tanh(score / softcap).
        kv_heads: number of key/value heads, a divisor of num_heads (grouped-query attention); num_heads by default. The
            input projection then has embed_dim + 2 * kv_heads * head_dim rows.

    The tensors of score, normalizer and position are registered in the layer: an `nn.Parameter` as a parameter, any
    other tensor as a buffer.

    >>> layer = regard.nn.MultiheadAttention(16, 4, batch_first=True, position=position.Rotary(4), kv_heads=2)
    >>> layer.in_proj_weight.shape
    torch.Size([32, 16])
    >>> x = torch.randn(2, 5, 16)
    >>> out, statistics = layer(x, mask=mask.causal(), summary=Summary(max=True))
    >>> out.shape, statistics.max.shape
    (torch.Size([2, 5, 16]), torch.Size([2, 4, 5]))
    >>> statistics.max[:, :, 0].unique()  # the first query attends to a single key
    tensor([1.], grad_fn=...)
    >>> peer = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    >>> same = regard.nn.MultiheadAttention(16, 4, batch_first=True)
    >>> same.load_state_dict(peer.state_dict())
    <All keys matched successfully>
    >>> torch.allclose(same(x, x, x)[0], peer(x, x, x)[0], atol=1e-6)
    True

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.2; Ainslie et al., "GQA" (2023), section
    2.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        score: AnyScore | None = None,
        normalizer: Normalizer | None = None,
        position: Rotary | Bias | None = None,
        softcap: float | None = None,
        kv_heads: int | None = None,
    ) -> None:
        check.integer(f"{_NAME}: embed_dim", embed_dim, 1)
        check.integer(f"{_NAME}: num_heads", num_heads, 1)
        if embed_dim % num_heads:
            raise ValueError(f"{_NAME}: embed_dim is {embed_dim}; expected a multiple of num_heads, {num_heads}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._set_components(score, normalizer, position, softcap)
        if kv_heads is not None:
            self._resize_key_value_projections(kv_heads)

    def _set_components(
        self,
        score: AnyScore | None = None,
        normalizer: Normalizer | None = None,
        position: Rotary | Bias | None = None,
        softcap: float | None = None,
    ) -> None:
        """Set the attributes that `torch.nn.MultiheadAttention` does not have."""
        if score is not None and (isinstance(score, type) or not (isinstance(score, Score) or callable(score))):
            raise check.error(f"{_NAME}: score", score, "one of regard.score, or a function (q, k) -> scores", False)
        if normalizer is not None and not isinstance(normalizer, Normalizer):
            raise check.error(f"{_NAME}: normalizer", normalizer, "one of regard.normalizer", False)
        if position is not None and not isinstance(position, Rotary | Bias):
            expected = "a position.Rotary, position.ALiBi or position.T5"
            raise check.error(f"{_NAME}: position", position, expected, False)
        if isinstance(position, Rotary) and position.width > self.head_dim:
            expected = f"at most {self.head_dim}, the width of a head"
            raise ValueError(f"{_NAME}: position rotates {position.width} elements; expected {expected}")
        if softcap is not None:
            check.positive(f"{_NAME}: softcap", softcap, ", or None")
        self.score = ComponentModule(score) if isinstance(score, Score) else score
        self.normalizer = None if normalizer is None else ComponentModule(normalizer)
        self.position = ComponentModule(position) if isinstance(position, Bias) else position
        self.softcap = softcap
        self.kv_heads = self.num_heads
        # The layers of nn.Transformer bypass `forward` by a fused kernel, but not if a module has a hook.
        self.register_forward_hook(_keep_output)

    def _resize_key_value_projections(self, kv_heads: int) -> None:
        """Resize the projections of keys and values to kv_heads heads."""
        check.integer(f"{_NAME}: kv_heads", kv_heads, 1)
        if self.num_heads % kv_heads:
            raise ValueError(f"{_NAME}: kv_heads is {kv_heads}; expected a divisor of num_heads, {self.num_heads}")
        self.kv_heads = kv_heads
        self._qkv_same_embed_dim = self._qkv_same_embed_dim and kv_heads == self.num_heads
        _, width, _ = self._widths
        shapes: dict[str, tuple[int, ...]] = {
            "in_proj_weight": (sum(self._widths), self.embed_dim),
            "in_proj_bias": (sum(self._widths),),
            "k_proj_weight": (width, self.kdim),
            "v_proj_weight": (width, self.vdim),
            "bias_k": (1, 1, width),
            "bias_v": (1, 1, width),
        }
        for name, shape in shapes.items():
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, nn.Parameter(old.new_empty(shape)))
        self._reset_parameters()

    @property
    def _widths(self) -> list[int]:
        """Widths of q, k and v, over all their heads."""
        return [self.embed_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]

    def _reset_parameters(self) -> None:
        # As in torch and in the same order, for the parameters that exist.
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(self, name) is not None:
                nn.init.xavier_uniform_(getattr(self, name))
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask: Mask | None = None,
        summary: Summary | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Any]:
        """Attend.

        Args:
            query: (L, B, embed_dim), or (B, L, embed_dim) with batch_first, which also accepts several batch
                dimensions; or (L, embed_dim) for one sequence. With batch_first, query, key and value may be nested
                tensors.
            key: (S, B, kdim), or as for `query`; `query` by default (self-attention).
            value: (S, B, vdim), or as for `query`; `key` by default.
            key_padding_mask: (B, S), or (S,) for one sequence: bool, True = may not be attended to, or float, added to
                the scores.
            need_weights: whether to return the weights too, which materializes all of them.
            attn_mask: (L, S) or (B * num_heads, L, S): bool, True = may not attend, or float, added to the scores.
            average_attn_weights: whether to average the weights over the heads.
            is_causal: attend causally. With attn_mask, it is a hint that this is the causal mask, which is read.
            mask: one of `regard.mask`, True = may attend (unlike attn_mask). All masks are combined by AND.
            summary: which statistics of the attention weights to return; need_weights is then ignored.
            cache: keys and values of earlier calls. New keys are appended to a growing cache; the queries are aligned
                with the last keys, and masks count keys from the first cached one. A fixed cache replaces key and
                value.

        Returns:
            The output, of the shape of query, and a second value: with `summary` an `AttentionSummary`; otherwise with
            need_weights the weights (B, L, S), or (B, num_heads, L, S) if not averaged; otherwise None. There is no
            batch dimension for one sequence.
        """
        if any(getattr(x, "is_nested", False) for x in (query, key, value)):
            if key_padding_mask is not None or attn_mask is not None or cache is not None or not self.batch_first:
                expected = "batch_first=True, and no key_padding_mask, attn_mask or cache"
                raise ValueError(f"{_NAME}: query, key or value is nested; expected {expected}")
            return attend_nested(
                self.forward, query, key, value, mask, is_causal, need_weights=need_weights,
                average_attn_weights=average_attn_weights, summary=summary,
            )  # fmt: skip
        q, k, v = self._project(query, key, value, cache)
        past = 0 if cache is None or cache.fixed else cache.length
        size = Sizes(math.prod(q.shape[:-3]), self.num_heads, self.kv_heads, q.shape[-2], past + k.shape[-2])
        masks, added = convert_masks(size, self._batch(query), key_padding_mask, attn_mask, is_causal, past)
        if mask is not None:
            if not isinstance(mask, Mask):
                expected = "one of regard.mask (pass a tensor as attn_mask or as mask.dense(tensor))"
                raise check.error(f"{_NAME}: mask", mask, expected, False)
            masks.append(mask)
        bias = self.position() if isinstance(self.position, ComponentModule) else None
        if isinstance(self.position, Rotary):
            q, k = self.position(q, k, start=past)
        if cache is not None and not cache.fixed:
            k, v = cache.append(k, v)
        if past and (masks or bias is not None):
            masks.append(Band(None, None, past))  # allows everything; sets the alignment of the other masks
        allowed = reduce(and_, masks) if masks else None
        if added:
            bias = reduce(add, added if bias is None else [*added, materialize_masks(allowed, bias, size, k)[1]])
        if self.bias_k is not None or self.add_zero_attn:
            k, v, allowed, bias = self._append_learned_keys(k, v, allowed, bias, size)

        requested = Summary(full=True) if summary is None and need_weights else summary
        arguments: dict[str, Any] = {
            "score": self.score() if isinstance(self.score, ComponentModule) else self.score,
            "normalizer": None if self.normalizer is None else self.normalizer(),
            "softcap": self.softcap,
            "dropout": self.dropout if self.training else 0.0,
        }
        result: Any = attention(q, k, v, mask=allowed, bias=bias, summary=requested, **arguments)
        if requested is None:
            return self._output(result, query), None
        heads, statistics = result
        if query.dim() == 2:
            statistics = _squeeze_batch(statistics)
        if summary is not None:
            return self._output(heads, query), statistics
        weights = statistics.full.mean(-3) if average_attn_weights else statistics.full
        return self._output(heads, query), weights.to(heads.dtype)

    def remember(self, key: Tensor, value: Tensor | None = None) -> KeyValueCache:
        """Project the keys and values of another sequence once, to attend to them by `layer(query, cache=memory)`.

        Args:
            key: (S, B, kdim), or another shape that `forward` accepts.
            value: (S, B, vdim), or as for `key`; `key` by default.
        """
        return KeyValueCache(*self._project_keys_values(key, key if value is None else value), fixed=True)

    def _project(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, cache: KeyValueCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries (B, H, L, D), keys and values (B, G, S, D)."""
        self._check("query", query, self.embed_dim)
        if cache is not None and cache.fixed:
            if key is not None or value is not None:
                raise ValueError(f"{_NAME}: cache is fixed and key or value is given; expected one or the other")
            if isinstance(self.position, Rotary):
                raise ValueError(f"{_NAME}: cache is fixed and position is Rotary; expected a growing cache")
            k, v = cache.keys, cache.values
            assert k is not None and v is not None
            return self._split_heads(F.linear(query, *self._projections()[0])), k, v
        key = query if key is None else key
        value = key if value is None else value
        if query is key is value and self.in_proj_weight is not None:
            q, k, v = torch.split(F.linear(query, self.in_proj_weight, self.in_proj_bias), self._widths, -1)
            return self._split_heads(q), self._split_heads(k), self._split_heads(v)
        k, v = self._project_keys_values(key, value)
        if self._batch(key) != self._batch(query):
            shapes = f"key has shape {tuple(key.shape)} but query has {tuple(query.shape)}"
            raise ValueError(f"{_NAME}: {shapes}; expected the same batch")
        return self._split_heads(F.linear(query, *self._projections()[0])), k, v

    def _project_keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Project to keys and values, (B, G, S, D) each."""
        self._check("key", key, self.kdim)
        if key is value and self.in_proj_weight is not None:
            start, bias = self.embed_dim, self.in_proj_bias
            both = F.linear(key, self.in_proj_weight[start:], None if bias is None else bias[start:])
            k, v = both.chunk(2, -1)
        else:
            self._check("value", value, self.vdim)
            if value.shape[:-1] != key.shape[:-1]:
                shapes = f"value has shape {tuple(value.shape)} but key has {tuple(key.shape)}"
                raise ValueError(f"{_NAME}: {shapes}; expected the same length and batch")
            _, to_k, to_v = self._projections()
            k, v = F.linear(key, *to_k), F.linear(value, *to_v)
        return self._split_heads(k), self._split_heads(v)

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return weight and bias of the projections to queries, keys and values."""
        weights: Sequence[Tensor] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: Sequence[Tensor | None] = (None, None, None)
        if self.in_proj_weight is not None:
            weights = torch.split(self.in_proj_weight, self._widths)
        if self.in_proj_bias is not None:
            biases = torch.split(self.in_proj_bias, self._widths)
        return list(zip(weights, biases, strict=True))

    def _split_heads(self, x: Tensor) -> Tensor:
        """Return a view of (L, B, H * D), (B, L, H * D) or (L, H * D) as (B, H, L, D)."""
        x = x.view(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim)
        if x.dim() == 3:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.transpose(-3, -2)

    def _output(self, heads: Tensor, query: Tensor) -> Tensor:
        """Apply the output projection to (B, H, L, D), and return it in the layout of `query`."""
        x = heads.transpose(-3, -2)
        if query.dim() == 2:
            x = x[0]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return self.out_proj(x.flatten(-2))  # type: ignore[no-any-return]

    def _check(self, name: str, x: Tensor, width: int) -> None:
        """Raise unless `x` is a sequence, or a batch of sequences, of this width."""
        fits = check.is_float_tensor(x)
        if not fits or x.dim() < 2 or (x.dim() > 3 and not self.batch_first) or x.shape[-1] != width:
            n = "L" if name == "query" else "S"
            axes = f"(B, {n}, {width})" if self.batch_first else f"({n}, B, {width})"
            raise check.error(
                f"{_NAME}: {name}", x, f"a float tensor of shape {axes}, or ({n}, {width}) for one sequence", fits
            )
        dtype = self.out_proj.weight.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{_NAME}: {name} has dtype {x.dtype} but the layer has {dtype}; expected the same")

    def _batch(self, x: Tensor) -> tuple[int, ...]:
        """Return the batch shape of (L, B, E), (B, L, E) or (L, E)."""
        return tuple(x.shape[:-2] if self.batch_first or x.dim() == 2 else x.shape[1:-1])

    def _append_learned_keys(
        self, k: Tensor, v: Tensor, mask: Mask | None, bias: Tensor | Bias | None, size: Sizes
    ) -> tuple[Tensor, Tensor, Mask | None, Tensor | None]:
        """Append bias_k and the zero key of add_zero_attn to the keys. All queries may attend to them, without bias, so
        mask and bias are materialized (L x S) and padded.
        """
        extra = [] if self.bias_k is None or self.bias_v is None else [(self.bias_k, self.bias_v)]
        if self.add_zero_attn:
            extra.append((k.new_zeros(1, 1, self._widths[1]),) * 2)
        table, added = materialize_masks(mask, bias, size, k)
        for extra_k, extra_v in extra:
            extra_k, extra_v = self._split_heads(extra_k).to(k.dtype), self._split_heads(extra_v).to(v.dtype)
            k = torch.cat([k, extra_k.expand(*k.shape[:-2], 1, -1)], -2)
            v = torch.cat([v, extra_v.expand(*v.shape[:-2], 1, -1)], -2)
        mask = None if table is None else dense(F.pad(table, (0, len(extra)), value=True))
        return k, v, mask, None if added is None else F.pad(added, (0, len(extra)))


def _squeeze_batch(x: Any) -> Any:
    """Remove the batch dimension of size 1 from the tensors of a summary."""
    if isinstance(x, tuple):
        return type(x)(*map(_squeeze_batch, x))
    return None if x is None else x[0]
