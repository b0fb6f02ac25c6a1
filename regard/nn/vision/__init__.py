"""Attention for convolutional networks: layers on feature maps (B, C, H, W), positions, and pooling.

All layers accept maps of any height and width.
"""

from regard.nn.vision.channel import CBAM, Gates, SqueezeExcitation
from regard.nn.vision.non_local import NonLocalBlock
from regard.nn.vision.patch import PatchAttention
from regard.nn.vision.pooling import AttentionPool2d
from regard.nn.vision.position import Learned2d, RelativeBias2d, Rotary2d, Sinusoidal2d
from regard.nn.vision.window import WindowAttention2d

__all__ = [
    "CBAM",
    "AttentionPool2d",
    "Gates",
    "Learned2d",
    "NonLocalBlock",
    "PatchAttention",
    "RelativeBias2d",
    "Rotary2d",
    "Sinusoidal2d",
    "SqueezeExcitation",
    "WindowAttention2d",
]
