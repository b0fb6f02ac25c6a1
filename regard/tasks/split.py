"""Splits of examples into training examples and those that are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch

from regard.tasks.lines import DataError

E = TypeVar("E")

# Fewer examples in both parts than this share of the held-out ones are not announced: short sentences recur.
_OVERLAP = 0.05


# Of fewer examples, each may have a label of its own.
_FEW = 3


def dev_share(total: int) -> float:
    """Return the fraction of examples to hold out: 5 %, but of small data 20 examples, and at most 20 %. A dev set of a few
    examples would be right by chance.

    >>> [round(dev_share(total) * total) for total in (10, 50, 100, 300, 1000)]
    [2, 10, 20, 20, 50]
    """
    return max(0.05, min(0.2, 20 / max(total, 1)))


def split(examples: Sequence[E], shares: Sequence[float], seed: int = 0) -> list[list[E]]:
    """Split examples at random into the remainder, and parts with these fractions of the examples.

    >>> rest, dev = split(list(range(10)), [0.2])
    >>> len(rest), len(dev), sorted(rest + dev) == list(range(10))
    (8, 2, True)
    """
    order = _shuffled(len(examples), seed)
    parts, start = [], 0
    for share in shares:
        count = max(1, round(share * len(examples)))
        parts.append([examples[i] for i in order[start : start + count]])
        start += count
    rest = [examples[i] for i in order[start:]]
    if not rest:
        raise _too_few(len(examples))
    return [rest, *parts]


def split_by_label(examples: Sequence[E], labels: Sequence[str], share: float, seed: int = 0) -> list[list[E]]:
    """Split examples at random into the remainder and a part with a fraction of the examples, in which each label has the
    same fraction, to within one example. The remainder has at least one example of each label.

    Args:
        examples: the examples.
        labels: the label of each example.
        share: the fraction of the examples in the second part, at most 0.5.
        seed: the same seed gives the same split.

    >>> reviews = [f"review {n}" for n in range(100)]
    >>> rest, dev = split_by_label(reviews, ["bad"] * 60 + ["good"] * 40, 0.1)
    >>> len(rest), sum(reviews.index(review) < 60 for review in dev)
    (90, 6)
    """
    counts = Counter(labels)
    if len(examples) > _FEW and len(counts) == len(examples):
        raise DataError(
            f"each of the {len(examples):,} examples has a label of its own; is the second column the label?"
        )
    # Every k-th example in the order of labels, from those of labels that have others.
    order = sorted((i for i in _shuffled(len(examples), seed) if counts[labels[i]] > 1), key=lambda i: labels[i])
    count = min(max(1, round(share * len(examples))), len(order) // 2)
    held_out = [order[(2 * n + 1) * len(order) // (2 * count)] for n in range(count)]
    rest = {*range(len(examples))}.difference(held_out)
    # Both in random order: `train` draws batches itself, but users may take the first examples.
    mixed = _shuffled(len(examples), seed)
    parts = [[examples[i] for i in mixed if i in part] for part in (rest, {*held_out})]
    if not held_out:
        raise _too_few(len(examples))
    return parts


def return_unknown(rest: list[E], held_out: list[E], labels_of: Callable[[E], Collection[str]]) -> list[list[E]]:
    """Move examples with labels that no example of the remainder has from the held-out part into the remainder.

    >>> return_unknown(["a b"], ["a c", "b c", "b"], str.split)
    [['a b', 'a c'], ['b c', 'b']]
    """
    known = {label for example in rest for label in labels_of(example)}
    moved, kept = list(rest), []
    for example in held_out:
        if known.issuperset(labels_of(example)):
            kept.append(example)
        else:
            known.update(labels_of(example))
            moved.append(example)
    if not kept:
        raise _too_few(len(moved))
    return [moved, kept]


def remark_on_overlap(examples: Sequence[tuple[object, ...]], dev: Sequence[tuple[object, ...]]) -> list[str]:
    """Return a remark, of one line, on dev examples that are among the training examples, too. The last field of an example
    is its location.

    >>> remark_on_overlap([("a", "b", 1), ("c", "d", 2)], [("a", "b", 3), ("e", "f", 4)])
    ['1 of 2 dev examples is a training example, too; on new data, the model is worse than its dev metrics']
    """
    known = {repr(example[:-1]) for example in examples}
    count = sum(repr(example[:-1]) in known for example in dev)
    if count <= _OVERLAP * len(dev):
        return []
    are = "is a training example" if count == 1 else "are training examples"
    return [f"{count:,} of {len(dev):,} dev examples {are}, too; on new data, the model is worse than its dev metrics"]


def _shuffled(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _too_few(total: int) -> DataError:
    return DataError(f"got {total} examples, too few to hold some out; expected more, or dev examples")
