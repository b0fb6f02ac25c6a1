"""Entry point of `python -m regard.cli`, the same as the script `regard`."""

from __future__ import annotations

from regard.cli import main

if __name__ == "__main__":  # not in the worker processes of training, which import this module
    main()
