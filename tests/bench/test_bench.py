"""The benchmark: every case is right, and a wrong result gets no ratio."""

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
from regard.backends.choose import _MATRIX_UNITS as MATRIX_UNITS
from regard.backends.choose import record_backends
from regard.backends.cpu import extension
from regard.bench import cpu, table
from regard.bench import steps as bench_steps
from regard.bench import watch as bench_watch
from regard.bench.cases import Case, cases
from regard.bench.error import Error, error
from regard.bench.goal import Goal, Shape
from regard.bench.goal import Result as Reached
from regard.bench.length import Length, memory
from regard.bench.measure import race
from regard.bench.peak import LIMITS, Peak
from regard.bench.row import Row, forced
from regard.bench.run import Result, _error, _outcome, run
from regard.cli import main

# The same cases at a size that takes no time: their inputs cut to a few positions would no longer fit their masks, so the
# ones with masks are measured whole, once, by `make bench`.
SMALL = [case for case in cases() if case.name in ("plain", "causal", "softcap", "additive (Bahdanau)", "entmax 1.5")]


def smaller(case: Case) -> Case:
    def inputs() -> list[torch.Tensor]:
        return [x[..., :48, :] if x.dim() == 4 else x for x in case.inputs()]

    return dataclasses.replace(case, inputs=inputs)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases_agree_with_their_peers(case: Case) -> None:
    for result in run([smaller(case)], rounds=1, seconds=0.0):
        assert result.within_budget, result
        assert result.ratio is not None


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_whole_cases_agree_with_their_peers(case: Case) -> None:
    torch.manual_seed(1)
    inputs = [x[:1] if x.dim() == 4 and "padded" not in case.name else x for x in case.inputs()]
    truth = _outcome(case.peer, [x.double() for x in inputs], False)
    assert _error(_outcome(case.ours, inputs, False), truth) <= 64 * torch.finfo(torch.float32).eps


def test_a_model_drops_numbers_while_it_is_timed_alone() -> None:
    """Dropout differs from call to call; so errors would be none of rounding."""
    layer = torch.nn.Dropout(0.5)
    dropped: list[bool] = []

    def both(x: torch.Tensor) -> list[torch.Tensor]:
        dropped.append(layer.training)
        return [layer(attention(x, x, x))]

    case = Case("drops", "5x3", "itself", lambda: [torch.randn(5, 3)], both, both, model=layer)
    assert all(result.within_budget for result in run([case], rounds=1, seconds=0.0))
    assert [dropping for dropping, _ in groupby(dropped)] == [False, True] * 2


def test_steps_are_the_same_on_both_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("_SENTENCES", 5), ("_LONGEST", 11), ("_PIECES", 97)):
        monkeypatch.setattr(bench_steps, name, number)
    for case in bench_steps.steps():
        case.model.eval()
        inputs = case.inputs()
        with record_backends() as shared:
            theirs = _outcome(case.peer, inputs, True)
        truth = _outcome(case.peer, [x.double() for x in inputs], True)
        with record_backends() as kernels:
            ours = _outcome(case.ours, inputs, True)
        assert set(kernels) == {"tiled" if extension.missing else "cpu"}
        assert len(kernels) > len(shared)
        # Beyond the budget of a ratio: where slopes all but cancel, the gradient of the queries' map errs 4 times as much.
        assert _error(ours, truth) <= 8 * _error(theirs, truth)


