"""Random words of the vocabulary, each as the library spells it and as the oracle understands it.

They loop over the library's own tables. A score that the oracle does not know is scored by its `pair`, one query vector
and one key vector at a time; a normalizer or a bias that it does not know must first be taught to it.
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
from regard.components.normalizer import _NORMALIZERS
from regard.components.position import _BIASES
from regard.components.score import _SCORES

Tensors = dict[str, Tensor]


@dataclass
class Draw:
    """Where decisions and random numbers come from, and the sizes of the problem. D is the width of q, K that of k."""

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
        """Random numbers that float32 can hold, in float64."""
        return torch.randn(shape, generator=self.generator).double()

    def parameter(self, *shape: int, size: float = 1.0) -> Tensor:
        return (self.randn(*shape) * size).float().to(self.dtype)

    def positive(self, *shape: int) -> Tensor:
        """Random numbers from 0.5 to 1.5."""
        return (torch.rand(shape, generator=self.generator) + 0.5).to(self.dtype)

    def flags(self, *shape: int, chance: float = 0.5) -> Tensor:
        return torch.rand(shape, generator=self.generator) < chance

    def whole(self, stop: int, *shape: int) -> Tensor:
        """Random whole numbers from 0 to stop - 1."""
        return torch.randint(max(stop, 1), shape, generator=self.generator)

    def number(self, stop: int) -> int:
        return int(self.whole(stop, 1))

    def per_head(self, label: str, number: float, make: Callable[..., Tensor]) -> float | Tensor:
        """A number, or a tensor of shape () or (H,)."""
        form = self.pick(label, ("number", "one", "per head"))
        return number if form == "number" else make() if form == "one" else make(self.H)


@dataclass
class Part:
    """A word: its tensors, how the library spells it and what the oracle calls it, both with whichever tensors."""

    tensors: Tensors
    word: Callable[[Tensors], Any]
    plain: Callable[[Tensors], Any]
    sink: Callable[[Tensors], Any] = lambda own: None
    alpha: float | None = None


def _part(
    role: str, kind: type[Any], plain: Callable[[dict[str, Any]], Any], fields: dict[str, Any], **rest: Any
) -> Part:
    """A word with these fields: tensors among them are parameters."""
    tensors = {f"{role}.{name}": x for name, x in fields.items() if isinstance(x, Tensor)}

    def now(own: Tensors) -> dict[str, Any]:
        return {name: own.get(f"{role}.{name}", x) for name, x in fields.items()}

    return Part(tensors, lambda own: kind(**now(own)), lambda own: plain(now(own)), **rest)


# ---------------------------------------------------------------------------------------------------------------------
# Scores.

_PYTHON = ("lambda", "closure", "outside", "module")


def unknown() -> list[str]:
    """The scores of the library that the oracle does not know by name."""
    return [name for name in _SCORES if name not in oracle.SCORES]


def score_names() -> list[str]:
    return [*_SCORES, *_PYTHON]


def draw_score(name: str, on: Draw) -> Part:
    if name in _PYTHON:
        return _python(name, on)
    if name not in oracle.SCORES:
        with torch.random.fork_rng():
            torch.manual_seed(on.number(1000))
            word = _SCORES[name].example(on.H, on.D)
        fields = {f.name: _as_parameter(getattr(word, f.name), on) for f in dataclasses.fields(word)}
        return _part("score", _SCORES[name], lambda now: oracle.one_by_one(_SCORES[name](**now).pair), fields)
    fields = {"bilinear": _bilinear, "additive": _additive}[name](on) if name in ("bilinear", "additive") else {}
    if name in ("scaled_dot", "distance"):
        fields = {"scale": on.pick("scale", (None, 0.3))}
    elif name == "cosine":
        fields = {"temperature": on.per_head("temperature", 0.3, on.positive)}
    elif name == "gaussian":
        fields = {"sigma": on.per_head("sigma", 1.7, on.positive)}
    exact, straight = oracle.SCORES[name], oracle.AS_PRODUCT.get(name, oracle.SCORES[name])

    def plain(now: dict[str, Any]) -> oracle.Score:
        return lambda q, k, h, g: (exact if q.dtype == torch.float64 else straight)(q, k, h, g, **now)

    return _part("score", _SCORES[name], plain, fields)


def _as_parameter(x: Any, on: Draw) -> Any:
    return x.detach().to(on.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _bilinear(on: Draw) -> dict[str, Any]:
    on.K = on.pick("width of k", (on.D, on.D + 2))
    lead = on.pick("W", ((), (on.H,)))
    return {"W": on.parameter(*lead, on.D, on.K, size=on.D**-0.5)}


def _additive(on: Draw) -> dict[str, Any]:
    A, lead = on.D, on.pick("v", ((), (on.H,)))
    maps = on.pick("maps", ("none", "q", "k", "both"))
    q, k, bias = (on.pick(n, ("one", "per head")) == "per head" for n in ("w_q", "w_k", "bias of the score"))
    if maps == "both":
        A, on.K = on.D + 2, on.D + 1
    elif maps == "q":
        A = on.K = on.D + 1
    elif maps == "k":
        on.K = on.D + 1
    fields: dict[str, Any] = {"v": on.parameter(*lead, A)}
    if maps in ("q", "both"):
        fields["w_q"] = on.parameter(*((on.H,) if q else ()), A, on.D, size=on.D**-0.5)
    if maps in ("k", "both"):
        fields["w_k"] = on.parameter(*((on.G,) if k else ()), A, on.K, size=on.K**-0.5)
    if on.pick("additive bias", (True, False)):
        fields["bias"] = on.parameter(*((on.H,) if bias else ()), A)
    return fields


def _python(name: str, on: Draw) -> Part:
    """Scores that a user writes; in `outside`, the weight is the result of a computation."""
    if name == "lambda":
        return Part(
            {}, lambda own: lambda q, k: torch.cos(q @ k.mT) * 2, lambda own: lambda q, k, h, g: (q @ k.T).cos() * 2
        )
    w = on.parameter(on.D, on.D, size=on.D**-0.5)

    def word(own: Tensors) -> Any:
        if name == "module":
            return _Map(own["score.w"])
        # Its half-precision parameters are the user's to widen.
        w = own["score.w"] if own["score.w"].dtype == torch.float64 else own["score.w"].float()
        w = w.sin() if name == "outside" else w
        return lambda q, k: torch.tanh(q @ w.to(q.dtype)) @ k.mT

    def plain(own: Tensors) -> Any:
        w = own["score.w"].sin() if name == "outside" else own["score.w"]
        return lambda q, k, h, g: torch.einsum("id,jd->ij", torch.einsum("ia,ad->id", q, w).tanh(), k)

    return Part({"score.w": w}, word, plain)


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


def draw_normalizer(name: str, on: Draw) -> Part:
    fields: dict[str, Any] = {}
    if name == "softmax" and on.pick("with a sink", (False, True)):
        fields = {"sink": on.per_head("sink", 0.0, on.parameter)}
    elif name == "sigmoid":
        fields = {"bias": on.per_head("bias of the sigmoid", -2.0, on.parameter)}
    elif name == "entmax":
        fields = {"alpha": on.pick("alpha", (1.5, 1.2, 1.8, 2.0))}
    plain = oracle.NORMALIZERS[name]
    part = _part("normalizer", _NORMALIZERS[name], lambda now: lambda s, h: plain(s, h, **now), fields)
    part.sink = lambda own: own.get("normalizer.sink", fields.get("sink"))
    part.alpha = 2.0 if name == "sparsemax" else fields.get("alpha")
    return part


# ---------------------------------------------------------------------------------------------------------------------
# Biases.


def bias_names() -> list[str]:
    return list(_BIASES)


def draw_bias(name: str | None, on: Draw) -> Part:
    if name is None:
        return Part({}, lambda own: None, lambda own: None)
    if name == "tensor":
        keep = on.pick("axes of the bias", ("BHLS", "HLS", "LS", "S", "L", "BS", "HL", ""))
        shape = [n if axis in keep else 1 for axis, n in zip("BHLS", (on.B, on.H, on.L, on.S), strict=True)]
        bias = on.parameter(
            *shape[on.pick("leading axes left out", (0, 4 - len(keep) if "BHLS".endswith(keep) else 0)) :]
        )
        if on.pick("bias of -inf", (False, True)):
            bias = bias.masked_fill(on.flags(*bias.shape, chance=0.3), -torch.inf)
        return Part({"bias": bias}, lambda own: own["bias"], lambda own: own["bias"])
    steps = oracle.behind(on.L, on.S, on.align)
    fields: dict[str, Any] = {"align": on.align}
    if name == "alibi":
        if on.pick("slopes", ("of the paper", "learned")) == "learned":
            fields["slopes"] = on.positive(on.H)
        return _part(
            "bias", _BIASES[name], lambda now: lambda like: oracle.alibi(on.H, steps, now.get("slopes"), like), fields
        )
    assert name == "t5", f"the oracle does not know the bias {name!r} yet"
    fields["bidirectional"] = on.pick("bidirectional", (True, False))
    fields["table"] = on.parameter(on.pick("buckets", (8, 32, 6)), on.H)
    fields["max_distance"] = on.pick("max_distance", (128, 20))
    arguments = {"bidirectional": fields["bidirectional"], "max_distance": fields["max_distance"]}
    return _part("bias", _BIASES[name], lambda now: lambda like: oracle.t5(steps, now["table"], **arguments), fields)


# ---------------------------------------------------------------------------------------------------------------------
# Masks, each beside a predicate on index tensors (batch, head, query, key).

_MASKS = ("causal", "window", "lengths", "prefix", "documents", "blocks", "dense", "where")
# a, b and c are masks; the first joins none.
_JOINS = (None, "a", "a & b", "a | b", "~a", "a & ~b", "(a | b) & c", "~(a & b) | c", "a & b & c")


def draw_mask(on: Draw) -> tuple[Any, Tensor]:
    """A mask, or None, and who may attend to whom, (B, H, L, S)."""
    ranges = zip((on.B, on.H, on.L, on.S), ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1)), strict=True)
    index = [torch.arange(n).view(shape) for n, shape in ranges]
    join = on.pick("mask", _JOINS)
    if join is None:
        return None, torch.ones(on.B, on.H, on.L, on.S, dtype=torch.bool)
    named: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    for letter in "abc":
        if letter in join:
            mask, predicate = _mask(on.pick(f"mask {letter}", _MASKS), on)
            named[letter], tables[letter] = mask, predicate(*index)
    # The same expression, read once by the library's own operators and once by those of bool tensors.
    return eval(join, named), eval(join, tables).expand(on.B, on.H, on.L, on.S)


def _mask(name: str, on: Draw) -> tuple[Any, Callable[..., Tensor]]:
    first = oracle.behind(1, 1, 0)[0][0] + {"start": 0, "end": on.S - on.L}.get(on.align, on.align)
    mask = regard.mask
    if name == "causal":
        return mask.causal(on.align), lambda b, h, i, j: j <= i + first
    if name == "window":
        left, right = on.pick("left", (None, 0, 5, 70)), on.pick("right", (None, 0, 3, 66))
        far = 10**6
        return (
            mask.window(left, right, on.align),
            lambda b, h, i, j: (
                (j >= i + first - (far if left is None else left))
                & (j <= i + first + (far if right is None else right))
            ),
        )
    if name == "lengths":
        n = on.whole(on.S + 1, on.B)
        return mask.lengths(n), lambda b, h, i, j: j < n[b]
    if name == "prefix":
        n = on.whole(on.S + 1, on.pick("prefixes", (1, on.B)))
        return mask.prefix(int(n) if len(n) == 1 else n), lambda b, h, i, j: j < n.expand(on.B)[b]
    if name == "documents":
        return _documents(on)
    if name == "blocks":
        return _blocks(on)
    if name == "dense":
        keep = on.pick("axes of the dense mask", ("BHLS", "HLS", "LS", "BS", "S", "L"))
        shape = [n if axis in keep else 1 for axis, n in zip("BHLS", (on.B, on.H, on.L, on.S), strict=True)]
        table = on.flags(*shape, chance=on.pick("density", (0.5, 0.03, 0.97)))
        shorter = table[0, 0] if keep in ("LS", "S", "L") else table
        return mask.dense(shorter), lambda b, h, i, j: table
    step = on.number(5) + 2
    return mask.where(lambda b, h, i, j: (i + j + h + b) % step > 0), lambda b, h, i, j: (b + h + i + j) % step != 0


def _documents(on: Draw) -> tuple[Any, Callable[..., Tensor]]:
    batch = on.pick("batch of the documents", (1, on.B))
    ids_q, ids_k = (on.whole(4, batch, n) for n in (on.L, on.S))
    if on.pick("documents in order", (True, False)):
        ids_q, ids_k = ids_q.sort(-1).values, ids_k.sort(-1).values
    ids: Any = (ids_q, ids_k)
    if on.L == on.S and on.pick("one list of documents", (True, False)):
        ids = ids_q = ids_k = ids_k
        ids = ids if batch > 1 else ids[0]
    return regard.mask.documents(ids), lambda b, h, i, j: ids_q.expand(on.B, -1)[b, i] == ids_k.expand(on.B, -1)[b, j]


def _blocks(on: Draw) -> tuple[Any, Callable[..., Tensor]]:
    size = on.pick("blocks of", (None, 16, (3, 64), (70, 1)))
    rows, columns = size if isinstance(size, tuple) else (size, size)
    if size is None:
        count = (min(on.L, 3), min(on.S, 4))
        rows, columns = -(-on.L // count[0]), -(-on.S // count[1])
    count = (-(-on.L // rows), -(-on.S // columns))
    lead = on.pick("axes of the blocks", ((), (on.H,), (on.B, on.H), (1, on.H), (on.B, 1)))
    table = on.flags(*lead, *count)
    wide = table[(None,) * (4 - table.dim())].expand(on.B, on.H, -1, -1)
    return regard.mask.blocks(table, size), lambda b, h, i, j: wide[b, h, i // rows, j // columns]
