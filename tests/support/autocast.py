"""Checks of recurrent layers under autocast, which also run in processes that emulate an older CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.nn.recurrent import RecurrentDecoder, RecurrentEncoder

KINDS = ("gru", "lstm")
LENGTHS = torch.tensor([5, 3, 0])


def outputs(cell: str, x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of each code path that runs a recurrent layer, by name."""
    torch.manual_seed(0)
    encoder = RecurrentEncoder(8, 7, cell=cell, layers=2)  # type: ignore[arg-type]
    decoder = RecurrentDecoder(8, 6, 14, cell=cell, order="luong")  # type: ignore[arg-type]
    memory, state = encoder(x)
    packed, last = encoder(x, LENGTHS)
    return {
        "encoder": memory, "encoder, packed": packed, "encoder, read": encoder.read(x, LENGTHS),
        "state": state.hidden, "state, packed": last.hidden, "decoder": decoder(x, memory)[0],
    }  # fmt: skip


def check_autocast(cell: str, dtype: torch.dtype) -> None:
    """Assert that each code path matches float32 up to rounding, and has a finite gradient."""
    torch.manual_seed(1)
    x = torch.randn(3, 5, 8)
    exact, leaf = outputs(cell, x), x.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        found = outputs(cell, leaf)
    for name, out in found.items():
        # As in torch, an LSTM and a linear layer return the reduced dtype; a GRU and packed sequences return float32.
        reduced = name == "decoder" or (cell == "lstm" and "packed" not in name)
        assert out.dtype == (dtype if reduced else torch.float32), name
        # Two layers of five steps, each with one rounding of its matrix products.
        assert (out.float() - exact[name]).abs().max() <= 2 * 5 * torch.finfo(dtype).eps, name
    (gradient,) = torch.autograd.grad(sum(out.float().sum() for out in found.values()), leaf)  # type: ignore[arg-type]
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
