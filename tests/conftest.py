"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from regard.kernels import native

# The problems are small: threads that wait for one another cost more than they do, above all where tests run side by side.
torch.set_num_threads(1)


@pytest.fixture
def several_threads() -> Iterator[None]:
    """Let operators run in several threads, for tests of just that."""
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=native.instructions())
def instructions(request: Any) -> Iterator[str]:
    """Each instruction set of this machine, in turn."""
    native.ops.use(request.param)
    assert native.instructions()[0] == request.param
    yield request.param
    native.ops.use("")
