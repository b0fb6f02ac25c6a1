"""Directories that version 0.1 wrote still load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from regard.tasks.classify import ClassifySettings
from regard.tasks.open import is_task, open_task
from regard.tasks.train import Epoch, Training

FOLDER = Path(__file__).parent / "trained_0_1"


def test_open_task_loads_directory_of_version_0_1() -> None:
    """The probabilities are those that version 0.1 computed."""
    assert is_task(FOLDER)
    bad, good = open_task(FOLDER).predict(["a bad film", "a good film"])
    assert (bad.label, good.label) == ("-", "+")
    assert bad.chances["-"] == pytest.approx(0.5340890288, abs=1e-5)
    assert good.chances["+"] == pytest.approx(0.5942731500, abs=1e-5)
    torch.testing.assert_close(good.weights, torch.tensor([0.2550, 0.4482, 0.2968]), rtol=0, atol=1e-4)


def test_metrics_of_version_0_1_have_same_fields() -> None:
    metrics = json.loads((FOLDER / "metrics.json").read_text())
    assert ClassifySettings(**metrics["settings"]) == open_task(FOLDER).settings
    assert Training(**metrics["training"]) == Training(epochs=4, batch=32, rate=0.05, warmup=1)
    assert [Epoch(**epoch).best for epoch in metrics["epochs"]] == [True, False, False, False]
