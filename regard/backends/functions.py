"""Python functions of users in compiled and exported graphs.

The compiler records a function for one tile, and lifts what it closes over into operands, as it does for FlexAttention. From
then on the function is a `Graph`, which `tiled` calls tile by tile: in linear memory, with gradients of everything lifted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._higher_order_ops.base_hop import BaseHOP
from torch._higher_order_ops.utils import _maybe_compile_and_run_fn

from regard import check
from regard.backends.plan_text import from_text, to_text
from regard.components.component import Slot, fill
from regard.components.function import FunctionBias, FunctionScore
from regard.components.graph import COLUMNS, COLUMNS_OF_VECTORS, ROWS, IndexGraph, Recorded, VectorGraph, encode
from regard.components.predicate import Where
from regard.components.score import Score
from regard.components.tensor_ops import widen
from regard.plan.problem import Plan, empty_outputs


class Function(NamedTuple):
    """A function of queries and keys, or of four index tensors."""

    call: Callable[..., Tensor]
    takes_vectors: bool


def take(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Plan, list[Function]]:
    """Return a plan with placeholders in place of its Python functions, and these functions."""
    found: list[Function] = []

    def placeholder(function: Callable[..., Tensor], takes_vectors: bool = False) -> Any:
        found.append(Function(function, takes_vectors))
        return Recorded(len(found) - 1)

    score, bias = plan.score, plan.bias
    if isinstance(score, FunctionScore):
        score = FunctionScore(placeholder(score.function, True))
    elif type(score).scores is Score.scores and not type(score).__module__.startswith("regard."):
        pairwise: Any = fill(score, tensors)
        score = FunctionScore(placeholder(lambda q, k: pairwise.scores(q, k, None), True))
    if isinstance(bias, FunctionBias):
        bias = FunctionBias(placeholder(bias.function))
    mask = _take_predicates(plan.mask, placeholder)
    return (replace(plan, score=score, mask=mask, bias=bias), found) if found else (plan, found)


def _take_predicates(mask: Any, placeholder: Callable[..., Any]) -> Any:
    """Return a mask with placeholders in place of its Python functions."""
    if isinstance(mask, Where):
        return Where(placeholder(mask.predicate))
    parts = {name: getattr(mask, name) for name in ("left", "right", "inner") if hasattr(mask, name)}
    changed = {name: _take_predicates(part, placeholder) for name, part in parts.items() if not isinstance(part, int)}
    return replace(mask, **changed) if any([x is not parts[name] for name, x in changed.items()]) else mask  # noqa: C419


def run(backend: str, plan: Plan, tensors: Sequence[Tensor], functions: Sequence[Function]) -> tuple[Tensor, ...]:
    """Return the outputs of a plan with placeholders, in a graph that is being compiled or exported."""
    q, k = tensors[:2]
    L, S = q.shape[2], k.shape[2]
    rows, columns, for_vectors = _size(L, ROWS), _size(S, COLUMNS), _size(S, COLUMNS_OF_VECTORS)
    text, ints, floats = to_text(plan)
    takes_vectors = [function.takes_vectors for function in functions]

    def body(*inputs: Tensor) -> tuple[Tensor, ...]:
        # Copies, so that the inputs come first among the operands of the operator, in this order, and no result is an input.
        some_q, some_k, batch, head, query, key = [x.clone() for x in inputs]
        results = []
        for function in functions:
            arguments = (some_q, some_k) if function.takes_vectors else (batch, head, query, key)
            result = function.call(*arguments)
            _check(
                result,
                function,
                (1, q.shape[1], rows, for_vectors) if function.takes_vectors else (1, 1, rows, columns),
            )
            results.append(result.clone())
        like = widen(q)
        return (*results, *empty_outputs(fill(plan, tensors), like, k, tensors[2]))

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        return _lift(
            body, *inputs, tensors=list(tensors), backend=backend, text=text, ints=ints, floats=floats,
            takes_vectors=takes_vectors, rows=rows, columns=[for_vectors if x else columns for x in takes_vectors],
        )  # fmt: skip

    some_q, some_k = (widen(x.new_zeros(1, q.shape[1], n, x.shape[3])) for x, n in ((q, rows), (k, for_vectors)))
    shapes = (1, 1, 1, 1), (1, 1, 1, 1), (1, 1, rows, 1), (1, 1, 1, columns)
    indices = [torch.zeros(shape, dtype=torch.int64, device=q.device) for shape in shapes]
    outputs = _maybe_compile_and_run_fn(call, some_q, some_k, *indices)  # type: ignore[no-untyped-call]
    return tuple(outputs[len(functions) :])


def _size(length: Any, sizes: Sequence[int]) -> int:
    """Return the smallest of the sizes of tiles that hold a length. A graph for all lengths gets the largest size."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    for size in sizes:
        if statically_known_true(length <= size):
            return size
    return sizes[-1]


