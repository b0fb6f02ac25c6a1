"""`python -m regard.cli`: the same as `regard`."""

from __future__ import annotations

from regard.cli import main

if __name__ == "__main__":  # and not in the processes that training shares its work with
    main()
