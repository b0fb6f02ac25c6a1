"""Types of tests that open pages in a browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Opener = Callable[..., Any]  # opens a document in a browser and returns its tab
