"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# The problems are small: threads that wait for one another cost more than they do, above all where tests run side by side.
torch.set_num_threads(1)


@pytest.fixture
def several_threads() -> Iterator[None]:
    """Let operators run in several threads, for tests of just that."""
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)
