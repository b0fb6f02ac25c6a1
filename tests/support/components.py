"""Random components, each as an object of the library and as a function of the oracle.

Components come from the tables of the library. A score that the oracle does not implement is computed by its `pair`,
one query vector and one key vector at a time; a new mask, normalizer or bias has to be added to the oracle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from support import oracle
from torch import Tensor

import regard
from regard.components.mask import _MASKS
from regard.components.normalizer import _NORMALIZERS
from regard.components.position import _BIASES
from regard.components.score import _SCORES

Tensors = dict[str, Tensor]


@dataclass
class Draw:
    """The source of choices and random tensors, and the sizes of the problem. D is the width of q, K that of k."""

    pick: Callable[[str, Sequence[Any]], Any]
    generator: torch.Generator
    B: int
    H: int
    G: int
    L: int
    S: int
    D: int
    dtype: torch.dtype  # of parameters
    K: int = field(init=False)
    align: Any = field(init=False)

    def __post_init__(self) -> None:
        self.K = self.D
        self.align = self.pick("align", ("start", "end", 2, -3))

    def randn(self, *shape: int) -> Tensor:
        """Return standard normal numbers that float32 represents exactly, in float64."""
        return torch.randn(shape, generator=self.generator).double()

    def parameter(self, *shape: int, size: float = 1.0) -> Tensor:
        return (self.randn(*shape) * size).float().to(self.dtype)

    def positive(self, *shape: int) -> Tensor:
        """Return uniform random numbers from 0.5 to 1.5."""
        return (torch.rand(shape, generator=self.generator) + 0.5).to(self.dtype)

    def flags(self, *shape: int, chance: float = 0.5) -> Tensor:
        return torch.rand(shape, generator=self.generator) < chance

    def integers(self, stop: int, *shape: int) -> Tensor:
        """Return random integers from 0 to stop - 1."""
        return torch.randint(max(stop, 1), shape, generator=self.generator)

    def integer(self, stop: int) -> int:
        return int(self.integers(stop, 1))

    def per_head(self, label: str, number: float, make: Callable[..., Tensor]) -> float | Tensor:
        """Return a number, or a tensor of shape () or (H,)."""
        form = self.pick(label, ("number", "one", "per head"))
        return number if form == "number" else make() if form == "one" else make(self.H)


@dataclass
class Part:
    """A component: its tensors, and functions that build the object of the library and that of the oracle from them."""

    tensors: Tensors
    component: Callable[[Tensors], Any]
    oracle: Callable[[Tensors], Any]
    sink: Callable[[Tensors], Any] = lambda tensors: None
    alpha: float | None = None


def _part(
    role: str, kind: type[Any], reference: Callable[[dict[str, Any]], Any], fields: dict[str, Any], **rest: Any
) -> Part:
    """Return a component with these fields; tensors among them are parameters."""
    tensors = {f"{role}.{name}": x for name, x in fields.items() if isinstance(x, Tensor)}

    def now(tensors: Tensors) -> dict[str, Any]:
        return {name: tensors.get(f"{role}.{name}", x) for name, x in fields.items()}

    return Part(tensors, lambda tensors: kind(**now(tensors)), lambda tensors: reference(now(tensors)), **rest)


# ---------------------------------------------------------------------------------------------------------------------
# Scores.

_PYTHON = ("lambda", "closure", "outside", "module")


def scores_without_oracle() -> list[str]:
    """Return the scores of the library that the oracle does not implement."""
    return [name for name in _SCORES if name not in oracle.SCORES]


def score_names() -> list[str]:
    return [*_SCORES, *_PYTHON]


def draw_score(name: str, draw: Draw) -> Part:
    if name in _PYTHON:
        return _python(name, draw)
    if name not in oracle.SCORES:
        with torch.random.fork_rng():
            torch.manual_seed(draw.integer(1000))
            example = _SCORES[name].example(draw.H, draw.D)
        fields = {f.name: _as_parameter(getattr(example, f.name), draw) for f in dataclasses.fields(example)}
        return _part("score", _SCORES[name], lambda now: oracle.one_by_one(_SCORES[name](**now).pair), fields)
    fields = {"bilinear": _bilinear, "additive": _additive}[name](draw) if name in ("bilinear", "additive") else {}
    if name in ("scaled_dot", "distance"):
        fields = {"scale": draw.pick("scale", (None, 0.3))}
    elif name == "cosine":
        fields = {"temperature": draw.per_head("temperature", 0.3, draw.positive)}
    elif name == "gaussian":
        fields = {"sigma": draw.per_head("sigma", 1.7, draw.positive)}
    exact, baseline = oracle.SCORES[name], oracle.AS_PRODUCT.get(name, oracle.SCORES[name])

    def reference(now: dict[str, Any]) -> oracle.Score:
        return lambda q, k, h, g: (exact if q.dtype == torch.float64 else baseline)(q, k, h, g, **now)

    return _part("score", _SCORES[name], reference, fields)


def _as_parameter(x: Any, draw: Draw) -> Any:
    return x.detach().to(draw.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _bilinear(draw: Draw) -> dict[str, Any]:
    draw.K = draw.pick("width of k", (draw.D, draw.D + 2))
    lead = draw.pick("W", ((), (draw.H,)))
    return {"W": draw.parameter(*lead, draw.D, draw.K, size=draw.D**-0.5)}


def _additive(draw: Draw) -> dict[str, Any]:
    A, lead = draw.D, draw.pick("v", ((), (draw.H,)))
    maps = draw.pick("maps", ("none", "q", "k", "both"))
    q, k, bias = (draw.pick(n, ("one", "per head")) == "per head" for n in ("w_q", "w_k", "bias of the score"))
    if maps == "both":
        A, draw.K = draw.D + 2, draw.D + 1
    elif maps == "q":
        A = draw.K = draw.D + 1
    elif maps == "k":
        draw.K = draw.D + 1
    fields: dict[str, Any] = {"v": draw.parameter(*lead, A)}
    if maps in ("q", "both"):
        fields["w_q"] = draw.parameter(*((draw.H,) if q else ()), A, draw.D, size=draw.D**-0.5)
    if maps in ("k", "both"):
        fields["w_k"] = draw.parameter(*((draw.G,) if k else ()), A, draw.K, size=draw.K**-0.5)
    if draw.pick("additive bias", (True, False)):
        fields["bias"] = draw.parameter(*((draw.H,) if bias else ()), A)
    return fields


def _python(name: str, draw: Draw) -> Part:
    """Scores written by a user; in `outside`, the weight is the result of a computation."""
    if name == "lambda":
        return Part(
            {},
            lambda tensors: lambda q, k: torch.cos(q @ k.mT) * 2,
            lambda tensors: lambda q, k, h, g: (q @ k.T).cos() * 2,
        )
    w = draw.parameter(draw.D, draw.D, size=draw.D**-0.5)

    def component(tensors: Tensors) -> Any:
        if name == "module":
            return _Map(tensors["score.w"])
        # Functions of the user convert half-precision parameters themselves.
        w = tensors["score.w"] if tensors["score.w"].dtype == torch.float64 else tensors["score.w"].float()
        w = w.sin() if name == "outside" else w
        return lambda q, k: torch.tanh(q @ w.to(q.dtype)) @ k.mT

    def reference(tensors: Tensors) -> Any:
        w = tensors["score.w"].sin() if name == "outside" else tensors["score.w"]
        return lambda q, k, h, g: torch.einsum("id,jd->ij", torch.einsum("ia,ad->id", q, w).tanh(), k)

    return Part({"score.w": w}, component, reference)


class _Map(torch.nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(q @ self.w.to(q.dtype)) @ k.mT


# ---------------------------------------------------------------------------------------------------------------------
# Normalizers.


def normalizer_names() -> list[str]:
    return list(_NORMALIZERS)


def draw_normalizer(name: str, draw: Draw) -> Part:
    fields: dict[str, Any] = {}
    if name == "softmax" and draw.pick("with a sink", (False, True)):
        fields = {"sink": draw.per_head("sink", 0.0, draw.parameter)}
    elif name == "sigmoid":
        fields = {"bias": draw.per_head("bias of the sigmoid", -2.0, draw.parameter)}
    elif name == "entmax":
        fields = {"alpha": draw.pick("alpha", (1.5, 1.2, 1.8, 2.0))}
    reference = oracle.NORMALIZERS[name]
    part = _part("normalizer", _NORMALIZERS[name], lambda now: lambda s, h: reference(s, h, **now), fields)
    part.sink = lambda tensors: tensors.get("normalizer.sink", fields.get("sink"))
    part.alpha = 2.0 if name == "sparsemax" else fields.get("alpha")
    return part


# ---------------------------------------------------------------------------------------------------------------------
# Biases.


def bias_names() -> list[str]:
    return list(_BIASES)


def draw_bias(name: str | None, draw: Draw) -> Part:
    if name is None:
        return Part({}, lambda tensors: None, lambda tensors: None)
    if name == "tensor":
        keep = draw.pick("axes of the bias", ("BHLS", "HLS", "LS", "S", "L", "BS", "HL", ""))
        shape = [n if axis in keep else 1 for axis, n in zip("BHLS", (draw.B, draw.H, draw.L, draw.S), strict=True)]
        bias = draw.parameter(
            *shape[draw.pick("leading axes left out", (0, 4 - len(keep) if "BHLS".endswith(keep) else 0)) :]
        )
        if draw.pick("bias of -inf", (False, True)):
            bias = bias.masked_fill(draw.flags(*bias.shape, chance=0.3), -torch.inf)
        return Part({"bias": bias}, lambda tensors: tensors["bias"], lambda tensors: tensors["bias"])
    steps = oracle.behind(draw.L, draw.S, draw.align)
    fields: dict[str, Any] = {"align": draw.align}
    if name == "alibi":
        if draw.pick("slopes", ("paper", "learned")) == "learned":
            fields["slopes"] = draw.positive(draw.H)
        return _part(
            "bias",
            _BIASES[name],
            lambda now: lambda like: oracle.alibi(draw.H, steps, now.get("slopes"), like),
            fields,
        )
    assert name == "t5", f"the oracle does not implement the bias {name!r}"
    fields["bidirectional"] = draw.pick("bidirectional", (True, False))
    fields["table"] = draw.parameter(draw.pick("buckets", (8, 32, 6)), draw.H)
    fields["max_distance"] = draw.pick("max_distance", (128, 20))
    arguments = {"bidirectional": fields["bidirectional"], "max_distance": fields["max_distance"]}
    return _part("bias", _BIASES[name], lambda now: lambda like: oracle.t5(steps, now["table"], **arguments), fields)


# ---------------------------------------------------------------------------------------------------------------------
# Masks, each with a predicate on index tensors (batch, head, query, key).

# a, b and c are masks; None stands for no mask.
_JOINS = (None, "a", "a & b", "a | b", "~a", "a & ~b", "(a | b) & c", "~(a & b) | c", "a & b & c")


def draw_mask(draw: Draw) -> tuple[Any, Tensor]:
    """Return a mask or None, and the pairs that may attend, bool (B, H, L, S)."""
    ranges = zip(
        (draw.B, draw.H, draw.L, draw.S),
        ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1)),
        strict=True,
    )
    index = [torch.arange(n).view(shape) for n, shape in ranges]
    join = draw.pick("mask", _JOINS)
    if join is None:
        return None, torch.ones(draw.B, draw.H, draw.L, draw.S, dtype=torch.bool)
    named: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    for letter in "abc":
        if letter in join:
            mask, predicate = _mask(draw.pick(f"mask {letter}", tuple(_MASKS)), draw, "&" in join)
            named[letter], tables[letter] = mask, predicate(*index)
    # The same expression, evaluated by the operators of masks and by those of bool tensors.
    return eval(join, named), eval(join, tables).expand(draw.B, draw.H, draw.L, draw.S)


def _align(draw: Draw, is_joined: bool) -> tuple[Any, Callable[[Tensor, Tensor], Any]]:
    """Return an alignment, and the position of query i of batch row b."""
    how = draw.pick("aligned by", ("problem", "row", "query"))
    if how == "problem":
        first = {"start": 0, "end": draw.S - draw.L}.get(draw.align, draw.align)
        # Beside lengths or documents, "end" is refused: it could be that of each of them.
        return (first if is_joined and draw.align == "end" else draw.align), lambda b, i: i + first
    if how == "row":
        starts = draw.integers(draw.S + 6, draw.B) - 3
        return starts, lambda b, i: i + starts[b]
    positions = draw.integers(draw.S + 6, draw.pick("batch of positions", (1, draw.B)), draw.L) - 3
    positions = positions.sort(-1).values if draw.pick("positions in order", (True, False)) else positions
    if draw.L == 1:  # then it is that of query 0
        return positions, lambda b, i: positions.expand(draw.B, 1)[b, 0 * i]
    return positions, lambda b, i: positions.expand(draw.B, -1)[b, i]


def _mask(name: str, draw: Draw, is_joined: bool) -> tuple[Any, Callable[..., Tensor]]:
    mask = regard.mask
    if name == "causal":
        align, at = _align(draw, is_joined)
        return mask.causal(align), lambda b, h, i, j: j <= at(b, i)
    if name == "window":
        left, right = draw.pick("left", (None, 0, 5, 70)), draw.pick("right", (None, 0, 3, 66))
        far = 10**6
        align, at = _align(draw, is_joined)
        return (
            mask.window(left, right, align),
            lambda b, h, i, j: (
                (j >= at(b, i) - (far if left is None else left)) & (j <= at(b, i) + (far if right is None else right))
            ),
        )
    if name == "packed":
        count = draw.integer(4) + 1
        ids_q, ids_k = (draw.integers(count, 1, n).sort(-1).values[0] for n in (draw.L, draw.S))
        offsets = [
            torch.cat([torch.zeros(1, dtype=torch.int32), torch.bincount(ids, minlength=count).cumsum(0).int()])
            for ids in (ids_q, ids_k)
        ]
        return mask.packed(*offsets), lambda b, h, i, j: ids_q[i] == ids_k[j]
    if name == "lengths":
        n = draw.integers(draw.S + 1, draw.B)
        return mask.lengths(n), lambda b, h, i, j: j < n[b]
    if name == "prefix":
        n = draw.integers(draw.S + 1, draw.pick("prefixes", (1, draw.B)))
        return mask.prefix(int(n) if len(n) == 1 else n), lambda b, h, i, j: j < n.expand(draw.B)[b]
    if name == "documents":
        return _documents(draw)
    if name == "blocks":
        return _blocks(draw)
    if name == "dense":
        keep = draw.pick("axes of the dense mask", ("BHLS", "HLS", "LS", "BS", "S", "L"))
        shape = [n if axis in keep else 1 for axis, n in zip("BHLS", (draw.B, draw.H, draw.L, draw.S), strict=True)]
        table = draw.flags(*shape, chance=draw.pick("density", (0.5, 0.03, 0.97)))
        shorter = table[0, 0] if keep in ("LS", "S", "L") else table
        return mask.dense(shorter), lambda b, h, i, j: table
    assert name == "where", f"{name} has to be added to the oracle"
    step = draw.integer(5) + 2
    return mask.where(lambda b, h, i, j: (i + j + h + b) % step > 0), lambda b, h, i, j: (b + h + i + j) % step != 0


def _documents(draw: Draw) -> tuple[Any, Callable[..., Tensor]]:
    batch = draw.pick("batch of the documents", (1, draw.B))
    ids_q, ids_k = (draw.integers(4, batch, n) for n in (draw.L, draw.S))
    if draw.pick("documents in order", (True, False)):
        ids_q, ids_k = ids_q.sort(-1).values, ids_k.sort(-1).values
    ids: Any = (ids_q, ids_k)
    if draw.L == draw.S and draw.pick("one list of documents", (True, False)):
        ids = ids_q = ids_k = ids_k
        ids = ids if batch > 1 else ids[0]
    return regard.mask.documents(
        ids
    ), lambda b, h, i, j: ids_q.expand(draw.B, -1)[b, i] == ids_k.expand(draw.B, -1)[b, j]


def _blocks(draw: Draw) -> tuple[Any, Callable[..., Tensor]]:
    size = draw.pick("blocks of", (None, 16, (3, 64), (70, 1)))
    rows, columns = size if isinstance(size, tuple) else (size, size)
    if size is None:
        count = (min(draw.L, 3), min(draw.S, 4))
        rows, columns = -(-draw.L // count[0]), -(-draw.S // count[1])
    count = (-(-draw.L // rows), -(-draw.S // columns))
    lead = draw.pick("axes of the blocks", ((), (draw.H,), (draw.B, draw.H), (1, draw.H), (draw.B, 1)))
    table = draw.flags(*lead, *count)
    wide = table[(None,) * (4 - table.dim())].expand(draw.B, draw.H, -1, -1)
    return regard.mask.blocks(table, size), lambda b, h, i, j: wide[b, h, i // rows, j // columns]
