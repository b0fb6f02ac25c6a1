"""The benchmarks: all cases and rows are correct, and a wrong result has no ratio."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from regard.attention import attention
from regard.backends.choose import record_backends
from regard.backends.cpu import extension
from regard.backends.machine import HAS_MATRIX_UNITS
from regard.bench import cpu, table
from regard.bench import steps as bench_steps
from regard.bench import watch as bench_watch
from regard.bench.cases import Case, cases
from regard.bench.error import Error, error
from regard.bench.goal import Goal, RowResult, Shape
from regard.bench.length import MemoryRow, memory
from regard.bench.measure import time_interleaved
from regard.bench.peak import LIMITS, Peak
from regard.bench.row import CpuRow, use_instructions
from regard.bench.run import CaseResult, _error, _evaluate, run
from regard.cli import main

# Cases that can be cut to a few positions. Those with masks cannot; `make bench` measures them in full.
SMALL = [case for case in cases() if case.name in ("plain", "causal", "softcap", "additive (Bahdanau)", "entmax 1.5")]


def shrink(case: Case) -> Case:
    def inputs() -> list[torch.Tensor]:
        return [x[..., :48, :] if x.dim() == 4 else x for x in case.inputs()]

    return dataclasses.replace(case, inputs=inputs)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases_agree_with_their_peers(case: Case) -> None:
    for result in run([shrink(case)], rounds=1, seconds=0.0):
        assert result.within_budget, result
        assert result.ratio is not None


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_full_size_cases_agree_with_their_peers(case: Case) -> None:
    torch.manual_seed(1)
    inputs = [x[:1] if x.dim() == 4 and "padded" not in case.name else x for x in case.inputs()]
    reference = _evaluate(case.peer, [x.double() for x in inputs], False)
    assert _error(_evaluate(case.ours, inputs, False), reference) <= 64 * torch.finfo(torch.float32).eps


def test_dropout_is_active_only_while_timed() -> None:
    """Dropout differs between calls, so the outputs could not be compared with it."""
    layer = torch.nn.Dropout(0.5)
    modes: list[bool] = []

    def both(x: torch.Tensor) -> list[torch.Tensor]:
        modes.append(layer.training)
        return [layer(attention(x, x, x))]

    case = Case("drops", "5x3", "itself", lambda: [torch.randn(5, 3)], both, both, model=layer)
    assert all(result.within_budget for result in run([case], rounds=1, seconds=0.0))
    assert [is_training for is_training, _ in groupby(modes)] == [False, True] * 2


def test_steps_agree_between_both_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("_SENTENCES", 5), ("_LONGEST", 11), ("_PIECES", 97)):
        monkeypatch.setattr(bench_steps, name, number)
    for case in bench_steps.steps():
        case.model.eval()
        inputs = case.inputs()
        with record_backends() as shared:
            theirs = _evaluate(case.peer, inputs, True)
        reference = _evaluate(case.peer, [x.double() for x in inputs], True)
        with record_backends() as backends:
            ours = _evaluate(case.ours, inputs, True)
        assert set(backends) == {"tiled" if extension.missing else "cpu"}
        assert len(backends) > len(shared)
        # More than the budget of a ratio: where terms nearly cancel, the gradient of the query projection has 4 times the
        # error.
        assert _error(ours, reference) <= 8 * _error(theirs, reference)


def test_watch_benchmark_measures_decode_steps() -> None:
    pytest.importorskip("transformers")
    cases = [bench_watch.StepCase(model, 40) for model in ("layer", "llama")]
    for case, result in zip(cases, bench_watch.measure_steps(cases, torch.get_num_threads(), 3, 4), strict=True):
        assert result.case == case
        assert min(result.unwatched_us, result.watched_us, result.ratio) > 0


@pytest.mark.parametrize("memory", [None, pytest.param("measured", marks=pytest.mark.slow)])
def test_watch_benchmark_measures_time_and_memory(memory: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is measured in this process, memory in three others, which takes half a minute."""
    case = bench_watch.WatchCase("llama", 40, 9.0)
    if memory is None:
        monkeypatch.setattr(bench_watch, "_memory", lambda *_: 1)
    (result,) = bench_watch.measure([case], torch.get_num_threads(), rounds=1)
    assert result.error < 1e-5
    assert result.weights_error is not None
    assert result.weights_error < 1e-6
    assert result.eager_ms is not None
    assert min(result.eager_ms, result.watched_ms, result.unwatched_ms, result.ratio) > 0
    assert (result.watched_memory is None) == (memory is not None and sys.platform != "linux")
    monkeypatch.setattr(bench_watch, "_MAX_WEIGHTS", 0)
    monkeypatch.setattr(bench_watch, "_memory", lambda *_: None)
    (result,) = bench_watch.measure([case], torch.get_num_threads(), rounds=1)
    assert result.eager_ms is None, "the weights are too large to materialize"


