"""Labels and tags: their normal form, how errors name them, and remarks on those of the training examples."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence

from regard.tasks.lines import DataError

# A label is rare if it has at most this share of the examples, and at most half of an equal share.
_RARE = 0.05
_MAX_NAMES, _MAX_LENGTH = 5, 40


def normalize_label(label: str) -> str:
    r"""Return a label in Unicode normalization form C, in which labels are compared.

    >>> normalize_label("cafe\u0301") == "caf\u00e9"
    True
    """
    return unicodedata.normalize("NFC", label)


def index_labels(labels: Sequence[str]) -> dict[str, int]:
    """Return the index of each label, by its normal form: models of version 0.1 have labels as they stood in the file."""
    return {normalize_label(label): i for i, label in enumerate(labels)}


def quote(text: str) -> str:
    """Return a text in quotes for an error message, with at most 40 characters of it.

    >>> quote("pos"), quote("A film that is good, but far too long.  " * 99)
    ("'pos'", "'A film that is good, but far too long...'")
    """
    return repr(text if len(text) <= _MAX_LENGTH else f"{text[: _MAX_LENGTH - 3].rstrip(' .')}...")


def name_some(names: Collection[str]) -> str:
    """Name at most five strings, for an error message.

    >>> name_some(["neg", "pos"]), name_some("abcdefgh")
    ("'neg', 'pos'", "'a', 'b', 'c', 'd', 'e' and 3 more")
    """
    more = len(names) - _MAX_NAMES
    named = ", ".join(quote(name) for name, _ in zip(names, range(_MAX_NAMES), strict=False))
    return f"{named} and {more:,} more" if more > 0 else named


def expect_known(known: Collection[str], others: Collection[str]) -> str:
    """Return the end of an error about a label that the model does not know.

    Args:
        known: the labels that the model knows.
        others: the other labels that it does not know.

    >>> expect_known(["neg", "pos"], [])
    "expected one of those in the training data: 'neg', 'pos'"
    >>> expect_known(["neg", "pos"], ["Neg", "Pos"])
    "expected one of those in the training data: 'neg', 'pos'; 2 other labels are unknown, too: 'Neg', 'Pos'"
    """
    expected = f"expected one of those in the training data: {name_some(known)}"
    if not others:
        return expected
    one = len(others) == 1
    return f"{expected}; {len(others):,} other label{'s are' if not one else ' is'} unknown, too: {name_some(others)}"


def describe_swap(texts: Collection[str], labels: Collection[str]) -> str | None:
    """Return the cause of an error if the columns of texts and labels seem to be swapped, or None.

    A classifier gives one label to each text, so that there are not more labels than texts. Swapped columns have at least
    twice as many, unless there are fewer than four.

    >>> describe_swap(["neg", "pos"] * 3, ["good", "bad", "fine", "awful", "great", "weak"])
    'column 2 has 6 different labels in 6 examples, column 1 has 2; are the columns swapped?'
    >>> describe_swap(["good", "bad", "fine", "awful", "great", "weak"], ["neg", "pos"] * 3) is None
    True
    """
    first, second = len({*texts}), len({*labels})
    if second < max(4, 2 * first):
        return None
    return (
        f"column 2 has {second:,} different labels in {len(labels):,} examples, column 1 has {first:,}; "
        "are the columns swapped?"
    )


def check_variety(labels: Collection[str], kind: str, unit: str) -> None:
    """Raise unless there are at least two different labels.

    Args:
        labels: the label of each example.
        kind: the word for a label, such as "label".
        unit: the word for an example, such as "example".

    Raises:
        DataError: all labels are equal, so that nothing can be learned.

    >>> check_variety(["pos"] * 300, "label", "example")
    Traceback (most recent call last):
    regard.tasks.lines.DataError: all 300 examples have the label 'pos'; expected at least two labels
    """
    different = {*labels}
    if len(different) == 1:
        every = f"all {len(labels):,} {unit}s have" if len(labels) > 1 else f"the only {unit} has"
        raise DataError(f"{every} the {kind} {quote(different.pop())}; expected at least two {kind}s")


def remark_on_labels(labels: Collection[str]) -> list[str]:
    """Return remarks on the labels of training examples, one line each: on rare labels, and on those that are probably
    mistakes.

    >>> remark_on_labels(["ham"] * 97 + ["spam"] * 3)
    ["3 % of the examples (3 of 100) have the label 'spam'; accuracy alone says little, see F1, the mean over the labels"]
    >>> remark_on_labels(["Pos", "neg", "pos", "neg"])
    ["labels differ in case or invisible characters only: 'Pos', 'pos'"]
    """
    counts = Counter(labels)
    remarks = []
    single = sorted(label for label, count in counts.items() if count == 1)
    if len(single) > max(len(counts) // 2, 2):
        remarks.append(
            f"{len(single):,} of the {len(counts):,} labels occur once only: {name_some(single)}; "
            "is the second column the label?"
        )
    else:
        remarks += _remark_on_rare(counts)
    forms = Counter(map(_visible_form, counts))
    variants = sorted(
        (label for label in counts if forms[_visible_form(label)] > 1), key=lambda x: (_visible_form(x), x)
    )
    if variants:
        remarks.append(f"labels differ in case or invisible characters only: {name_some(variants)}")
    return remarks


def _visible_form(label: str) -> str:
    """Return a label without what readers may overlook: case, spaces and characters of no width."""
    folded = unicodedata.normalize("NFKC", label).casefold()
    return "".join(x for x in folded if not x.isspace() and unicodedata.category(x) != "Cf")


def _remark_on_rare(counts: Counter[str]) -> list[str]:
    """Return a remark on labels with few examples, or nothing."""
    total, most = counts.total(), min(_RARE, 0.5 / len(counts))
    rare = sorted((label for label in counts if counts[label] <= most * total), key=lambda x: (counts[x], x))
    if not rare:
        return []
    if len(rare) == 1:
        count = counts[rare[0]]
        have = "have" if count > 1 else "has"
        subject = (
            f"{100 * count / total:.2g} % of the examples ({count:,} of {total:,}) {have} the label {quote(rare[0])}"
        )
    else:
        subject = f"{len(rare):,} labels have at most {100 * most:.2g} % of the examples each: {name_some(rare)}"
    return [f"{subject}; accuracy alone says little, see F1, the mean over the labels"]
