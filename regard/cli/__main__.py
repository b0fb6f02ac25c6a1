"""`python -m regard.cli`: the same as `regard`."""

from __future__ import annotations

from regard.cli import main

main()
