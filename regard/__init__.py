"""Attention mechanisms in one call, in memory linear in length, with readable weights.

out = regard.attention(q, k, v)
out, seen = regard.attention(q, k, v, mask=regard.mask.causal(), summary=regard.Summary(entropy=True, top=8))
"""

import sys

from regard import deprecated, nn
from regard.attention import attention, explain
from regard.backends.choose import record_backends
from regard.components import mask, normalizer, position, score, summary
from regard.components.summary import AttentionSummary, Summary, Top
from regard.merge import merge
from regard.plan.cache import clear as clear_caches
from regard.version import __version__
from regard.watch import watch

# The components are public as `regard.mask` and so on, by `import regard.mask` too.
for _module in (mask, normalizer, position, score, summary):
    sys.modules[f"regard.{_module.__name__.rpartition('.')[2]}"] = _module

deprecated.install()
__getattr__ = deprecated.getter("regard")

__all__ = [
    "AttentionSummary",
    "Summary",
    "Top",
    "__version__",
    "attention",
    "clear_caches",
    "explain",
    "mask",
    "merge",
    "nn",
    "normalizer",
    "position",
    "record_backends",
    "score",
    "summary",
    "watch",
]
