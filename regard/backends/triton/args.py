"""Arguments of the Triton kernels, as named tuples. All kernels take the same ones.

A field that is None costs nothing: the compiler removes the code that would read it. Values that shape the code are
constants in `KernelConfig`. Lengths and numbers of heads are not among them, so that a new length compiles nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Matrix(NamedTuple):
    """A tensor (B, H, rows, width), by its pointer and strides; the last dimension is contiguous."""

    pointer: Any
    b: Any
    h: Any
    row: Any


class BroadcastTensor(NamedTuple):
    """A tensor that broadcasts to (B, H, L, S), by its pointer and strides: 0 for a dimension of size 1."""

    pointer: Any
    b: Any
    h: Any
    query: Any
    key: Any


class KernelSizes(NamedTuple):
    """Query heads, key/value heads, queries, keys."""

    H: Any
    G: Any
    L: Any
    S: Any


class ScoreArgs(NamedTuple):
    """Everything besides q and k that the scores and weights depend on.

    The kernels compute powers of 2. So `scale`, `softcap` and all terms that are added to the scores, except `bias`,
    come multiplied by log2(e).
    """

    scale: Any
    additive: Any  # AdditiveInputs of an additive score
    softcap: Any
    key_bias: Any  # (B, G, S)
    query_bias: Any  # (B, H, L)
    bias: Any  # BroadcastTensor
    alibi_slopes: Any  # (H,)
    alibi_offset: Any  # key position of query 0
    relative_bias: Any  # (H, L + S - 1 + 64), indexed by query - key + S - 1
    nonfinite_q: Any  # (B, H, L): which queries held NaN or inf, where these were cleared before
    nonfinite_k: Any  # (B, G, S): which keys or values did
    sink_or_bias: Any  # (H,): sink of a softmax, bias of a sigmoid
    seed: Any  # dropout seed, int64 of shape ()
    dropout_threshold: Any  # dropout probability times 2^32
    dropout_scale: Any  # 1 / (1 - dropout)
    # The indices for dropout of the first batch row, head, query and key.
    first_batch: Any
    first_head: Any
    first_query: Any
    first_key: Any


class TileLists(NamedTuple):
    """For each row of tiles, the tiles to visit: first the full ones, then the partial ones."""

    order: Any  # (B|1, R, C); None without a mask: all tiles are visited, and only the last one may be partial
    counts: Any  # (B|1, R, 2): full, partial
    batch_stride: Any  # 1 if each batch row has lists of its own, else 0
    rows: Any
    columns: Any
    mask_tensors: Any
    mask_integers: Any


class RowSums(NamedTuple):
    """log2 of the sum of each row (B, H, L), inf for an empty row, and the rounding error of that logarithm.

    The error is None where the weights have fewer digits than that.
    """

    log2_sum: Any
    residual: Any


class KernelConfig(NamedTuple):
    """What a kernel is compiled for."""

    D: Any
    E: Any
    D_padded: Any  # width of the tiles of q and k: a power of 2
    E_padded: Any  # width of the tiles of v
    queries: Any  # rows per tile of queries
    keys: Any  # keys per tile
    heads_per_tile: Any  # query heads that share a tile, whose rows are then (query, head) pairs
    is_sigmoid: Any
    top: Any
    top_padded: Any
    num_literals: Any
    terms: Any  # of the mask: see `EncodedMask`
    is_scale_only: Any  # scores are raw scores times a positive scale
    has_exact_weights: Any  # weights keep more digits than the dtype of v has
    is_interpreted: Any


class KernelArgs(NamedTuple):
    """A plan as the kernels take it."""

    score: Any
    tiles: Any
    sizes: Any
    config: Any