def test_watching_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In time here, and in memory in a process of its own, which grows with the text."""
    with_memory = bench_watch.Length("llama", 40, 9.0)
    (result,) = bench_watch.measure([with_memory], torch.get_num_threads(), rounds=1)
    assert result.error < 1e-5
    assert result.weights_error is not None
    assert result.weights_error < 1e-6
    assert result.eager_ms is not None
    assert min(result.eager_ms, result.watched_ms, result.unwatched_ms, result.ratio) > 0
    assert (result.watched_memory is None) == (sys.platform != "linux")
    monkeypatch.setattr(bench_watch, "_MOST_WEIGHTS", 0)
    monkeypatch.setattr(bench_watch, "_memory", lambda *_: None)
    (result,) = bench_watch.measure([with_memory], torch.get_num_threads(), rounds=1)
    assert result.eager_ms is None, "too large to ask for"


def test_a_wrong_result_gets_no_ratio() -> None:
    right = next(case for case in cases() if case.name == "plain")
    wrong = dataclasses.replace(smaller(right), ours=lambda q, k, v: [1.001 * x for x in right.ours(q, k, v)])
    for result in run([wrong], rounds=1, seconds=0.0):
        assert not result.within_budget
        assert result.ratio is None


def test_ratio() -> None:
    result = Result("a", "s", "p", "tiled", "forward", ours_ms=2.0, peer_ms=6.0, ours_error=1e-7, peer_error=1e-7)
    assert result.ratio == 3.0


# ---------------------------------------------------------------------------------------------------------------------
# The table of the native kernels.

ROWS = [row for row in cpu.rows() if isinstance(row, Row)]
CALL = "call at L = 16 forward causal"


@pytest.fixture(scope="module")
def peaks() -> dict[str, Peak]:
    return {limit: Peak(limit, seconds=1e-3) for limit in LIMITS}


def tiny(row: Row) -> Row:
    """The same row, of one shape that takes no time; longer than the window."""
    s = row.shapes[0]
    small = dataclasses.replace(s, B=min(s.B, 3), H=min(s.H, 8), G=min(s.G, 2), L=min(s.L, 280), S=min(s.S, 300), D=16)
    return dataclasses.replace(row, shapes=[dataclasses.replace(small, E=min(s.E, 24))], copies=min(row.copies, 2))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_are_right_and_measured(row: Row, peaks: dict[str, Peak]) -> None:
    (result,) = tiny(row).results(peaks, 0.0, 1)
    assert result.error.within, result
    assert result.error.share > 0
    assert result.figures is not None and result.ours_ms and result.other_ms
    assert result.figures["ratio"] == pytest.approx(result.other_ms / result.ours_ms)
    assert result.instructions == (row.instructions or extension.instructions()[0])
    measurable = {goal.figure for goal in row.goals} - ({"share"} if row.limit == "bf16" else set())
    assert measurable <= set(result.figures)
    assert row.name in str(table.as_markdown([result], peaks))
    json.dumps(table.as_dict([result], peaks))


# What is raced against the same problem: not against that without a mask or a summary, without tanh, or with other weights
# dropped.
SAME = [r for r in ROWS if not r.against.startswith("our") and "dot" not in r.name and "dropout" not in r.name]


@pytest.mark.parametrize("row", SAME, ids=lambda row: row.name)
def test_rows_race_against_the_same_problem(row: Row) -> None:
    contest = tiny(row).make(tiny(row).shapes[0])
    torch.manual_seed(1)
    inputs = [x.float() for x in contest.inputs()]
    (truth,) = contest.ours(*[x.double() for x in inputs], backend="reference")
    (other,) = contest.other(*inputs)
    assert _error([other], [truth]) <= 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("build", "name"), [(cpu._window, "window"), (cpu._padded, "padded"), (cpu._documents, "documents")]
)
def test_pairs_are_those_that_may_attend(build: Any, name: str) -> None:
    shape = Shape(3, 2, 320, 4)
    _, dense, pairs = build(shape)
    assert pairs == int(dense().expand(shape.B, shape.H, shape.L, shape.L).sum())


def test_causal_pairs() -> None:
    assert cpu._dot(causal=True)(Shape(2, 3, 7, 4)).pairs == 2 * 3 * 28


def test_a_wrong_kernel_gets_no_ratio_and_fails(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """A native kernel whose weights are off by a thousandth, as a bug of its scale would make them."""
    forward = extension.ops.forward_told.default

    def wrong(q: torch.Tensor, *words: Any) -> Any:
        return forward(1.01 * q, *words)

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
    monkeypatch.setattr(extension.ops.forward_told, "default", wrong)
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


def test_errors_of_nan_and_of_gradients_are_seen() -> None:
    def inputs() -> list[torch.Tensor]:
        return [torch.randn(300)]

    def nan(x: torch.Tensor, kernel: str | None) -> list[torch.Tensor]:
        return [Counted.run(x, kernel) + (0.0 if kernel else torch.nan)]

    def gradient(x: torch.Tensor, kernel: str | None) -> list[torch.Tensor]:
        y = Counted.run(x, kernel)
        return [y if kernel else y.detach() + 1.001 * (x - x.detach())]

    assert not error(nan, inputs, False).within
    assert error(gradient, inputs, False).within
    assert not error(gradient, inputs, True).within
    assert error(Counted.outputs, inputs, True).within


class Counted:
    """The identity, by something that says that it ran."""

    @staticmethod
    def run(x: torch.Tensor, kernel: str | None) -> torch.Tensor:
        from regard.backends import choose

        ran = choose._ran.get()
        if ran is not None:
            ran.append(kernel or "cpu")
        return 1.0 * x

    @staticmethod
    def outputs(x: torch.Tensor, kernel: str | None) -> Sequence[torch.Tensor]:
        return [Counted.run(x, kernel)]


def test_goals() -> None:
    def reached(**figures: float) -> Reached:
        goals = [Goal("ratio", 2.0), Goal("share", 0.8, "L >= 1024", lambda s: s.L >= 1024), Goal("extra", 0.03)]
        return Reached("a", "b", shape, "cpu", "avx2", Error(0.0, 0.0, "cpu"), goals, 1.0, 2.0, figures)

    shape = Shape(1, 1, 1024, 8)
    assert reached(ratio=2.0, share=0.8, extra=0.03).met
    assert not reached(ratio=1.9, share=0.8, extra=0.03).met
    assert not reached(ratio=2.0, share=0.7, extra=0.03).met
    assert not reached(ratio=2.0, share=0.8, extra=0.04).met
    assert reached(ratio=2.0, share=0.7).meets("share") is False
    shape = Shape(1, 1, 512, 8)
    assert reached(ratio=2.0, share=0.7, extra=-0.1).met
    assert reached(ratio=2.0, share=0.7).meets("share") is None


def test_race_takes_turns() -> None:
    order = []
    times = race([lambda: order.append("a"), lambda: (order.append("b"), time.sleep(0.002))], rounds=(3, 3), burst=0.0)
    assert "".join(order) == "aabb" + "ab" * 3
    assert [len(x) for x in times] == [3, 3]
    assert all(x >= 0.002 for x in times[1])


@pytest.mark.parametrize("instructions", extension.instructions())
def test_peaks(instructions: str) -> None:
    with forced(instructions):
        assert extension.instructions()[0] == instructions
        found = {limit: Peak(limit, seconds=1e-3) for limit in LIMITS}
        assert found["bf16"].exists == (instructions == "avx512_bf16")
    # A single core of any machine that torch runs on does a thousand million, and reads as many bytes.
    assert found["fp32"].best > 1 and found["read"].best > 1
    # Beside multiply-adds of floats, those of pairs do twice as much on a Zen 4, and half as much on Intel's machines with
    # matrix units, which torch computes on there.
    assert not found["bf16"].exists or found["bf16"].best > found["fp32"].best / (4 if MATRIX_UNITS else 1)
    with pytest.raises(RuntimeError, match="limit must be"):
        extension.ops.peak(torch.ones(0), 3, 1)


def test_memory_of_a_length() -> None:
    baseline = extension.instructions()[-1]
    # What is materialised is seen, and what is not: one number a pair, or 16 where the score is additive.
    assert memory("dot", 3072, 16, 1, baseline, "reference").beyond > 4 * 3072**2
    for what, length, numbers in (("dot", 3072, 1), ("additive", 1024, 16)):
        found = memory(what, length, 16, 1, baseline)
        assert found.kernel != "reference" and 0 <= found.beyond < 4 * length**2 * numbers


def test_rows_of_lengths(peaks: dict[str, Peak]) -> None:
    for row in cpu.rows():
        if isinstance(row, Length):
            short = dataclasses.replace(row, shape=Shape(1, 1, 256, 16))
            (result,) = short.results(peaks, 0.0, 1)
            assert result.met and result.figures is not None and set(result.figures) == {"memory"}


def test_rows_are_picked_by_name() -> None:
    assert [row.name for row in cpu.chosen(CALL.upper())] == [CALL]
    assert {row.name.split()[0] for row in cpu.chosen("decode, received")} == {"decode", "received"}
    assert not any("," in row.name for row in cpu.rows())  # it would be two words
    assert not any(isinstance(row, Length) for row in cpu.chosen(None))
    assert all(isinstance(row, Length) for row in cpu.chosen("length"))
    with pytest.raises(ValueError, match="no row has 'nothing' in its name; there are: forward fp32;"):
        cpu.chosen("nothing")