def test_wrong_result_has_no_ratio() -> None:
    correct = next(case for case in cases() if case.name == "plain")
    wrong = dataclasses.replace(shrink(correct), ours=lambda q, k, v: [1.001 * x for x in correct.ours(q, k, v)])
    for result in run([wrong], rounds=1, seconds=0.0):
        assert not result.within_budget
        assert result.ratio is None


def test_ratio_of_case() -> None:
    result = CaseResult("a", "s", "p", "tiled", "forward", ours_ms=2.0, peer_ms=6.0, ours_error=1e-7, peer_error=1e-7)
    assert result.ratio == 3.0


# ---------------------------------------------------------------------------------------------------------------------
# The rows of the native kernels.

ROWS = [row for row in cpu.rows() if isinstance(row, CpuRow)]
CALL = "call at L = 16 forward causal"


@pytest.fixture(scope="module")
def peaks() -> dict[str, Peak]:
    return {limit: Peak(limit, seconds=1e-3) for limit in LIMITS}


def tiny(row: CpuRow) -> CpuRow:
    """Return the row with one small shape, which is longer than the window."""
    s = row.shapes[0]
    small = dataclasses.replace(s, B=min(s.B, 3), H=min(s.H, 8), G=min(s.G, 2), L=min(s.L, 280), S=min(s.S, 300), D=16)
    return dataclasses.replace(row, shapes=[dataclasses.replace(small, E=min(s.E, 24))], copies=min(row.copies, 2))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_are_correct_and_measured(row: CpuRow, peaks: dict[str, Peak]) -> None:
    (result,) = tiny(row).results(peaks, 0.0, 1)
    assert result.error.within, result
    assert result.error.share > 0
    assert result.metrics is not None and result.ours_ms and result.other_ms
    assert result.metrics["ratio"] == pytest.approx(result.other_ms / result.ours_ms)
    assert result.instructions == (row.instructions or extension.instructions()[0])
    measurable = {goal.metric for goal in row.goals} - ({"share"} if row.limit == "bf16" else set())
    assert measurable <= set(result.metrics)
    assert row.name in str(table.as_markdown([result], peaks))
    json.dumps(table.as_dict([result], peaks))


# Rows whose baseline computes the same function: without those compared with attention without a mask or summary, or with
# the dot product, and those with dropout.
SAME = [r for r in ROWS if not r.against.startswith("our") and "dot" not in r.name and "dropout" not in r.name]


@pytest.mark.parametrize("row", SAME, ids=lambda row: row.name)
def test_rows_agree_with_their_baselines(row: CpuRow) -> None:
    implementations = tiny(row).make(tiny(row).shapes[0])
    torch.manual_seed(1)
    inputs = [x.float() for x in implementations.inputs()]
    (reference,) = implementations.ours(*[x.double() for x in inputs], backend="reference")
    (other,) = implementations.other(*inputs)
    assert _error([other], [reference]) <= 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("build", "name"), [(cpu._window, "window"), (cpu._padded, "padded"), (cpu._documents, "documents")]
)
def test_pairs_count_allowed_pairs(build: Any, name: str) -> None:
    shape = Shape(3, 2, 320, 4)
    _, dense, pairs = build(shape)
    assert pairs == int(dense().expand(shape.B, shape.H, shape.L, shape.L).sum())


def test_pairs_of_causal_row() -> None:
    assert cpu._dot(causal=True)(Shape(2, 3, 7, 4)).pairs == 2 * 3 * 28


