"""Changes that hold for the whole process, while anyone needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


class Counted:
    """A change that is made when the first block is entered, and undone when the last is left, in any thread.

    Args:
        make: makes the change, and gives the stack that undoes it.
    """

    def __init__(self, make: Callable[[], ExitStack]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._count = 0
        self._undo = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._count:
                self._undo = self._make()
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if not self._count:
                    self._undo.close()
