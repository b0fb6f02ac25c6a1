"""Python functions as graphs: what a compiled or exported graph holds in place of a function of the user.

A compiler records the operations of a function for one tile, and what the function closes over. An operator then runs them
for each tile of a problem, in memory linear in length.
"""

from __future__ import annotations

import builtins
import json
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Numbers of queries and keys of a tile. The largest ones are worth a call of an operator of torch; scores, which may hold a
# vector per pair, are computed for fewer keys at a time.
ROWS, COLUMNS, COLUMNS_OF_VECTORS = (8, 64), (16, 64, 512), (16, 128)

# Where the functions of a graph may come from. Each is a function of tensors and numbers without effects.
_NAMESPACES: dict[str, Any] = {
    "torch": torch._C._VariableFunctions,
    "functional": torch.nn.functional,
    "special": torch.special,
    "linalg": torch.linalg,
    "fft": torch.fft,
    "python": torch.functional,
    "sym": torch,
    "operator": operator,
    "math": math,
    "builtins": builtins,
}
_OPERATORS = frozenset((
    "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "index", "inv", "invert", "le", "lshift", "lt",
    "matmul", "mod", "mul", "ne", "neg", "not_", "or_", "pos", "pow", "rshift", "sub", "truediv", "xor", "iadd", "isub",
    "imul", "itruediv", "iand", "ior",
))  # fmt: skip
_ALLOWED: dict[str, frozenset[str]] = {
    "operator": _OPERATORS,
    "builtins": frozenset(("getattr", "max", "min", "abs", "round")),
    "sym": frozenset(("sym_max", "sym_min", "sym_not", "sym_int", "sym_float")),
    "python": frozenset(torch.functional.__all__),
}
_ATTRIBUTES = frozenset(("mT", "mH", "T", "H", "real", "imag", "shape", "dtype", "device", "ndim"))
# Methods that are no functions of torch, too.
_METHODS = frozenset((
    "item", "size", "dim", "numel", "view", "view_as", "expand", "expand_as", "repeat", "contiguous", "to", "type_as",
    "float", "double", "half", "bfloat16", "long", "int", "short", "bool", "new_zeros", "new_ones", "new_full",
    "new_empty", "new_tensor", "unfold", "masked_fill_", "nelement", "stride",
))  # fmt: skip
# They read a file, or give other numbers in the backward pass than in the forward pass.
_REFUSED = re.compile(
    r"from_file|rand.*|normal_?|bernoulli.*|multinomial|poisson|.*dropout.*|rrelu.*|gumbel_softmax|"
    r"(exponential|geometric|cauchy|log_normal|uniform|random)_"
)
_CONSTANTS = (torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Graph:
    """A Python function as the operations that a compiler recorded for a tile.

    Calls of any size are computed tile by tile, with the last tile filled up by repetition.

    Args:
        text: the operations, as `encode` returns them.
        tensors: those that the function closes over.
        numbers: likewise, integers and floats.
        rows: number of queries of a tile.
        columns: number of keys of a tile.
    """

    text: str
    tensors: tuple[Any, ...]
    numbers: tuple[Any, ...]
    rows: int
    columns: int

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        program = _decode(self.text)
        values: list[Any] = [*inputs, *self.tensors, *self.numbers]
        assert len(values) == len(program.uses), f"a graph of {len(program.uses)} inputs got {len(values)}"
        for function, arguments, keywords in program.steps:
            values.append(function(*_filled(arguments, values), **_filled(keywords, values)))
        return values[program.result]  # type: ignore[no-any-return]

    def _by_tiles(self, rows: int, columns: int, tile: Callable[[slice | Tensor, slice | Tensor], Tensor]) -> Tensor:
        """Concatenate the results (1, h, rows, columns) of tiles, which take the indices of their queries and keys."""
        parts = [
            torch.cat(
                [
                    tile(i, j)[..., : min(self.rows, rows - row), : min(self.columns, columns - column)]
                    for column, j in _ranges(columns, self.columns)
                ],
                -1,
            )
            for row, i in _ranges(rows, self.rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


class VectorGraph(Graph):
    """A function of queries (1, H, rows, D) and keys (1, H, columns, D)."""

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the results (b, H, l, s) for queries (b, H, l, D) and keys (b, H, s, D)."""

        def row(n: int) -> Tensor:
            some_q, some_k = q[n : n + 1], k[n : n + 1]
            return self._by_tiles(q.shape[2], k.shape[2], lambda i, j: self._run((some_q[:, :, i], some_k[:, :, j])))

        return torch.cat([row(n) for n in range(q.shape[0])])


class IndexGraph(Graph):
    """A function of batch (1, 1, 1, 1), head (1, 1, 1, 1), query (1, 1, rows, 1) and key (1, 1, 1, columns) indices."""

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return the results (b, h, l, s) for indices that broadcast to it."""
        uses = _decode(self.text).uses
        batch, head = (x.flatten() if used else x.flatten()[:1] for x, used in zip((batch, head), uses, strict=False))
        shape = (1, 1, self.rows, self.columns)

        def some(b: Tensor, h: Tensor) -> Tensor:
            def tile(i: slice | Tensor, j: slice | Tensor) -> Tensor:
                indices = b.view(1, 1, 1, 1), h.view(1, 1, 1, 1), query[:, :, i], key[..., j]
                return self._run(indices).expand(shape)

            return self._by_tiles(query.shape[2], key.shape[3], tile)

        return torch.cat([torch.cat([some(b, h) for h in head], 1) for b in batch])


def _ranges(length: int, size: int) -> list[tuple[int, slice | Tensor]]:
    """Return the first index of each tile, and its indices. The last tile is filled up with the last index."""
    firsts = range(0, length, size)
    return [
        (n, slice(n, n + size) if n + size <= length else torch.arange(n, n + size).clamp_(max=length - 1))
        for n in firsts
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Operations as text. An exported program holds it, which may come from elsewhere: it names functions, and holds no code.


def encode(nodes: Sequence[torch.fx.Node], inputs: Sequence[torch.fx.Node], result: torch.fx.Node) -> str:
    """Return the operations of a function as text.

    Args:
        nodes: the operations, in order.
        inputs: their inputs: those of the tile, then tensors and numbers.
        result: the node whose value the function returns.

    Raises:
        NotImplementedError: an operation that a graph cannot hold.
    """
    numbers = {node: index for index, node in enumerate(inputs)}
    steps = []
    for node in nodes:
        name = _method(node.target) if node.op == "call_method" else _name(node.target)
        if name is None:
            raise NotImplementedError(f"the operation {node.target}")
        if name == "builtins.getattr" and node.args[1] not in _ATTRIBUTES:
            raise NotImplementedError(f"the attribute {node.args[1]}")
        steps.append([name, _encoded(node.args, numbers), _encoded(dict(node.kwargs), numbers)])
        numbers[node] = len(numbers)
    uses = [any(node in x.all_input_nodes for x in nodes) or node is result for node in inputs]
    return json.dumps({"uses": uses, "steps": steps, "result": numbers[result]})


def _name(target: Any) -> str | None:
    """Return the name of a function, by which `_function` finds it."""
    name = getattr(target, "__name__", None)
    found = (
        f"{space}.{name}" for space, module in _NAMESPACES.items() if name and getattr(module, name, None) is target
    )
    return next((name for name in found if _is_allowed(*name.split("."))), None)


def _method(name: Any) -> str | None:
    return f"method.{name}" if _is_allowed("method", str(name)) else None


def _is_allowed(space: str, name: str) -> bool:
    if _REFUSED.fullmatch(name):
        return False
    if space in _ALLOWED:
        return name in _ALLOWED[space]
    if space == "method" and name.startswith("__"):
        return name.strip("_") in _OPERATORS
    if name.startswith("_"):
        return False
    if space == "method":
        return name in _METHODS or hasattr(_NAMESPACES["torch"], name.rstrip("_"))
    function = getattr(_NAMESPACES[space], name, None)
    return isinstance(function, BuiltinFunctionType) or getattr(function, "__module__", None) == "torch.nn.functional"


def _function(name: str) -> Callable[..., Any]:
    space, _, attribute = name.partition(".")
    if space not in (*_NAMESPACES, "method") or not _is_allowed(space, attribute):
        raise ValueError(f"graph: {name!r} is not an operation that a graph may hold")
    if space == "method":
        return lambda x, *rest, **keywords: getattr(x, attribute)(*rest, **keywords)
    if name == "builtins.getattr":
        return _attribute
    return getattr(_NAMESPACES[space], attribute)  # type: ignore[no-any-return]


def _attribute(x: Any, name: str) -> Any:
    if name not in _ATTRIBUTES:
        raise ValueError(f"graph: {name!r} is not an attribute that a graph may read")
    return getattr(x, name)


@dataclass(frozen=True)
class _Value:
    """The value of an input or of an earlier operation."""

    index: int


def _encoded(x: Any, numbers: dict[torch.fx.Node, int]) -> Any:
    """Return an argument of an operation as JSON. A dictionary of one entry stands for what JSON has no form of."""
    if isinstance(x, torch.fx.Node):
        return {"value": numbers[x]}
    if x is None or isinstance(x, bool | int | str):
        return x
    if isinstance(x, float):
        return x if math.isfinite(x) else {"float": repr(x)}
    if isinstance(x, list | tuple):
        return {"list" if isinstance(x, list) else "tuple": [_encoded(part, numbers) for part in x]}
    if isinstance(x, dict):
        return {"dict": {name: _encoded(part, numbers) for name, part in x.items()}}
    if isinstance(x, slice):
        return {"slice": [_encoded(part, numbers) for part in (x.start, x.stop, x.step)]}
    if x is Ellipsis:
        return {"ellipsis": 0}
    if isinstance(x, torch.device):
        return {"device": str(x)}
    if isinstance(x, _CONSTANTS):
        return {"torch": str(x).removeprefix("torch.")}
    raise NotImplementedError(f"the argument {x!r}")


def _decoded(x: Any) -> Any:
    if not isinstance(x, dict):
        return x
    [(kind, part)] = x.items()
    if kind == "value":
        return _Value(part)
    if kind == "float":
        return float(part)
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(map(_decoded, part))
    if kind == "dict":
        return {name: _decoded(value) for name, value in part.items()}
    if kind == "slice":
        return slice(*map(_decoded, part))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "device":
        return torch.device(part)
    constant = getattr(torch, part, None) if kind == "torch" else None
    if not isinstance(constant, _CONSTANTS):
        raise ValueError(f"graph: {x!r} is not a constant of torch")
    return constant


class _Program(NamedTuple):
    """A decoded graph: which of its inputs it uses, its operations, and the index of its result among all values."""

    uses: list[bool]
    steps: list[tuple[Callable[..., Any], Any, Any]]
    result: int


@lru_cache(1024)
def _decode(text: str) -> _Program:
    found = json.loads(text)
    steps = [(_function(name), _decoded(arguments), _decoded(words)) for name, arguments, words in found["steps"]]
    return _Program(found["uses"], steps, found["result"])


def _filled(x: Any, values: Sequence[Any]) -> Any:
    if isinstance(x, _Value):
        return values[x.index]
    if isinstance(x, tuple | list):
        return type(x)([_filled(part, values) for part in x])
    if isinstance(x, dict):
        return {name: _filled(part, values) for name, part in x.items()}
    if isinstance(x, slice):
        return slice(*[_filled(part, values) for part in (x.start, x.stop, x.step)])
    return x
