"""Attention layers, used like the layers of `torch.nn`.

    layer = regard.nn.MultiheadAttention(512, 8, batch_first=True, position=regard.position.ALiBi())
    model = regard.nn.replace_attention(model)

`MultiheadAttention` is a drop-in replacement for `torch.nn.MultiheadAttention`. `AttentionBlock` adds the residual
connection and the layer norm. `AdditiveAttention`, `LuongAttention` and `recurrent` are for recurrent networks,
`vision` is for convolutional networks.
"""

from regard.deprecated import getter
from regard.nn import recurrent, vision
from regard.nn.additive import AdditiveAttention
from regard.nn.block import AttentionBlock
from regard.nn.cache import KeyValueCache
from regard.nn.component import ComponentModule
from regard.nn.latent import LatentAttention
from regard.nn.luong import LuongAttention
from regard.nn.memory import Memory
from regard.nn.multihead import MultiheadAttention
from regard.nn.pooling import AdditivePooling, AttentionPooling, KernelPooling
from regard.nn.replace import replace_attention
from regard.nn.transformers import register

__all__ = [
    "AdditiveAttention",
    "AdditivePooling",
    "AttentionBlock",
    "AttentionPooling",
    "ComponentModule",
    "KernelPooling",
    "KeyValueCache",
    "LatentAttention",
    "LuongAttention",
    "Memory",
    "MultiheadAttention",
    "recurrent",
    "register",
    "replace_attention",
    "vision",
]


__getattr__ = getter("regard.nn")
