"""What tests of pages in a browser share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Opener = Callable[..., Any]  # opens a document in a browser, and gives its tab
