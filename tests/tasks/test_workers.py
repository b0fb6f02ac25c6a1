"""Processes that share each batch come to what one of them does, and say so when one fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.tasks import translate
from regard.tasks.data import Pair, Place
from regard.tasks.train import Step, Training, train
from regard.tasks.workers import Workers

_WORDS = ["ab", "abc", "bca", "cab", "dab", "bad", "cad", "a", "d", "abcd", "dcba"]
_PAIRS = [Pair(word, " ".join(word.upper()), Place(Path("made"), 1)) for word in _WORDS]
_SETTINGS = translate.Settings("recurrent", "symbols", width=16, hidden=16, layers=1, dropout=0.0)


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
def test_the_gradient_is_that_of_the_whole_batch(batch: list[int]) -> None:
    loss, gradients = _gradients(1, batch)
    shared_loss, shared = _gradients(3, batch)
    assert abs(loss - shared_loss) <= 1e-6 * loss
    assert len(gradients) == len(shared)
    # Sums in another order; what is small is a difference of what is large.
    largest = max(float(one.abs().max()) for one in gradients)
    for one, other in zip(gradients, shared, strict=True):
        assert (one - other).abs().max() <= 16 * torch.finfo(torch.float32).eps * largest


def test_what_is_dropped_depends_on_the_seed_alone() -> None:
    first, second = (_gradients(2, list(range(11)), dropout=0.5) for _ in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1], strict=True))


def test_an_interrupted_run_goes_on_to_the_same(tmp_path: Path) -> None:
    training = Training(epochs=2, batch=16, rate=0.01, warmup=2, workers=2)
    settings = replace(_SETTINGS, dropout=0.2)

    def stop(news: Any) -> None:
        if isinstance(news, Step) and (news.epoch, news.done) == (2, 2):
            raise KeyboardInterrupt

    _, whole = train(translate.Translate, settings, training, _PAIRS, _PAIRS, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(translate.Translate, settings, training, _PAIRS, _PAIRS, tmp_path / "parts", tell=stop)
    _, parts = train(translate.Translate, settings, training, _PAIRS, _PAIRS, tmp_path / "parts")
    assert [one.loss for one in parts.epochs] == [one.loss for one in whole.epochs]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_a_worker_that_fails_says_why() -> None:
    task = translate.Translate.begin(_SETTINGS, _PAIRS)
    encoded = task.encode(_PAIRS)
    encoded[1] = translate.Encoded([999], [999])  # the second goes to the other process
    workers = Workers(task, encoded, 2, bf16=False)
    try:
        with workers.epoch(0), pytest.raises(RuntimeError, match="a worker failed:\nIndexError"):
            workers.differentiate([0, 1, 2])
    finally:
        workers.close()


def test_a_worker_that_is_gone() -> None:
    task = translate.Translate.begin(_SETTINGS, _PAIRS)
    workers = Workers(task, task.encode(_PAIRS), 2, bf16=False)
    try:
        workers.processes[0].terminate()
        workers.processes[0].join()
        with pytest.raises(RuntimeError, match="a worker ended before its time"), workers.epoch(0):
            workers.differentiate([0, 1, 2])
    finally:
        workers.close()
