"""Batch, epochs, warm-up, average and patience follow the number of steps that the data give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from regard.tasks.classify import Classify, ClassifySettings
from regard.tasks.data import Labeled
from regard.tasks.fit import Start, fit_to_data
from regard.tasks.lines import Location
from regard.tasks.presets import PRESETS
from regard.tasks.train import Training, train


@pytest.mark.parametrize("task", PRESETS)
def test_large_data_change_nothing(task: str) -> None:
    for training in PRESETS[task].training.values():
        assert fit_to_data(training, [10] * 300_000) == training


@pytest.mark.parametrize("count", [1, 2, 10, 50, 300, 1000, 5000])
@pytest.mark.parametrize("size", [1, 7, 400])
def test_settings_leave_steps_after_warmup(count: int, size: int) -> None:
    fitted = fit_to_data(Training(epochs=15, batch=1024), [size] * count)
    per_epoch = -(-count * size // fitted.batch)
    steps = per_epoch * fitted.epochs
    assert max(64, size) <= fitted.batch <= 1024 or fitted.batch == 64
    assert 15 <= fitted.epochs <= 100
    assert steps >= 600 or fitted.epochs == 100
    assert fitted.warmup <= steps // 4
    assert 1 / (1 - fitted.average) <= max(steps / 3, 2) * 1.0001
    assert fitted.patience >= min(5, fitted.epochs)


@pytest.mark.parametrize("name", ["batch", "epochs", "warmup", "average", "patience"])
def test_given_settings_stay(name: str) -> None:
    given = Training(epochs=3, batch=999, warmup=77, average=0.5, patience=2)
    fitted = fit_to_data(given, [7] * 100, fixed={name})
    assert getattr(fitted, name) == getattr(given, name)
    assert fitted != given


def test_training_tells_settings_and_learns_small_data(tmp_path: Path) -> None:
    place = Location(Path("reviews.tsv"), 1)
    words = {"+": ("wonderful", "bright", "lovely"), "-": ("awful", "dull", "boring")}
    reviews = [Labeled(f"a {words[s][n % 3]} film number {n}", s, place) for n in range(60) for s in "+-"]
    told: list[Any] = []
    settings = ClassifySettings(model="conv", width=32, dropout=0.0)
    training = PRESETS["classify"].training["conv"]
    task, history = train(
        Classify, settings, training, reviews[:100], reviews[100:], tmp_path, tell=told.append, fixed=()
    )
    assert isinstance(told[0], Start)
    assert told[0].training.warmup < 200
    assert history.best is not None
    assert history.best.dev["accuracy"] == 100.0
    assert task.chance(reviews) == (50.0, "+")


@pytest.mark.parametrize("count", range(1, 31))
def test_accuracy_of_a_constant_answer_equals_chance(count: int) -> None:
    """`train` announces accuracies up to that of chance, without rounding between the two."""
    place = Location(Path("reviews.tsv"), 1)
    reviews = [Labeled("a film", "-" if n < count else "+", place) for n in range(31)]
    task = Classify.begin(ClassifySettings(model="conv", width=16), reviews)
    answer = task.labels.index(task.chance(reviews)[1])
    scores = torch.eye(2)[answer]
    task.model = torch.nn.Module()
    task.model.forward = lambda text: scores.expand(len(text.lengths), 2)
    assert task.evaluate(reviews)["accuracy"] == task.chance(reviews)[0]
