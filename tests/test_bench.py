"""The benchmark: every case is right, and a wrong result gets no ratio."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from regard.bench.cases import Case, cases
from regard.bench.run import Result, _error, _outcome, run

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


def test_a_wrong_result_gets_no_ratio() -> None:
    right = next(case for case in cases() if case.name == "plain")
    wrong = dataclasses.replace(smaller(right), ours=lambda q, k, v: [1.001 * x for x in right.ours(q, k, v)])
    for result in run([wrong], rounds=1, seconds=0.0):
        assert not result.within_budget
        assert result.ratio is None


def test_ratio() -> None:
    result = Result("a", "s", "p", "tiled", "forward", ours_ms=2.0, peer_ms=6.0, ours_error=1e-7, peer_error=1e-7)
    assert result.ratio == 3.0
