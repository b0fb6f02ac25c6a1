"""Attention mechanisms in one call, in memory linear in length, with readable weights.

out = regard.attention(q, k, v)
out, summary = regard.attention(q, k, v, mask=regard.mask.causal(), summary=regard.Summary(entropy=True, top=8))
"""

import os
import sys
from typing import TYPE_CHECKING

from regard.version import __version__


def _is_command_line() -> bool:
    """Return whether this process is the script `regard` or `python -m regard.cli`."""
    program = (getattr(sys, "argv", None) or [""])[0]
    if program == "-m":  # while Python locates the module
        return any(argument.removeprefix("-m") == "regard.cli" for argument in sys.orig_argv)
    return os.path.basename(program) in ("regard", "regard.exe")


# The command line prints its help without torch; its commands import the modules that they need. Lazy attributes (PEP 562)
# for everyone would not do: `import regard` registers the operators that saved programs call, and the functions `attention`,
# `merge` and `watch` have the names of submodules.
if TYPE_CHECKING or not _is_command_line():
    from regard import deprecated, nn
    from regard.attention import attention, explain
    from regard.backends.choose import record_backends
    from regard.components import mask, normalizer, position, score, summary
    from regard.components.summary import AttentionSummary, Summary, Top
    from regard.merge import merge
    from regard.plan.cache import clear as clear_caches
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
