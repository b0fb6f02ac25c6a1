"""Several processes compute the same gradient as one, and failures are reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.tasks import translate
from regard.tasks.data import Pair
from regard.tasks.lines import Location
from regard.tasks.train import Step, Training, train
from regard.tasks.workers import Workers

_WORDS = ["ab", "abc", "bca", "cab", "dab", "bad", "cad", "a", "d", "abcd", "dcba"]
_PAIRS = [Pair(word, " ".join(word.upper()), Location(Path("made"), 1)) for word in _WORDS]
_SETTINGS = translate.TranslateSettings("recurrent", "symbols", width=16, hidden=16, layers=1, dropout=0.0)


def _gradients(count: int, batch: list[int], **changed: Any) -> tuple[float, list[Tensor]]:
    task = translate.Translate.begin(replace(_SETTINGS, **changed), _PAIRS)
    workers = Workers(task, task.encode(_PAIRS), count, bf16=False)
    task.model.train()
    try:
        with workers.epoch(3):
            loss = workers.differentiate(batch)
    finally:
        workers.close()
    return loss, [p.grad.clone() for p in workers.parameters if p.grad is not None]


@pytest.mark.parametrize("batch", [list(range(11)), [4]], ids=["more than workers", "fewer"])
def test_gradient_matches_single_process(batch: list[int]) -> None:
    loss, gradients = _gradients(1, batch)
    shared_loss, shared = _gradients(3, batch)
    assert abs(loss - shared_loss) <= 1e-6 * loss
    assert len(gradients) == len(shared)
    # The order of summation differs; small elements are differences of large terms.
    largest = max(float(one.abs().max()) for one in gradients)
    for one, other in zip(gradients, shared, strict=True):
        assert (one - other).abs().max() <= 16 * torch.finfo(torch.float32).eps * largest


def test_dropout_depends_only_on_seed() -> None:
    first, second = (_gradients(2, list(range(11)), dropout=0.5) for _ in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1], strict=True))


def test_interrupted_run_resumes_to_same_model(tmp_path: Path) -> None:
    training = Training(epochs=2, batch=16, rate=0.01, warmup=2, workers=2)
    settings = replace(_SETTINGS, dropout=0.2)

    def stop(event: Any) -> None:
        if isinstance(event, Step) and (event.epoch, event.done) == (2, 2):
            raise KeyboardInterrupt

    _, uninterrupted = train(translate.Translate, settings, training, _PAIRS, _PAIRS, tmp_path / "uninterrupted")
    with pytest.raises(KeyboardInterrupt):
        train(translate.Translate, settings, training, _PAIRS, _PAIRS, tmp_path / "interrupted", tell=stop)
    _, resumed = train(translate.Translate, settings, training, _PAIRS, _PAIRS, tmp_path / "interrupted")
    assert [epoch.loss for epoch in resumed.epochs] == [epoch.loss for epoch in uninterrupted.epochs]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("uninterrupted", "interrupted")]
    assert weights[0] == weights[1]


def test_error_of_worker_is_raised() -> None:
    task = translate.Translate.begin(_SETTINGS, _PAIRS)
    encoded = task.encode(_PAIRS)
    encoded[1] = translate.EncodedPair([999], [999])  # example 1 goes to the other process
    workers = Workers(task, encoded, 2, bf16=False)
    try:
        with workers.epoch(0), pytest.raises(RuntimeError, match="a worker process failed:\nIndexError"):
            workers.differentiate([0, 1, 2])
    finally:
        workers.close()


def test_exit_of_worker_raises() -> None:
    task = translate.Translate.begin(_SETTINGS, _PAIRS)
    workers = Workers(task, task.encode(_PAIRS), 2, bf16=False)
    try:
        workers.processes[0].terminate()
        workers.processes[0].join()
        with pytest.raises(RuntimeError, match="a worker process exited unexpectedly"), workers.epoch(0):
            workers.differentiate([0, 1, 2])
    finally:
        workers.close()
