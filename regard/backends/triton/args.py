"""What the kernels of the GPU are told, in named tuples: each kernel takes the same ones.

A field that is None costs nothing, as the compiler leaves out what would read it. Numbers that shape the code are constants
in `Form`; lengths and heads are not among them: no compilation per length.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Matrix(NamedTuple):
    """A tensor (B, H, rows, width) by its pointer and strides; the last axis is contiguous."""

    pointer: Any
    b: Any
    h: Any
    row: Any


class Table(NamedTuple):
    """A tensor that broadcasts to (B, H, L, S), by its pointer and strides: 0 along an axis of size one."""

    pointer: Any
    b: Any
    h: Any
    query: Any
    key: Any


class Sizes(NamedTuple):
    """Query heads, key/value heads, queries, keys."""

    H: Any
    G: Any
    L: Any
    S: Any


class Words(NamedTuple):
    """What shapes the scores beside q and k. All numbers that are added to the scores, but those of `bias`, and the two
    factors come multiplied by log2 e: the kernels compute powers of two.
    """

    scale: Any
    turned: Any  # an additive score: see additive.py
    softcap: Any
    key_bias: Any  # (B, G, S)
    query_bias: Any  # (B, H, L)
    bias: Any  # Table
    slopes: Any  # (H,), of ALiBi
    offset: Any  # the key that query 0 stands at, for the slopes
    relative: Any  # (H, L + S - 1 + 64) of query - key + S - 1
    nonfinite_q: Any  # (B, H, L): queries that held NaN or inf, where those were cleared before
    nonfinite_k: Any  # (B, G, S): the same for keys and their values
    level: Any  # (H,): the sink of a softmax, the bias of a sigmoid
    seed: Any  # int64 of shape (), of dropout
    dropped: Any  # of 2^32, how many
    kept: Any  # 1 / (1 - dropout)


class Tiles(NamedTuple):
    """Which tiles a row of tiles holds: `full` of them at the start of its list, and then `partial` ones."""

    order: Any  # (B|1, R, C), None without a mask: all of them, and only the last one is partial, if at all
    counts: Any  # (B|1, R, 2)
    b: Any  # 1 where each batch row has its own
    rows: Any
    columns: Any
    pointers: Any  # the tensors of the mask
    numbers: Any  # and its numbers


class RowSums(NamedTuple):
    """The sum of each row (B, H, L) as log2, inf for one of nothing, and what its rounding took away: None where weights
    have fewer digits than that.
    """

    total: Any
    rest: Any


class Form(NamedTuple):
    """What a kernel is compiled for."""

    D: Any
    E: Any
    wide_d: Any  # the same, filled up to what a product takes
    wide_e: Any
    queries: Any  # of a tile
    keys: Any
    repeats: Any  # query heads that share a tile, whose rows are queries by heads
    sigmoid: Any
    top: Any
    wide_top: Any
    literals: Any
    terms: Any  # of the mask: see mask.py
    bare: Any  # nothing but the scale, which is more than 0, makes scores of products
    exact: Any  # weights keep more digits than the values have
    interpreted: Any  # on the CPU


class Told(NamedTuple):
    """All that a plan says: in the kernels, `call`."""

    words: Any
    tiles: Any
    sizes: Any
    form: Any
