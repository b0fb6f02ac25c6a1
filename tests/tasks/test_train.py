"""Training converges, is reproducible, resumes after interruptions, and writes a directory that can be loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.examples import pairs, reviews, sentences

from regard.tasks import classify, tag, translate
from regard.tasks.data import Labeled, Tagged
from regard.tasks.lines import DataError, Location
from regard.tasks.open import is_task, open_task
from regard.tasks.split import split
from regard.tasks.task import Task
from regard.tasks.train import Epoch, Step, Training, train

_SMALL = {"width": 32, "layers": 1, "dropout": 0.0}
_QUICK = Training(epochs=2, batch=64, rate=0.01, warmup=5)
SEQUENCES = translate.TranslateSettings(units="symbols", heads=2, hidden=32, **_SMALL)
# Task class, settings, examples, number of epochs, and the bound of the metric after them.
TASKS: dict[str, tuple[type[Task], Any, Callable[..., Any], int, float]] = {
    "transformer": (translate.Translate, SEQUENCES, pairs, 30, 25.0),
    "recurrent": (translate.Translate, replace(SEQUENCES, model="recurrent"), pairs, 15, 25.0),
    **{f"tag, {kind}": (tag.Tag, tag.TagSettings(kind, heads=2, **_SMALL), sentences, 6, 97.0)
       for kind in ("recurrent", "transformer", "conv")},
    **{f"classify, {kind}": (classify.Classify, classify.ClassifySettings(kind, heads=2, **_SMALL), reviews, 8, 97.0)
       for kind in ("recurrent", "transformer", "conv")},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Seconds each: `make test` trains one model of each task, and one of each kind.
SLOW = {"transformer", "tag, recurrent", "tag, conv", "classify, recurrent", "classify, transformer"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TASKS])
def test_train_learns_and_saves_best_epoch(name: str, tmp_path: Path) -> None:
    kind, settings, make, epochs, goal = TASKS[name]
    events: list[Step | Epoch] = []
    training = replace(_QUICK, epochs=epochs, patience=epochs)
    task, history = train(kind, settings, training, make(600), make(100, 1), tmp_path, tell=events.append)
    best = history.best
    assert best is not None
    value = best.dev[task.metric]
    assert value <= goal if task.fewer_is_better else value >= goal
    assert [event for event in events if isinstance(event, Epoch)] == history.epochs
    steps = [event for event in events if isinstance(event, Step) and event.epoch == 1]
    assert [step.done for step in steps] == list(range(1, steps[0].steps + 1))
    # The saved model is that of the best epoch.
    assert is_task(tmp_path)
    again = open_task(tmp_path)
    dev = make(100, 1)
    assert again.evaluate(dev) == task.evaluate(dev) == best.dev
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"config.json", "model.safetensors", "metrics.json", "curves.png"}
    assert not any(name.endswith((".part", ".pt")) for name in names)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["best"] == best.dev
    assert len(metrics["epochs"]) == len(history.epochs)


def test_predictions_have_probabilities_and_weights(tmp_path: Path) -> None:
    task = translate.Translate.begin(SEQUENCES, pairs(50))
    one, two = task.predict(["abc", "dd"], beams=3)
    assert one.source == ["a", "b", "c", "</s>"]
    assert one.weights.shape == (len(one.target) + 1, 4)
    assert torch.allclose(one.weights.sum(-1), torch.ones(len(one.target) + 1))
    assert two == task.predict(["dd"], beams=3, align=False)[0]._replace(weights=two.weights)
    assert one.text == " ".join(one.target)

    labels = tag.Tag.begin(tag.TagSettings(heads=2, **_SMALL), sentences(50))
    (tagging,) = labels.predict(["Do not, bdfung!"])
    assert tagging.words == ["Do", "not", ",", "bdfung", "!"]
    assert len(tagging.tags) == len(tagging.chances) == 5
    assert labels.predict([" "])[0].words == []

    review = classify.Classify.begin(classify.ClassifySettings(heads=2, **_SMALL), reviews(50))
    (prediction,) = review.predict(["good but the plot"])
    assert set(prediction.chances) == {"+", "-"}
    assert abs(sum(prediction.chances.values()) - 1) < 1e-5
    assert prediction.chances[prediction.label] == max(prediction.chances.values())
    assert prediction.weights.shape == (4,)
    assert abs(float(prediction.weights.sum()) - 1) < 1e-5


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def _without_time(history: Any) -> list[Epoch]:
    return [replace(epoch, seconds=0.0) for epoch in history.epochs]


@pytest.mark.parametrize("name", ["transformer", "recurrent", "tag, recurrent", "classify, transformer"])
def test_same_seed_gives_same_bits(name: str, tmp_path: Path) -> None:
    kind, settings, make, _, _ = TASKS[name]
    settings = replace(settings, dropout=0.2)
    runs = {}
    for label, seed in (("one", 0), ("two", 0), ("other", 1)):
        _, history = train(kind, settings, replace(_QUICK, seed=seed), make(200), make(50, 1), tmp_path / label)
        runs[label] = (_weights(tmp_path / label), _without_time(history))
    assert runs["one"] == runs["two"]
    assert runs["one"][0] != runs["other"][0]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", [(1, 3), (2, 1), (3, 4)])
def test_interrupted_run_resumes_to_same_model(where: tuple[int, int], tmp_path: Path) -> None:
    kind, settings, make, _, _ = TASKS["transformer"]
    settings, training = replace(settings, dropout=0.2), replace(_QUICK, epochs=4)

    def stop(event: Step | Epoch) -> None:
        if isinstance(event, Step) and (event.epoch, event.done) == where:
            raise Interrupted

    def run(folder: str, tell: Callable[[Step | Epoch], None] = lambda _: None) -> Any:
        return train(kind, settings, training, make(200), make(50, 1), tmp_path / folder, tell=tell)[1]

    uninterrupted = run("uninterrupted")
    with pytest.raises(Interrupted):
        run("interrupted", stop)
    torch.manual_seed(99)  # the state of the default generator has no effect
    assert _without_time(run("interrupted")) == _without_time(uninterrupted)
    assert _weights(tmp_path / "interrupted") == _weights(tmp_path / "uninterrupted")


def test_run_with_other_settings_is_not_resumed(tmp_path: Path) -> None:
    kind, settings, make, _, _ = TASKS["transformer"]

    def stop(event: Step | Epoch) -> None:
        if isinstance(event, Step) and event.epoch == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(kind, settings, _QUICK, make(100), make(20, 1), tmp_path, tell=stop)
    with pytest.raises(
        DataError, match=r"interrupted run with other settings \(rate was 0.01 and is now 0.02\); use the same"
    ):
        train(kind, settings, replace(_QUICK, rate=0.02), make(100), make(20, 1), tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match=r"checkpoint\.pt: is not a valid checkpoint"):
        train(kind, settings, _QUICK, make(100), make(20, 1), tmp_path)
    (tmp_path / "checkpoint.pt").unlink()  # to start over, as the messages say
    _, history = train(kind, settings, _QUICK, make(100), make(20, 1), tmp_path)
    assert [epoch.number for epoch in history.epochs] == [1, 2]
    with pytest.raises(DataError, match="is not empty; expected a new directory, or one with an interrupted run"):
        train(kind, settings, _QUICK, make(100), make(20, 1), tmp_path)
    with pytest.raises(DataError, match="is a file; expected a directory"):
        train(kind, settings, _QUICK, make(100), make(20, 1), tmp_path / "config.json")


def test_run_on_other_data_is_not_resumed(tmp_path: Path) -> None:
    kind, settings, make, _, _ = TASKS["transformer"]

    def stop(event: Any) -> None:
        if isinstance(event, Step) and event.epoch == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(kind, settings, _QUICK, make(100), make(20, 1), tmp_path, tell=stop)
    for examples, dev in ((make(99), make(20, 1)), (make(100), make(20, 2)), (make(100)[::-1], make(20, 1))):
        with pytest.raises(DataError, match="contains an interrupted run on other data; use the same files"):
            train(kind, settings, _QUICK, examples, dev, tmp_path)
    moved = [example._replace(place=Location(Path("elsewhere.tsv"), 7)) for example in make(100)]
    train(kind, settings, _QUICK, moved, make(20, 1), tmp_path)


@pytest.mark.parametrize("name", ["words.json", "config.json", "model.safetensors", "checkpoint.pt"])
def test_training_restarts_after_failed_first_save(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings, make, _, _ = TASKS["classify, recurrent"]
    out, replace_file = tmp_path / "out", Path.replace

    def fill_disk(part: Path, target: Path) -> Path:
        if target.name == name:
            raise OSError(28, "No space left on device")
        return replace_file(part, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fill_disk)
        with pytest.raises(OSError, match=rf"{name}: cannot be written \(No space left on device\)"):
            train(kind, settings, _QUICK, make(60), make(20, 1), out)
    assert not [path for path in out.iterdir() if path.suffix == ".part"]
    again, _ = train(kind, settings, _QUICK, make(60), make(20, 1), out)
    expected, _ = train(kind, settings, _QUICK, make(60), make(20, 1), tmp_path / "other")
    for x, y in zip(again.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(x, y)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "other").iterdir())
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {(out / "config.json").stat().st_mode & 0o777}


def test_training_stops_without_improvement(tmp_path: Path) -> None:
    kind, settings, make, _, _ = TASKS["classify, recurrent"]
    training = replace(_QUICK, epochs=50, patience=2)
    _, history = train(kind, settings, training, make(300), make(50, 1), tmp_path)
    assert history.best is not None
    # Patience counts from the first epoch with these metrics; of equal ones, that with the least loss is saved.
    equal = [epoch for epoch in history.epochs if epoch.dev == history.best.dev]
    assert len(history.epochs) == equal[0].number + 2 < 50
    assert history.best.loss == min(epoch.loss for epoch in equal)
    assert open_task(tmp_path).evaluate(make(50, 1)) == history.best.dev


def test_better_compares_metrics() -> None:
    def make(units: str) -> Any:
        return translate.Translate.begin(replace(SEQUENCES, units=units, vocabulary=30), pairs(20))

    task = make("pieces")
    assert task.better({"BLEU": 0.0, "chrF": 1.0}, None)
    assert task.better({"BLEU": 0.0, "chrF": 2.0}, {"BLEU": 0.0, "chrF": 1.0})
    assert task.better({"BLEU": 1.0, "chrF": 1.0}, {"BLEU": 0.9, "chrF": 2.0})
    assert not task.better({"BLEU": 1.0, "chrF": 1.0}, {"BLEU": 1.0, "chrF": 1.0})
    assert make("symbols").better({"word error": 3.0, "symbol error": 1.0}, {"word error": 4.0, "symbol error": 0.5})


def test_unknown_labels_raise(tmp_path: Path) -> None:
    place = Location(Path("new.tsv"), 7)
    review = classify.Classify.begin(classify.ClassifySettings(heads=2, **_SMALL), reviews(20))
    with pytest.raises(
        DataError, match=r"new\.tsv, line 7: label is '\?'; expected one of those in the training data: '\+', '-'"
    ):
        review.evaluate([Labeled("good", "?", place)])
    labels = tag.Tag.begin(tag.TagSettings(heads=2, **_SMALL), sentences(50))
    with pytest.raises(
        DataError, match=r"new\.tsv, line 7: tag of 'it' is 'X'; expected one of those in the training data: 'ADJ', "
    ):
        labels.evaluate([Tagged(["it"], ["X"], place)])
    with pytest.raises(DataError, match="got 1 examples, too few to hold some out"):
        split([1], [0.05])


def test_open_task_rejects_invalid_directories(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a directory of a trained model \(config\.json: No such file"):
        open_task(tmp_path)
    review = classify.Classify.begin(classify.ClassifySettings(heads=2, **_SMALL), reviews(20))
    review.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def error_after(change: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(DataError) as error:
            open_task(tmp_path)
        return str(error.value)

    assert "task is 'sing'; expected one of translate, tag, classify" in error_after({"task": "sing"})
    assert "is not a valid configuration for this version of regard" in error_after({"settings": {"wide": 3}})
    assert "is not a valid configuration for this version of regard" in error_after(
        {"settings": {**config["settings"], "width": -1}}
    )
    assert "expected plain names" in error_after({"vocabularies": ["../../etc/passwd"]})
    assert "does not contain the weights" in error_after({"settings": {**config["settings"], "width": 1_000_000}})
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(DataError, match=r"config\.json: is not valid JSON"):
        open_task(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(DataError, match=r"model\.safetensors: cannot be read"):
        open_task(tmp_path)


def test_invalid_settings_raise() -> None:
    with pytest.raises(ValueError, match="settings: model is 'x'; expected 'transformer' or 'recurrent'"):
        translate.TranslateSettings(model="x")
    unknown: Any = "x"
    with pytest.raises(ValueError, match="settings: cell is 'x'; expected 'gru' or 'lstm'"):
        translate.TranslateSettings(cell=unknown)
    with pytest.raises(ValueError, match="training: rate is 0; expected a finite number > 0"):
        Training(rate=0)
    with pytest.raises(ValueError, match="training: average is 1; expected a number from 0 to 1, without 1"):
        Training(average=1)
