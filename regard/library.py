"""The public names of `regard`. Importing this module imports the library."""

from __future__ import annotations

import sys
from typing import Any

from regard import deprecated, nn
from regard.attention import attention, explain
from regard.backends.choose import record_backends
from regard.backends.flops import register_flops
from regard.components import mask, normalizer, position, score, summary
from regard.components.summary import AttentionSummary, Summary, Top
from regard.merge import merge
from regard.nn.transformers import register_on_import
from regard.plan.cache import clear as clear_caches
from regard.version import __version__
from regard.watch import watch

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


def load() -> None:
    """Set the public names in the package, where its import left them out, and let old names be resolved."""
    package: Any = sys.modules["regard"]
    for name in __all__:
        setattr(package, name, globals()[name])
    # The components are public as `regard.mask` and so on, by `import regard.mask` too.
    for module in (mask, normalizer, position, score, summary):
        sys.modules[f"regard.{module.__name__.rpartition('.')[2]}"] = module
    deprecated.install()
    register_on_import()
    register_flops()
    package.__getattr__ = deprecated.getter("regard")