def test_wrong_kernel_has_no_ratio_and_fails(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """A native kernel with a wrong scale."""
    forward = extension.ops.forward.default

    def wrong(q: torch.Tensor, *arguments: Any) -> Any:
        return forward(1.01 * q, *arguments)

    file = tmp_path / "bench.json"
    command = [
        "bench",
        "cpu",
        "--rows",
        CALL,
        "--seconds",
        "0",
        "--threads",
        str(torch.get_num_threads()),
        "--json",
        str(file),
    ]
    with pytest.raises(SystemExit) as done:
        main(command)
    assert done.value.code == 0
    assert "wrong" not in capsys.readouterr().out
    monkeypatch.setattr(extension.ops.forward, "default", wrong)
    with pytest.raises(SystemExit) as done:
        main(command)
    assert done.value.code == 1
    printed = capsys.readouterr().out
    assert "wrong, over budget" in printed
    (result,) = json.loads(file.read_text())["results"]
    assert (result["within_budget"], result["met"], result["figures"], result["ours_ms"]) == (False, False, None, None)
    with pytest.raises(SystemExit):
        main([*command, "--markdown"])
    assert "none: wrong at 1x8x16x64" in capsys.readouterr().out


def test_error_detects_nan_and_wrong_gradients() -> None:
    def inputs() -> list[torch.Tensor]:
        return [torch.randn(300)]

    def nan(x: torch.Tensor, backend: str | None) -> list[torch.Tensor]:
        return [RecordedIdentity.run(x, backend) + (0.0 if backend else torch.nan)]

    def gradient(x: torch.Tensor, backend: str | None) -> list[torch.Tensor]:
        y = RecordedIdentity.run(x, backend)
        return [y if backend else y.detach() + 1.001 * (x - x.detach())]

    assert not error(nan, inputs, False).within
    assert error(gradient, inputs, False).within
    assert not error(gradient, inputs, True).within
    assert error(RecordedIdentity.outputs, inputs, True).within


class RecordedIdentity:
    """The identity, recorded as a call of a backend."""

    @staticmethod
    def run(x: torch.Tensor, backend: str | None) -> torch.Tensor:
        from regard.backends import choose

        ran = choose._ran.get()
        if ran is not None:
            ran.append(backend or "cpu")
        return 1.0 * x

    @staticmethod
    def outputs(x: torch.Tensor, backend: str | None) -> Sequence[torch.Tensor]:
        return [RecordedIdentity.run(x, backend)]


def test_result_meets_goals() -> None:
    def reached(**metrics: float) -> RowResult:
        goals = [Goal("ratio", 2.0), Goal("share", 0.8, "L >= 1024", lambda s: s.L >= 1024), Goal("extra", 0.03)]
        return RowResult("a", "b", shape, "cpu", "avx2", Error(0.0, 0.0, "cpu"), goals, 1.0, 2.0, metrics)

    shape = Shape(1, 1, 1024, 8)
    assert reached(ratio=2.0, share=0.8, extra=0.03).met
    assert not reached(ratio=1.9, share=0.8, extra=0.03).met
    assert not reached(ratio=2.0, share=0.7, extra=0.03).met
    assert not reached(ratio=2.0, share=0.8, extra=0.04).met
    assert reached(ratio=2.0, share=0.7).meets("share") is False
    shape = Shape(1, 1, 512, 8)
    assert reached(ratio=2.0, share=0.7, extra=-0.1).met
    assert reached(ratio=2.0, share=0.7).meets("share") is None


def test_time_interleaved_alternates() -> None:
    order = []
    times = time_interleaved(
        [lambda: order.append("a"), lambda: (order.append("b"), time.sleep(0.002))], rounds=(3, 3), burst=0.0
    )
    assert "".join(order) == "aabb" + "ab" * 3
    assert [len(x) for x in times] == [3, 3]
    assert all(x >= 0.002 for x in times[1])


@pytest.mark.parametrize("instructions", extension.instructions())
def test_peaks_are_plausible(instructions: str) -> None:
    with use_instructions(instructions):
        assert extension.instructions()[0] == instructions
        peaks = {limit: Peak(limit, seconds=1e-3) for limit in LIMITS}
        assert peaks["bf16"].is_available == (instructions == "avx512_bf16")
    # A core of any machine that torch runs on exceeds 1 GFLOP/s and 1 GB/s.
    assert peaks["fp32"].best > 1 and peaks["read"].best > 1
    # VDPBF16PS has twice the peak of float32 multiply-adds on Zen 4, and half of it on Intel CPUs with matrix units, which
    # torch uses there.
    assert not peaks["bf16"].is_available or peaks["bf16"].best > peaks["fp32"].best / (4 if HAS_MATRIX_UNITS else 1)
    with pytest.raises(RuntimeError, match="kind must be"):
        extension.ops.peak(torch.ones(0), 3, 1)


def test_memory_is_linear_in_length() -> None:
    baseline = extension.instructions()[-1]
    # Materializing takes at least one float per pair, or 16 (the width) with an additive score.
    assert memory("dot", 3072, 16, 1, baseline, "reference").beyond > 4 * 3072**2
    for score, length, floats in (("dot", 3072, 1), ("additive", 1024, 16)):
        usage = memory(score, length, 16, 1, baseline)
        assert usage.backend != "reference" and 0 <= usage.beyond < 4 * length**2 * floats


def test_memory_rows_meet_goals_on_short_inputs(peaks: dict[str, Peak]) -> None:
    for row in cpu.rows():
        if isinstance(row, MemoryRow):
            short = dataclasses.replace(row, shape=Shape(1, 1, 256, 16))
            (result,) = short.results(peaks, 0.0, 1)
            assert result.met and result.metrics is not None and set(result.metrics) == {"memory"}


def test_select_rows_by_name() -> None:
    assert [row.name for row in cpu.select_rows(CALL.upper())] == [CALL]
    assert {row.name.split()[0] for row in cpu.select_rows("decode, received")} == {"decode", "received"}
    assert not any("," in row.name for row in cpu.rows())  # the comma separates names
    assert not any(isinstance(row, MemoryRow) for row in cpu.select_rows(None))
    assert all(isinstance(row, MemoryRow) for row in cpu.select_rows("length"))
    with pytest.raises(ValueError, match="no row name contains 'nothing'; the rows are: forward fp32;"):
        cpu.select_rows("nothing")
