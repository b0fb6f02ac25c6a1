"""The GPU benchmark, run on the CPU: implementations agree, and wrong results are not timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from support.command_line import run
from torch import Tensor

from regard.bench import gpu
from regard.bench.goal import Shape

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CPU = torch.device("cpu")
PEAKS = {"matmul": 100.0, "tanh": 50.0}


def shrink(row: gpu.GpuRow) -> gpu.GpuRow:
    return replace(row, shape=Shape(1, 2, 37, 16), dtype=torch.float32)


def call_once(function: Callable[[], object]) -> float:
    function()
    return 2.0


@pytest.mark.parametrize("row", gpu.rows(), ids=lambda row: f"{row.label}, {row.metric}")
def test_implementations_agree(row: gpu.GpuRow) -> None:
    if row.metric == "extra":
        pytest.skip("only ours returns summaries")
    row = shrink(row)
    torch.manual_seed(0)
    inputs = row.inputs(row, row.shape, CPU)
    (ours,), (other,) = (list(make(row.shape, CPU)(*inputs)) for make in (row.ours, row.other))
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_measure_checks_and_times_all_rows() -> None:
    # FlexAttention has no backward pass on the CPU.
    rows = [shrink(r) for r in gpu.rows() if r.shape.D == 64 and not (r.backward and r.against == "FlexAttention")]
    results = list(gpu.measure(rows, CPU, PEAKS, call_once))
    assert [result.row for result in results] == rows
    for result in results:
        assert result.error.within and result.ours_ms == result.other_ms == 2.0
        assert result.value == {"ratio": 1.0, "extra": 0.0}.get(result.row.metric, result.value)
    table = gpu.as_markdown(results, PEAKS, "a GPU")
    assert table.startswith("a GPU, PyTorch") and table.count("\n| ") == len(rows) + 1
    console = Console(width=200, record=True)
    console.print(gpu.as_table(results, PEAKS, "a GPU"))
    assert all(row.label in console.export_text(clear=False) for row in rows)


def test_measure_does_not_time_wrong_results() -> None:
    def wrong(shape: Shape, device: torch.device) -> gpu.Implementation:
        def run(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> list[Tensor]:
            (out,) = row.ours(shape, device)(q, k, v, backend=backend)
            return [out if backend else out * 1.01]

        return run

    row = shrink(gpu.rows()[0])
    (result,) = gpu.measure([replace(row, ours=wrong)], CPU, PEAKS, lambda function: pytest.fail("it was timed"))
    assert not result.error.within and not result.met and result.formatted == "none: wrong"


def test_measure_peaks_is_positive() -> None:
    peaks = gpu.measure_peaks(CPU, call_once, 64)
    assert list(peaks) == list(gpu.PEAK_UNITS) and all(x > 0 for x in peaks.values())


def test_command_fails_without_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("bench", "gpu", expect=2)
    assert "PyTorch finds no GPU" in done.stderr
