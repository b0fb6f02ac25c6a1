"""Recurrent layers under autocast, on machines with and without primitives of reduced precision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.autocast import KINDS, LENGTHS, check_autocast
from support.paths import TESTS

from regard.nn import precision
from regard.nn.recurrent import RecurrentDecoder, RecurrentEncoder

# A CPU with AVX2 and no more, to oneDNN, to ATen and to our own kernels.
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "REGARD_INSTRUCTIONS": "avx2"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", KINDS)
def test_autocast_of_recurrent_layers_is_accurate(cell: str, dtype: torch.dtype) -> None:
    check_autocast(cell, dtype)


@pytest.mark.parametrize("cell", KINDS)
def test_missing_primitive_computes_in_float32(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_primitive", lambda kind, dtype: False)
    x, encoder = torch.randn(3, 5, 8).bfloat16().float(), RecurrentEncoder(8, 7, cell=cell)  # type: ignore[arg-type]
    decoder = RecurrentDecoder(8, 6, 14, cell=cell, order="luong")  # type: ignore[arg-type]
    read, (memory, state) = encoder.read(x, LENGTHS), encoder(x)
    hidden = decoder.cell(x, decoder.initial(memory).to_torch())[0]
    with torch.autocast("cpu", torch.bfloat16):
        # Whatever was computed before may have made x one of bfloat16.
        for given in (x, x.bfloat16()):
            assert torch.equal(encoder.read(given, LENGTHS), read.bfloat16())
            got, got_state = encoder(given)
            assert torch.equal(got, memory.bfloat16())
            assert torch.equal(got_state.hidden, state.hidden.bfloat16())
        got = precision.run_recurrent(decoder.cell, decoder.cell, x, decoder.initial(memory).to_torch())[0]
    assert (got.float() - hidden).abs().max() <= 2**-7


def test_non_float32_layers_use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_primitive", lambda kind, dtype: pytest.fail("it was asked for"))
    x, encoder = torch.randn(3, 5, 8), RecurrentEncoder(8, 7, cell="lstm")
    assert encoder(x)[0].dtype == torch.float32
    assert encoder.double()(x.double())[0].dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder.double()(x.double())[0].dtype == torch.float64


def test_old_cpu_computes_in_float32_and_warns_once() -> None:
    """Run the same checks in a process that emulates a CPU without AVX-512."""
    code = """
import warnings, torch
from support.autocast import KINDS, check_autocast
from regard.nn import precision
assert not precision.has_primitive("LSTM", torch.bfloat16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    precision.has_primitive.cache_clear()
    for cell in KINDS:
        for _ in range(2):
            check_autocast(cell, torch.bfloat16)
print(*[str(w.message) for w in caught if "compute in float32" in str(w.message)], sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **AVX2},
        cwd=TESTS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (message,) = done.stdout.splitlines()
    assert message.startswith(
        "LSTM layers compute in float32: this CPU cannot run them in torch.bfloat16 (could not create"
    )


def test_bfloat16_training_on_old_cpu(tmp_path: Path) -> None:
    data = tmp_path / "reviews.tsv"
    data.write_text("".join(f"a {word} film\t{word}\n" for word in ("good", "bad") * 20))
    done = subprocess.run(
        [sys.executable, "-m", "regard.cli", "train", "classify", data, "--bf16", "--epochs", "1", "--out", tmp_path / "out"],
        capture_output=True, text=True, env={**os.environ, **AVX2},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("LSTM layers compute in float32") == 1
