"""Attention mechanisms in one call, in memory linear in length, with readable weights.

out = regard.attention(q, k, v)
out, summary = regard.attention(q, k, v, mask=regard.mask.causal(), summary=regard.Summary(entropy=True, top=8))
"""

import os
import sys
from typing import TYPE_CHECKING

from regard.version import __version__ as __version__


def _is_command_line() -> bool:
    """Return whether this process is the script `regard` or `python -m regard.cli`."""
    program = (getattr(sys, "argv", None) or [""])[0]
    if program == "-m":  # while Python locates the module
        return any(argument.removeprefix("-m") == "regard.cli" for argument in sys.orig_argv)
    return os.path.basename(program) in ("regard", "regard.exe")


# The command line prints its help without torch, and calls `regard.library.load` before it runs a command. Lazy attributes
# (PEP 562) for everyone would not do: `import regard` registers the operators that saved programs call, and the functions
# `attention`, `merge` and `watch` have the names of submodules.
if TYPE_CHECKING or not _is_command_line():
    from regard import library
    from regard.library import *  # noqa: F403
    from regard.library import __all__ as __all__

    library.load()
