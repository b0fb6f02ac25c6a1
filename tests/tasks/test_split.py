"""Held-out examples: disjoint from the others, with the labels in proportion."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.classify import Classify
from regard.tasks.data import Labeled, Tagged
from regard.tasks.lines import DataError, Location
from regard.tasks.split import split, split_by_label
from regard.tasks.tag import Tag

PLACE = Location(Path("a.tsv"), 1)


@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=200), st.floats(0.01, 0.5), st.integers(0, 3))
def test_split_by_label_has_each_label_in_proportion(labels: list[str], share: float, seed: int) -> None:
    examples = list(range(len(labels)))
    counts = Counter(labels)
    if max(counts.values()) == 1:
        with pytest.raises(DataError, match=r"too few to hold some out|has a label of its own"):
            split_by_label(examples, labels, share, seed)
        return
    rest, dev = split_by_label(examples, labels, share, seed)
    assert sorted(rest + dev) == examples
    assert {labels[i] for i in rest} == {*labels}
    held_out = Counter(labels[i] for i in dev)
    eligible = sum(count for count in counts.values() if count > 1)
    for label, count in counts.items():
        assert abs(held_out[label] - (count > 1) * count * len(dev) / eligible) <= 1
    assert split_by_label(examples, labels, share, seed) == [rest, dev]


def test_rare_labels_are_in_both_parts() -> None:
    """At random, 1 of 5 splits would have no positive example in the dev part."""
    examples = [Labeled(f"text {n}", "pos" if n < 100 else "neg", PLACE) for n in range(2000)]
    for seed in range(20):
        dev = Classify.hold_out(examples, 0.05, seed)[1]
        assert len(dev) == 100
        assert sum(example.label == "pos" for example in dev) == 5
        assert dev != Classify.hold_out(examples, 0.05, seed + 1)[1]


def test_tags_of_dev_sentences_occur_in_training() -> None:
    sentences = [Tagged([f"w{n}"], [f"T{n}" if n < 30 else "N"], PLACE) for n in range(60)]
    rest, dev = Tag.hold_out(sentences, 0.5)
    assert len(rest) + len(dev) == 60
    assert {sentence.tags[0] for sentence in dev} == {"N"}
    # Where all occur, the split is that of `split`.
    plain = [Tagged([f"w{n}"], ["N"], PLACE) for n in range(60)]
    assert Tag.hold_out(plain, 0.05) == split(plain, [0.05])
    with pytest.raises(DataError, match="got 2 examples, too few to hold some out"):
        Tag.hold_out(sentences[:2], 0.5)
