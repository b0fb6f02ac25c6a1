"""Labels of training data: what is an error, and what is announced."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from regard.tasks.classify import Classify, ClassifySettings
from regard.tasks.data import Labeled, Tagged
from regard.tasks.labels import remark_on_labels
from regard.tasks.lines import DataError, Location
from regard.tasks.tag import Tag, TagSettings
from regard.tasks.task import Task
from regard.tasks.train import Training, train
from regard.tasks.translate import Translate

PLACE = Location(Path("a.tsv"), 3)


def reviews(*labels: str) -> list[Labeled]:
    return [Labeled(f"review {n}", label, PLACE) for n, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("task", "settings", "examples", "error"),
    [
        (Classify, ClassifySettings(), reviews(*["pos"] * 300), "all 300 examples have the label 'pos'; expected at least two labels"),
        (Classify, ClassifySettings(), reviews("pos"), "the only example has the label 'pos'; expected at least two labels"),
        (Classify, ClassifySettings(), [], "got no training examples; expected at least one"),
        (Tag, TagSettings(), [Tagged(["a", "b"], ["X", "X"], PLACE)], "all 2 words have the tag 'X'; expected at least two tags"),
    ],
)  # fmt: skip
def test_single_labels_raise_before_the_directory_exists(
    task: type[Task], settings: object, examples: list[Labeled], error: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(error)}$"):
        train(task, settings, Training(), examples, examples, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rare_labels_are_announced() -> None:
    remark = "5 % of the examples (5 of 100) have the label 'pos'; accuracy alone says little, see F1, the mean over the labels"
    assert Classify.remarks(reviews(*["neg"] * 95, *["pos"] * 5), []) == [remark]
    assert Classify.remarks(reviews(*["neg"] * 90, *["pos"] * 10), []) == []
    # Twenty labels of equal frequency are not rare, but those with half of it are.
    names = [chr(ord("a") + n) for n in range(20)]
    assert remark_on_labels(names * 10) == []
    (remark,) = remark_on_labels([*names * 10, "y", "z"])
    assert remark.startswith("2 labels have at most 2.3 % of the examples each: 'y', 'z'; accuracy alone says little")


def test_labels_that_are_mistakes_are_announced() -> None:
    assert remark_on_labels(["Pos", "neg", "pos", "neg"]) == [
        "labels differ in case or invisible characters only: 'Pos', 'pos'"
    ]
    assert remark_on_labels(["pos", "neg", "pos\u200b", "neg"]) == [
        "labels differ in case or invisible characters only: 'pos', 'pos\\u200b'"
    ]
    (remark,) = remark_on_labels([f"review {n}" for n in range(9)])
    assert remark == (
        "9 of the 9 labels occur once only: 'review 0', 'review 1', 'review 2', 'review 3', 'review 4' and 4 more; "
        "is the second column the label?"
    )


def test_dev_examples_that_are_training_examples_are_announced() -> None:
    examples = reviews(*["neg", "pos"] * 10)
    dev = [Labeled("review 0", "neg", Location(Path("dev.tsv"), 1)), Labeled("review 0", "pos", PLACE)]
    (remark,) = Classify.remarks(examples, dev)
    assert (
        remark == "1 of 2 dev examples is a training example, too; on new data, the model is worse than its dev metrics"
    )
    words = [Tagged(["a"], ["X"], PLACE), Tagged(["b"], ["Y"], PLACE)]
    assert len(Tag.remarks(words, words)) == len(Translate.remarks(words, words)) == 1
    assert Tag.remarks(words[:1], words[1:]) == []


def test_unknown_labels_are_listed_briefly(tmp_path: Path) -> None:
    task = Classify.begin(ClassifySettings(width=16, heads=2), reviews("neg", "pos", "neg", "pos"))
    with pytest.raises(DataError) as error:
        task.encode([Labeled("neg", "A review of a film. " * 50, PLACE), *reviews(*(f"label {n}" for n in range(99)))])
    assert str(error.value) == (
        "a.tsv, line 3: label is 'A review of a film. A review of a fil...'; expected one of those in the training data: "
        "'neg', 'pos'; 99 other labels are unknown, too: 'label 0', 'label 1', 'label 2', 'label 3', 'label 4' and 94 more"
        "; are the columns swapped?"
    )
    # Those of dev examples raise before training.
    out, examples = tmp_path / "out", reviews(*["neg", "pos"] * 10)
    with pytest.raises(DataError, match=r"^a\.tsv, line 3: label is 'new'; expected one of"):
        train(Classify, task.settings, Training(), examples, reviews("new"), out, tell=lambda event: pytest.fail(event))


def test_models_with_labels_in_another_form_know_them() -> None:
    """Version 0.1 kept labels as they stood in the file."""
    task = Classify.begin(ClassifySettings(width=16, heads=2), reviews("cafe\u0301", "th\u00e9"))
    assert [text.label for text in task.encode(reviews("caf\u00e9", "th\u00e9"))] == [0, 1]
