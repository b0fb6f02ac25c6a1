"""Training steps of models with the same weights, with our attention and with PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from regard.bench.cases import Case
from regard.components.mask import And, Band, Before, Mask
from regard.components.score import Additive
from regard.models.cross_entropy import cross_entropy
from regard.models.recurrent import Recurrent
from regard.models.transformer import Transformer
from regard.nn import memory, multihead

_SENTENCES, _LONGEST, _PIECES, _DROPOUT = 64, 20, 8000, 0.2


def steps() -> list[Case]:
    """Return all cases: a batch of sentences of 8 to 20 tokens, forward and backward, in models of `regard train`."""
    transformer = Transformer(_PIECES, _PIECES, dropout=_DROPOUT, shared=True)
    recurrent = Recurrent(_PIECES, _PIECES, dropout=_DROPOUT, shared=True)
    return [
        _step("transformer", "torch SDPA", transformer, multihead, _sdpa),
        _step("recurrent, additive attention", "PyTorch, broadcast", recurrent, memory, _broadcast),
    ]


def _step(
    name: str, peer: str, model: Transformer | Recurrent, module: ModuleType, attention: Callable[..., Any]
) -> Case:
    """Return a case whose inputs are the parameters of a model, and whose output is the loss."""
    with_loss = _ModelWithLoss(model)
    names = [key for key, _ in with_loss.named_parameters()]
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(4, _PIECES, (_SENTENCES, _LONGEST), generator=generator) for _ in range(2))
    lengths = torch.randint(8, _LONGEST + 1, (_SENTENCES,), generator=generator)
    real = torch.arange(_LONGEST - 1) < lengths[:, None]

    def loss(*parameters: Tensor) -> Sequence[Tensor]:
        named = dict(zip(names, parameters, strict=True))
        return [functional_call(with_loss, named, (source, lengths, target, real))]

    def theirs(*parameters: Tensor) -> Sequence[Tensor]:
        with _replace_attention(module, attention):
            return loss(*parameters)

    shape = f"{_SENTENCES} sentences, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
    # Weights as large as after some training: with initial weights, the gradients of additive attention nearly cancel.
    return Case(
        name, shape, peer, lambda: [0.1 * torch.randn_like(p) for p in model.parameters()], loss, theirs, model=model
    )


class _ModelWithLoss(nn.Module):
    """A model and its training loss."""

    def __init__(self, model: Transformer | Recurrent) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor, real: Tensor) -> Tensor:
        hidden = self.model.hidden(source, lengths, target[:, :-1])
        return cross_entropy(hidden[real], self.model.target.weight, target[:, 1:][real])


@contextmanager
def _replace_attention(module: ModuleType, attention: Callable[..., Any]) -> Iterator[None]:
    """Replace the attention function of a module within the context."""
    ours = vars(module)["attention"]
    vars(module)["attention"] = attention
    try:
        yield
    finally:
        vars(module)["attention"] = ours


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None, dropout: float, **_: Any) -> Tensor:
    """Scaled dot-product attention of PyTorch, with the masks that the models use."""
    if isinstance(mask, Band):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    allowed = None if mask is None else _key_mask(mask, k.shape[-2])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)


def _broadcast(q: Tensor, k: Tensor, v: Tensor, *, score: Additive, mask: Mask, dropout: float, **_: Any) -> Tensor:
    """Additive attention in plain PyTorch, for q (B, L, A), k (B, S, A), v (B, S, E)."""
    scores = torch.tanh(q[:, :, None] + k[:, None]) @ score.v
    weights = scores.masked_fill(~_key_mask(mask, k.shape[1])[:, None], -torch.inf).softmax(-1)
    return F.dropout(weights, dropout) @ v


def _key_mask(mask: Mask, keys: int) -> Tensor:
    """Return a bool tensor (B, S) that is True for keys that are not padding."""
    if isinstance(mask, And):
        return _key_mask(mask.left, keys) & _key_mask(mask.right, keys)
    assert isinstance(mask, Before)
    return torch.arange(keys) < mask.n[:, None]
