"""regard: every attention mechanism in one call, at flash speed, with weights you can read.

out = regard.attention(q, k, v)
out, seen = regard.attention(q, k, v, mask=regard.mask.causal(), summary=regard.Summary(entropy=True, top=8))
"""

from regard import mask, nn, normalizer, position, score, summary
from regard.attention import attention, explain
from regard.kernels.choose import chosen
from regard.merge import merge
from regard.summary import Seen, Summary, Top
from regard.version import __version__
from regard.watch import watch

__all__ = [
    "Seen",
    "Summary",
    "Top",
    "__version__",
    "attention",
    "chosen",
    "explain",
    "mask",
    "merge",
    "nn",
    "normalizer",
    "position",
    "score",
    "summary",
    "watch",
]