def _check(result: Any, function: Function, shape: tuple[int, ...]) -> None:
    """Raise unless a function's result for a tile has its shape, or broadcasts to it."""
    name = f"{'score: ' if function.takes_vectors else ''}the result of the function for a tile (b, h, l, s) = {shape}"
    if function.takes_vectors:
        check.float_tensor(name, result, (shape,), f"{shape}")
    elif not isinstance(result, Tensor) or not check.broadcasts(result.shape, shape):
        raise check.error(name, result, "a tensor that broadcasts to it", isinstance(result, Tensor))


class _Lift(BaseHOP):
    """The operator of a graph of the compiler. Its subgraph has the functions' values for a tile as its first results; then
    the outputs, of which it gives the shapes only. When the graph is lowered, this becomes the operator of `compiled_ops`.
    """

    def __init__(self) -> None:
        super().__init__("regard_lift")

    def __call__(
        self, subgraph: Any, *operands: Any, tensors: list[Tensor], backend: str, text: str, ints: list[Any],
        floats: list[Any], takes_vectors: list[bool], rows: int, columns: list[int],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if subgraph not in _recorded:
            _recorded[subgraph] = [_record(subgraph, operands, *item) for item in enumerate(takes_vectors)]
        tensors, graphs = list(tensors), []
        for function, is_vector, width in zip(_recorded[subgraph], takes_vectors, columns, strict=True):
            slots = tuple([Slot(len(tensors) + index) for index in range(len(function.tensors))])
            tensors += [x if isinstance(x, Tensor) else operands[x] for x in function.tensors]
            numbers = tuple([operands[index] for index in function.numbers])
            graphs.append((VectorGraph if is_vector else IndexGraph)(function.text, slots, numbers, rows, width))
        plan = _fill(from_text(text, ints, floats), graphs)
        new_text, new_ints, new_floats = to_text(plan)
        outputs = torch.ops.regard.forward(tensors, backend, new_text, new_ints, new_floats)
        return (*[tensors[0].new_zeros(()) for _ in graphs], *outputs)


_lift = _Lift()


class _Lifted(NamedTuple):
    """A function of a subgraph as text, with the operands that are its tensors and its numbers."""

    text: str
    tensors: list[Any]  # indices of operands, or tensors
    numbers: list[int]


_recorded: WeakKeyDictionary[torch.fx.GraphModule, list[_Lifted]] = WeakKeyDictionary()


def _record(subgraph: torch.fx.GraphModule, operands: Sequence[Any], index: int, takes_vectors: bool) -> _Lifted:
    """Return one of the functions of a subgraph as text."""
    nodes = list(subgraph.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    assert len(placeholders) == len(operands), f"{len(placeholders)} placeholders for {len(operands)} operands"
    [result] = nodes[-1].args[0][index].args  # before it is copied
    needed, todo = {result}, [result]
    while todo:
        new = set(todo.pop().all_input_nodes) - needed
        needed |= new
        todo += new
    is_tensor = [isinstance(x, Tensor) for x in operands]
    in_tile = [n for n, flag in enumerate(is_tensor) if flag][:6]
    copies = [next(iter(placeholders[n].users)) for n in in_tile]
    closed = [n for n, node in enumerate(placeholders) if node in needed and n not in in_tile]
    tensors, numbers = [n for n in closed if is_tensor[n]], [n for n in closed if not is_tensor[n]]
    constants = [node for node in nodes if node in needed and node.op == "get_attr"]
    try:
        values = [getattr(subgraph, node.target) for node in constants]
        if not all(isinstance(x, Tensor) for x in values):
            raise NotImplementedError("a transform of torch.func")
        own = copies[:2] if takes_vectors else copies[2:]
        inputs = [*own, *[placeholders[n] for n in tensors], *constants, *[placeholders[n] for n in numbers]]
        steps = [x for x in nodes if x in needed and x.op in ("call_function", "call_method") and x not in copies]
        return _Lifted(encode(steps, inputs, result), [*tensors, *values], numbers)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"attention: {error} in a Python function cannot be part of a compiled graph in linear memory; "
            "backend='reference' compiles it, in memory L x S"
        ) from None


def _fill(plan: Plan, graphs: Sequence[Any]) -> Plan:
    """Return a plan with graphs in place of its placeholders."""
    score, bias = plan.score, plan.bias
    if isinstance(score, FunctionScore) and isinstance(score.function, Recorded):
        score = FunctionScore(graphs[score.function.index])
    if isinstance(bias, FunctionBias):
        bias = FunctionBias(graphs[bias.function.index])  # type: ignore[attr-defined]
    mask = _take_predicates(plan.mask, lambda predicate: graphs[predicate.index])
    return replace(plan, score=score, mask=mask, bias=bias)
