"""A head in a few words: the habit that most of its attention follows, or else its strongest link.
 A habit is a rule that picks target keys for a query: the token before, itself, the separators. Its share is the weight
that falls on the targets, averaged over the queries that have one; markers such as [CLS] do not count as queries, since
what they look at says little of the words. Where the recorded top-k may miss a target, the share is a lower bound and
is written with "≥".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.view.record import Record, Rows, Sides
from regard.view.token import Reading, is_punctuation, read

HABITS = {  # pattern: its sign in the views, and what it is called there
    "previous": ("←", "previous token"),
    "next": ("→", "next token"),
    "itself": ("↺", "itself"),
    "first": ("⇤", "first token"),
    "separator": ("▪", "special tokens"),
    "punctuation": ("¶", "punctuation"),
    "same": ("=", "same word elsewhere"),
    "induction": ("⤳", "after an earlier copy"),
    "wide": ("≈", "spread wide"),
    "pair": ("∙", "no single habit"),
    "none": ("∅", "attends to nothing"),
}

_PLACES = {  # a habit that follows the words, as a sentence calls its target
    "previous": "the previous token",
    "next": "the next token",
    "itself": "the token itself",
    "first": "the first token",
    "same": "the same word elsewhere",
    "induction": "what followed an earlier copy of the token",
}
_LEAST = 0.4  # a habit holds at least this share of the weight ...
_CHANCE = 1.8  # ... and this many times what an even spread would give it
_FAINT = 0.2  # a link between words is told where it has this part of the strongest link of all
_WIDE = 0.85  # spread wide: entropy at least this part of the greatest possible


@dataclass(frozen=True)
class Pair:
    """A query, a key (positions in their own texts), and the weight between them."""

    query: int
    key: int
    weight: float


@dataclass(frozen=True)
class Brief:
    """What one head does, in a few words and in a sentence; `room` is the greatest entropy possible, both in nats."""

    pattern: str
    share: float
    words: str
    sentence: str
    entropy: float | None
    room: float
    pair: Pair | None

    @property
    def sign(self) -> str:
        return HABITS[self.pattern][0]

    @property
    def telling(self) -> float:
        """How much the brief tells of the text, 0 to 1: a sharp link or a local habit much, a resting place little."""
        if self.pattern in ("previous", "next", "induction", "same"):
            return self.share
        if self.pattern == "pair" and self.pair is not None:
            return 0.9 * self.pair.weight
        return 0.3 * self.share


@dataclass(frozen=True)
class _Habit:
    pattern: str
    hit: Tensor  # (H,L,k) bool: the recorded key is a target
    targets: Tensor  # (L,) how many targets the query may attend
    chance: Tensor  # (L,) the share of an even spread


def briefs(record: Record, rows: Rows, sides: Sides) -> list[Brief]:
    """The brief of every head of one record, in order."""
    queries, keys = read(sides.queries), read(sides.keys)
    asking = _asking(rows, queries)
    habits = _habits(record, rows, sides, keys)
    slack = torch.minimum(_least(rows), rows.rest)  # (H,L) no unrecorded key can weigh more
    slack = slack.masked_fill(rows.complete, 0.0)
    shares, highs = [], []
    for habit in habits:
        counted = asking & (habit.targets > 0)
        low = (rows.weights * habit.hit).sum(-1)
        missing = habit.targets - habit.hit.sum(-1)
        high = low + torch.minimum(missing * slack, rows.rest)
        shares.append(low[:, counted].mean(-1))
        highs.append(high[:, counted].mean(-1))
    entropy = None if rows.entropy is None else rows.entropy[:, asking].mean(-1)
    rooms = _reach(rows)[:, asking].clamp(min=1).float().log().mean(-1)
    are_words = [torch.tensor([not r.marker and not is_punctuation(r.text) for r in side]) for side in (queries, keys)]
    pairs = [_strongest(rows, head, record, queries, are_words) for head in range(record.heads)]
    out = []
    for head in range(record.heads):
        held = [float(share[head]) for share in shares]
        fit = [(held[n], n) for n, habit in enumerate(habits) if _fits(held[n], habit, asking)]
        spread = None if entropy is None else float(entropy[head])
        room, pair = float(rooms[head]), pairs[head]
        if fit:
            share, n = max(fit)
            mark = "≥" if float(highs[n][head]) - share > 0.005 else ""
            share, words, sentence = _told(habits[n], share, mark, rows, head, asking, keys)
            out.append(Brief(habits[n].pattern, share, words, sentence, spread, room, pair))
        elif pair is None:
            out.append(Brief("none", 0.0, "attends to nothing", "Attends to nothing in this text.", spread, room, None))
        elif room > 0 and spread is not None and spread >= _WIDE * room:
            words = f"spread wide (entropy {spread:.1f} of {room:.1f})"
            sentence = f"Spreads its attention wide: an entropy of {spread:.2f} nats, of {room:.2f} at most."
            out.append(Brief("wide", spread / room, words, sentence, spread, room, pair))
        else:
            link = f"{queries[pair.query].text} → {keys[pair.key].text}"
            sentence = f"Follows no single habit; its strongest link is {link}, {pair.weight:.2f}."
            out.append(Brief("pair", pair.weight, f"{link} {pair.weight:.2f}", sentence, spread, room, pair))
    return out


def _asking(rows: Rows, queries: Sequence[Reading]) -> Tensor:
    """(L,) bool: the queries that count. One that may attend a single key has no choice, so shows no habit."""
    choice = rows.allowed > 1
    words = torch.tensor([not reading.marker for reading in queries], dtype=torch.bool)
    if bool((words & choice).any()):
        return words & choice
    return choice if bool(choice.any()) else torch.ones_like(choice)


def _reach(rows: Rows) -> Tensor:
    """(H,L) how many keys a query may attend, as far as is known. Padding is not listed, so a complete row tells."""
    return torch.where(rows.complete, rows.listed.sum(-1), rows.allowed)


def _least(rows: Rows) -> Tensor:
    """(H,L) the smallest recorded weight."""
    return rows.weights.masked_fill(~rows.listed, float("inf")).amin(-1).nan_to_num(posinf=0.0)


def _habits(record: Record, rows: Rows, sides: Sides, keys: Sequence[Reading]) -> list[_Habit]:
    allowed, at = rows.allowed, rows.keys.clamp(min=0)
    even = 1 / _reach(rows).amax(0).clamp(min=1)
    present = torch.zeros(len(keys), dtype=torch.bool)  # padding, which no query may attend, is no target
    present[rows.keys[rows.listed]] = True
    if not bool(rows.complete.all()):
        present[: int(allowed[~rows.complete.all(0)].max())] = True
    habits: list[_Habit] = []

    def group(pattern: str, member: Tensor) -> None:  # (S,) bool: these keys, for every query
        member = member & present
        total = torch.cat([torch.zeros(1, dtype=torch.long), member.long().cumsum(0)])[allowed]
        habits.append(_Habit(pattern, member[at] & rows.listed, total, total * even))

    def place(pattern: str, target: Tensor) -> None:  # (L,) long: one key a query, out of range for none
        there = (target >= 0) & (target < allowed)
        habits.append(_Habit(pattern, (rows.keys == target[:, None]) & rows.listed, there.long(), there * even))

    size = len(keys)
    markers = torch.tensor([reading.marker for reading in keys], dtype=torch.bool)
    several = bool(markers[1:].any())
    if several:
        group("separator", markers)
    group("separator" if several and keys[0].marker else "first", torch.arange(size) == 0)
    group("punctuation", torch.tensor([is_punctuation(r.text) and not r.marker for r in keys], dtype=torch.bool))
    if record.kind != "cross":
        own = torch.arange(record.queries) + rows.offset
        place("previous", own - 1)
        place("itself", own)
        place("next", own + 1)
        names = {text: n for n, text in enumerate(dict.fromkeys(r.text.lower() for r in keys))}
        name = torch.tensor([names[r.text.lower()] for r in keys])
        times = torch.tensor([0 if r.marker or is_punctuation(r.text) else 1 for r in keys])
        _repeats(habits, rows, name, times, own)
    return habits


def _repeats(habits: list[_Habit], rows: Rows, name: Tensor, counts: Tensor, own: Tensor) -> None:
    """Add the habits of text that repeats itself: the same word elsewhere, and what followed an earlier copy."""
    at, seen = rows.keys.clamp(min=0), Counter[int]()
    others, earlier = [], []
    total = Counter(int(n) for n, c in zip(name, counts, strict=True) if c)
    for n, c in zip(name.tolist(), counts.tolist(), strict=True):
        earlier.append(seen[n] if c else 0)
        others.append(total[n] - 1 if c else 0)
        seen[n] += c
    causal = bool((rows.allowed < len(name)).any())
    elsewhere = torch.tensor(earlier if causal else others)[own]
    before = torch.tensor(earlier)[own]
    enough = max(4, len(own) // 4)  # fewer repeats would be an accident, not a habit
    even = 1 / _reach(rows).amax(0).clamp(min=1)
    if int((elsewhere > 0).sum()) >= enough:
        hit = (name[at] == name[own][:, None]) & (at != own[:, None]) & rows.listed
        habits.append(_Habit("same", hit & (elsewhere > 0)[:, None], elsewhere, elsewhere * even))
    if int((before > 0).sum()) >= enough:
        prior = (at - 1).clamp(min=0)
        hit = (name[prior] == name[own][:, None]) & (at > 0) & (prior < own[:, None]) & rows.listed
        habits.append(_Habit("induction", hit & (before > 0)[:, None], before, before * even))


def _fits(share: float, habit: _Habit, asking: Tensor) -> bool:
    counted = asking & (habit.targets > 0)
    if math.isnan(share) or not bool(counted.any()):  # no query has a target
        return False
    if int(counted.sum()) < 0.25 * int(asking.sum()):
        return False
    chance = float(habit.chance[counted].mean())
    return share >= max(_LEAST, min(0.9, _CHANCE * chance))


def _told(
    habit: _Habit, share: float, mark: str, rows: Rows, head: int, asking: Tensor, keys: Sequence[Reading]
) -> tuple[float, str, str]:
    """The share, the words and the sentence of a habit. Markers and punctuation are called by their own names."""
    what, place = HABITS[habit.pattern][1], _PLACES.get(habit.pattern)
    if habit.pattern == "first" and keys[0].marker:
        what = place = keys[0].text
    elif habit.pattern in ("separator", "punctuation"):
        what, part = _names(habit, rows, head, asking, keys)
        share *= part
    verb = "Looks at" if place and share >= 0.7 else "Leans to" if place else "Rests on"
    least = "at least " if mark else ""
    return share, f"{what} {mark}{share:.2f}", f"{verb} {place or what}: {least}{share:.2f} of its attention."


def _names(habit: _Habit, rows: Rows, head: int, asking: Tensor, keys: Sequence[Reading]) -> tuple[str, float]:
    """What a group of keys is called, and the part of its share that the name covers: one token where it takes most."""
    weights = (rows.weights[head] * habit.hit[head])[asking].flatten()
    per_key = torch.zeros(len(keys)).scatter_add_(0, rows.keys[head][asking].clamp(min=0).flatten(), weights)
    by_name: dict[str, float] = {}
    for key, weight in enumerate(per_key.tolist()):
        if weight > 0:
            by_name[keys[key].text] = by_name.get(keys[key].text, 0.0) + weight
    ranked, total = sorted(by_name.items(), key=lambda item: -item[1]), sum(by_name.values())
    name = "“{}”" if habit.pattern == "punctuation" else "{}"
    if ranked[0][1] >= 0.8 * total:
        return name.format(ranked[0][0]), ranked[0][1] / total
    if len(by_name) == 2:
        return f"{name.format(ranked[0][0])} and {name.format(ranked[1][0])}", 1.0
    return HABITS[habit.pattern][1], 1.0


def _strongest(
    rows: Rows, head: int, record: Record, queries: Sequence[Reading], are_words: Sequence[Tensor]
) -> Pair | None:
    """The strongest link of a head: between two different words, unless it is faint beside another. are_words: of the
    queries (L,) and the keys (S,), which are words.
    """
    weights, at, listed = rows.weights[head], rows.keys[head], rows.listed[head]
    asks, answers = are_words[0] & (rows.allowed > 1), are_words[1]
    words = asks[:, None] & answers[at.clamp(min=0)] & listed
    if record.kind != "cross":
        words &= at != (torch.arange(record.queries) + rows.offset)[:, None]
    most = float(weights.max())
    if most <= 0:
        return None
    found = weights.masked_fill(~words, -1.0)
    if float(found.max()) < _FAINT * most:
        said = torch.tensor([not r.marker for r in queries])[:, None] & listed
        found = weights.masked_fill(~(said if bool((weights * said > 0).any()) else listed), -1.0)
    row, entry = divmod(int(found.argmax()), found.shape[1])
    return Pair(row, int(at[row, entry]), float(found[row, entry]))
