"""The benchmark of the GPU, on the CPU: what it measures is right, and what is wrong gets no time."""

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
LIMITS = {"products": 100.0, "tanh": 50.0}


def small(row: gpu.Row) -> gpu.Row:
    return replace(row, shape=Shape(1, 2, 37, 16), dtype=torch.float32)


def once(function: Callable[[], object]) -> float:
    function()
    return 2.0


@pytest.mark.parametrize("row", gpu.rows(), ids=lambda row: f"{row.label}, {row.figure}")
def test_ours_and_theirs_do_the_same(row: gpu.Row) -> None:
    if row.figure == "extra":
        pytest.skip("ours tells more than theirs")
    row = small(row)
    torch.manual_seed(0)
    inputs = row.inputs(row, row.shape, CPU)
    (ours,), (other,) = (list(way(row.shape, CPU)(*inputs)) for way in (row.ours, row.other))
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_every_row_is_judged_and_timed() -> None:
    # FlexAttention has no backward pass on the CPU.
    rows = [small(r) for r in gpu.rows() if r.shape.D == 64 and not (r.backward and r.against == "FlexAttention")]
    results = list(gpu.measure(rows, CPU, LIMITS, once))
    assert [result.row for result in results] == rows
    for result in results:
        assert result.error.within and result.ours_ms == result.other_ms == 2.0
        assert result.figure == {"ratio": 1.0, "extra": 0.0}.get(result.row.figure, result.figure)
    table = gpu.as_markdown(results, LIMITS, "a GPU")
    assert table.startswith("a GPU, PyTorch") and table.count("\n| ") == len(rows) + 1
    console = Console(width=200, record=True)
    console.print(gpu.as_table(results, LIMITS, "a GPU"))
    assert all(row.label in console.export_text(clear=False) for row in rows)


def test_what_is_wrong_is_not_timed() -> None:
    def wrong(shape: Shape, device: torch.device) -> gpu.Way:
        def run(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> list[Tensor]:
            (out,) = row.ours(shape, device)(q, k, v, backend=backend)
            return [out if backend else out * 1.01]

        return run

    row = small(gpu.rows()[0])
    (result,) = gpu.measure([replace(row, ours=wrong)], CPU, LIMITS, lambda function: pytest.fail("it was timed"))
    assert not result.error.within and not result.met and result.written == "none: wrong"


def test_ceilings() -> None:
    found = gpu.ceilings(CPU, once, 64)
    assert list(found) == list(gpu.LIMITS) and all(x > 0 for x in found.values())


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run("bench", "gpu", expect=2)
    assert "there is no GPU that PyTorch sees" in done.stderr
