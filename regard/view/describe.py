"""Description of a head in a few words: the pattern that most of its attention follows, or else its strongest link.

A pattern is a rule that selects target keys for a query, such as the previous token, the token itself, or the
separators. Its share is the weight on the targets, averaged over the queries that have at least one. Markers such as
[CLS] do not count as queries, since their weights say little about the words. Where the recorded top-k may miss a
target, the share is a lower bound and is written with "≥".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.view.record import RecordLike, Rows, Sides
from regard.view.token import Reading, is_punctuation, isolate, read

HABITS = {  # pattern: (symbol, name) in the views
    "previous": ("←", "previous token"),
    "next": ("→", "next token"),
    "itself": ("↺", "itself"),
    "first": ("⇤", "first token"),
    "separator": ("▪", "special tokens"),
    "punctuation": ("¶", "punctuation"),
    "same": ("=", "same word elsewhere"),
    "induction": ("⤳", "after an earlier copy"),
    "wide": ("≈", "broad"),
    "pair": ("∙", "no dominant pattern"),
    "none": ("∅", "attends to nothing"),
}

_TARGETS = {  # the target of a positional pattern, in a sentence
    "previous": "the previous token",
    "next": "the next token",
    "itself": "the token itself",
    "first": "the first token",
    "same": "the same word elsewhere",
    "induction": "what followed an earlier copy of the token",
}
_MIN_SHARE = 0.4  # a pattern has at least this share of the weight ...
_MIN_RATIO = 1.8  # ... and this multiple of its share under uniform attention
_MIN_LINK = 0.2  # a link between words is reported if its weight is this fraction of the largest
_MIN_ENTROPY = 0.85  # broad: entropy is at least this fraction of the maximum


@dataclass(frozen=True)
class StrongestPair:
    """A query, a key (positions in their own texts), and the weight between them."""

    query: int
    key: int
    weight: float


@dataclass(frozen=True)
class HeadDescription:
    """The description of one head.

    Args:
        pattern: a key of `HABITS`.
        share: the share of the attention that follows the pattern.
        text: the description in a few words.
        sentence: the description as a sentence.
        entropy, max_entropy: the mean entropy of the queries and its largest possible value, in nats.
        pair: the strongest link.
    """

    pattern: str
    share: float
    text: str
    sentence: str
    entropy: float | None
    max_entropy: float
    pair: StrongestPair | None

    @property
    def symbol(self) -> str:
        return HABITS[self.pattern][0]

    @property
    def interest(self) -> float:
        """How informative the head is, 0 to 1: high for a sharp link or a local pattern, low for attention to markers."""
        if self.pattern in ("previous", "next", "induction", "same"):
            return self.share
        if self.pattern == "pair" and self.pair is not None:
            return 0.9 * self.pair.weight
        return 0.3 * self.share


@dataclass(frozen=True)
class _Pattern:
    name: str
    hit: Tensor  # (H,L,k) bool: the recorded key is a target
    targets: Tensor  # (L,) number of targets that the query may attend
    chance: Tensor  # (L,) the share under uniform attention


def describe_heads(record: RecordLike, rows: Rows, sides: Sides) -> list[HeadDescription]:
    """Return the descriptions of the heads of one record, in order.

    >>> from regard import Top
    >>> from regard.view import record as views
    >>> from regard.watch import Record
    >>> top = Top(torch.ones(1, 1, 4, 1), torch.tensor([0, 0, 1, 2])[:, None].expand(1, 1, 4, 1))
    >>> record = Record("attention", 0, 0, "decoder", 1, 4, 4, top, top.weights[..., 0], None, None, None)
    >>> (sides,) = views.check([record], ["the", "cat", "sat", "down"], None, 0)
    >>> describe_heads(record, views.rows(record, 0), sides)[0].sentence
    'Attends mainly to the previous token: 1.00 of its attention.'
    """
    queries, keys = read(sides.queries), read(sides.keys)
    counts = _counted(rows, queries)
    rules = _patterns(record, rows, sides, keys)
    bound = torch.minimum(_smallest(rows), rows.rest)  # (H,L) upper bound on the weight of an unrecorded key
    bound = bound.masked_fill(rows.complete, 0.0)
    shares, highs = [], []
    for rule in rules:
        counted = counts & (rule.targets > 0)
        low = (rows.weights * rule.hit).sum(-1)
        missing = rule.targets - rule.hit.sum(-1)
        high = low + torch.minimum(missing * bound, rows.rest)
        shares.append(low[:, counted].mean(-1))
        highs.append(high[:, counted].mean(-1))
    entropy = None if rows.entropy is None else rows.entropy[:, counts].mean(-1)
    max_entropies = _attendable(rows)[:, counts].clamp(min=1).float().log().mean(-1)
    are_words = [torch.tensor([not r.marker and not is_punctuation(r.text) for r in side]) for side in (queries, keys)]
    pairs = [_strongest(rows, head, record, queries, are_words) for head in range(record.heads)]
    out = []
    for head in range(record.heads):
        means = [float(share[head]) for share in shares]
        fit = [(means[n], n) for n, rule in enumerate(rules) if _fits(means[n], rule, counts)]
        mean_entropy = None if entropy is None else float(entropy[head])
        max_entropy, pair = float(max_entropies[head]), pairs[head]
        if fit:
            share, n = max(fit)
            mark = "≥" if float(highs[n][head]) - share > 0.005 else ""
            share, text, sentence = _describe(rules[n], share, mark, rows, head, counts, keys)
            out.append(HeadDescription(rules[n].name, share, text, sentence, mean_entropy, max_entropy, pair))
        elif pair is None:
            text, sentence = "attends to nothing", "Attends to nothing in this text."
            out.append(HeadDescription("none", 0.0, text, sentence, mean_entropy, max_entropy, None))
        elif max_entropy > 0 and mean_entropy is not None and mean_entropy >= _MIN_ENTROPY * max_entropy:
            text = f"broad (entropy {mean_entropy:.1f} of {max_entropy:.1f})"
            sentence = f"Attends broadly: the entropy is {mean_entropy:.2f} of at most {max_entropy:.2f} nats."
            share = mean_entropy / max_entropy
            out.append(HeadDescription("wide", share, text, sentence, mean_entropy, max_entropy, pair))
        else:
            link = f"{isolate(queries[pair.query].text)} → {isolate(keys[pair.key].text)}"
            text = f"{link} {pair.weight:.2f}"
            sentence = f"No dominant pattern. Strongest link: {link} ({pair.weight:.2f})."
            out.append(HeadDescription("pair", pair.weight, text, sentence, mean_entropy, max_entropy, pair))
    return out


def _counted(rows: Rows, queries: Sequence[Reading]) -> Tensor:
    """Return (L,) bool: the queries that count. One with a single key to attend has no choice, and shows no pattern."""
    choice = rows.allowed > 1
    words = torch.tensor([not reading.marker for reading in queries], dtype=torch.bool)
    if bool((words & choice).any()):
        return words & choice
    return choice if bool(choice.any()) else torch.ones_like(choice)


def _attendable(rows: Rows) -> Tensor:
    """Return (H,L): the number of keys that a query may attend, as far as known. Padding is never listed, so complete
    rows give the exact number.
    """
    return torch.where(rows.complete, rows.listed.sum(-1), rows.allowed)


def _smallest(rows: Rows) -> Tensor:
    """Return (H,L): the smallest recorded weight of each row."""
    return rows.weights.masked_fill(~rows.listed, float("inf")).amin(-1).nan_to_num(posinf=0.0)


def _patterns(record: RecordLike, rows: Rows, sides: Sides, keys: Sequence[Reading]) -> list[_Pattern]:
    allowed, at = rows.allowed, rows.keys.clamp(min=0)
    uniform = 1 / _attendable(rows).amax(0).clamp(min=1)
    present = torch.zeros(len(keys), dtype=torch.bool)  # padding is never a target
    present[rows.keys[rows.listed]] = True
    if not bool(rows.complete.all()):
        present[: int(allowed[~rows.complete.all(0)].max())] = True
    rules: list[_Pattern] = []

    def add_group(pattern: str, member: Tensor) -> None:
        """Add a pattern whose targets are the keys `member` (S,) bool, for every query."""
        member = member & present
        total = torch.cat([torch.zeros(1, dtype=torch.long), member.long().cumsum(0)])[allowed]
        rules.append(_Pattern(pattern, member[at] & rows.listed, total, total * uniform))

    def add_target(pattern: str, target: Tensor) -> None:
        """Add a pattern with one target per query (L,) int64, out of range for none."""
        exists = (target >= 0) & (target < allowed)
        rules.append(_Pattern(pattern, (rows.keys == target[:, None]) & rows.listed, exists.long(), exists * uniform))

    size = len(keys)
    markers = torch.tensor([reading.marker for reading in keys], dtype=torch.bool)
    several = bool(markers[1:].any())
    if several:
        add_group("separator", markers)
    add_group("separator" if several and keys[0].marker else "first", torch.arange(size) == 0)
    add_group("punctuation", torch.tensor([is_punctuation(r.text) and not r.marker for r in keys], dtype=torch.bool))
    if record.kind != "cross":
        own = torch.arange(record.queries) + rows.offset
        add_target("previous", own - 1)
        add_target("itself", own)
        add_target("next", own + 1)
        names = {text: n for n, text in enumerate(dict.fromkeys(r.text.lower() for r in keys))}
        name = torch.tensor([names[r.text.lower()] for r in keys])
        times = torch.tensor([0 if r.marker or is_punctuation(r.text) else 1 for r in keys])
        _repeats(rules, rows, name, times, own)
    return rules


def _repeats(rules: list[_Pattern], rows: Rows, name: Tensor, counts: Tensor, own: Tensor) -> None:
    """Add the patterns of repeated words: the same word elsewhere, and what followed an earlier occurrence (induction)."""
    at, occurrences = rows.keys.clamp(min=0), Counter[int]()
    others, earlier = [], []
    total = Counter(int(n) for n, c in zip(name, counts, strict=True) if c)
    for n, c in zip(name.tolist(), counts.tolist(), strict=True):
        earlier.append(occurrences[n] if c else 0)
        others.append(total[n] - 1 if c else 0)
        occurrences[n] += c
    causal = bool((rows.allowed < len(name)).any())
    elsewhere = torch.tensor(earlier if causal else others)[own]
    before = torch.tensor(earlier)[own]
    enough = max(4, len(own) // 4)  # fewer repetitions may be accidental
    uniform = 1 / _attendable(rows).amax(0).clamp(min=1)
    if int((elsewhere > 0).sum()) >= enough:
        hit = (name[at] == name[own][:, None]) & (at != own[:, None]) & rows.listed
        rules.append(_Pattern("same", hit & (elsewhere > 0)[:, None], elsewhere, elsewhere * uniform))
    if int((before > 0).sum()) >= enough:
        prior = (at - 1).clamp(min=0)
        hit = (name[prior] == name[own][:, None]) & (at > 0) & (prior < own[:, None]) & rows.listed
        rules.append(_Pattern("induction", hit & (before > 0)[:, None], before, before * uniform))


def _fits(share: float, rule: _Pattern, counts: Tensor) -> bool:
    counted = counts & (rule.targets > 0)
    if math.isnan(share) or not bool(counted.any()):  # no query has a target
        return False
    if int(counted.sum()) < 0.25 * int(counts.sum()):
        return False
    chance = float(rule.chance[counted].mean())
    return share >= max(_MIN_SHARE, min(0.9, _MIN_RATIO * chance))


def _describe(
    rule: _Pattern, share: float, mark: str, rows: Rows, head: int, counts: Tensor, keys: Sequence[Reading]
) -> tuple[float, str, str]:
    """Return the share, the text and the sentence of a pattern. Markers and punctuation are called by their own names."""
    name, target = HABITS[rule.name][1], _TARGETS.get(rule.name)
    if rule.name == "first" and keys[0].marker:
        name = target = keys[0].text
    elif rule.name in ("separator", "punctuation"):
        name, fraction = _group_name(rule, rows, head, counts, keys)
        share *= fraction
    how = "mainly " if share >= 0.7 else "partly "
    least = "at least " if mark else ""
    return share, f"{name} {mark}{share:.2f}", f"Attends {how}to {target or name}: {least}{share:.2f} of its attention."


def _group_name(rule: _Pattern, rows: Rows, head: int, counts: Tensor, keys: Sequence[Reading]) -> tuple[str, float]:
    """Return the name of a group of keys, or of the token with most of its weight, and the fraction that the name covers."""
    weights = (rows.weights[head] * rule.hit[head])[counts].flatten()
    per_key = torch.zeros(len(keys)).scatter_add_(0, rows.keys[head][counts].clamp(min=0).flatten(), weights)
    by_name: dict[str, float] = {}
    for key, weight in enumerate(per_key.tolist()):
        if weight > 0:
            by_name[keys[key].text] = by_name.get(keys[key].text, 0.0) + weight
    ranked, total = sorted(by_name.items(), key=lambda item: -item[1]), sum(by_name.values())
    template = "“{}”" if rule.name == "punctuation" else "{}"
    if ranked[0][1] >= 0.8 * total:
        return template.format(isolate(ranked[0][0])), ranked[0][1] / total
    if len(by_name) == 2:
        first, second = (template.format(isolate(name)) for name, _ in ranked[:2])
        return f"{first} and {second}", 1.0
    return HABITS[rule.name][1], 1.0


def _strongest(
    rows: Rows, head: int, record: RecordLike, queries: Sequence[Reading], are_words: Sequence[Tensor]
) -> StrongestPair | None:
    """Return the strongest link of a head: between two different words, unless another one is far stronger.

    `are_words` are the masks of the queries (L,) and the keys (S,) that are words.
    """
    weights, at, listed = rows.weights[head], rows.keys[head], rows.listed[head]
    word_queries, word_keys = are_words[0] & (rows.allowed > 1), are_words[1]
    words = word_queries[:, None] & word_keys[at.clamp(min=0)] & listed
    if record.kind != "cross":
        words &= at != (torch.arange(record.queries) + rows.offset)[:, None]
    largest = float(weights.max())
    if largest <= 0:
        return None
    candidates = weights.masked_fill(~words, -1.0)
    if float(candidates.max()) < _MIN_LINK * largest:
        unmarked = torch.tensor([not r.marker for r in queries])[:, None] & listed
        candidates = weights.masked_fill(~(unmarked if bool((weights * unmarked > 0).any()) else listed), -1.0)
    row, entry = divmod(int(candidates.argmax()), candidates.shape[1])
    return StrongestPair(row, int(at[row, entry]), float(candidates[row, entry]))
