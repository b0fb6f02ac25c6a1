"""Python functions, and masks and biases of classes, of users in compiled and exported graphs.

The compiler records a function for one tile, and lifts what it closes over into operands, as it does for FlexAttention. From
then on the function is a `Graph`, which `tiled` calls tile by tile: in linear memory, with gradients of everything lifted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._higher_order_ops.base_hop import BaseHOP
from torch._higher_order_ops.utils import _maybe_compile_and_run_fn

from regard.backends.plan_text import from_text, has_text, to_text
from regard.components.component import Recorded, Slot, fill, map_leaves
from regard.components.function import FunctionBias, FunctionScore, check_bias, check_scores
from regard.components.graph import COLUMNS, COLUMNS_OF_VECTORS, ROWS, Graph, IndexGraph, VectorGraph, encode
from regard.components.predicate import Mask, Where, check_allowed, map_masks
from regard.components.score import Score
from regard.components.tensor_ops import widen
from regard.components.tile import IndexTile, Sizes
from regard.plan.problem import Plan, empty_outputs, sizes


class Function(NamedTuple):
    """A Python function of a plan, and its component: "score" for functions of queries and keys, "bias" and "mask" for
    those of four index tensors.
    """

    call: Callable[..., Tensor]
    component: str


def take(plan: Plan, tensors: Sequence[Tensor]) -> tuple[Plan, list[Function]]:
    """Return a plan with placeholders in place of its Python functions, and these functions."""
    found: list[Function] = []

    def take_from(name: str, component: Any) -> Any:
        def placeholder(leaf: Any) -> Any:
            if not callable(leaf):
                return leaf
            found.append(Function(leaf, name))
            return Recorded(len(found) - 1)

        return map_leaves(component, placeholder)

    score, mask, bias = plan.score, plan.mask, plan.bias
    size = sizes(*tensors[:2])
    if type(score).scores is Score.scores:  # a score of the user, which defines `pair`
        pairwise: Any = fill(score, tensors)
        score = FunctionScore(lambda q, k: pairwise.scores(q, k, None))
    if bias is not None and not has_text(type(bias)):
        own_bias: Any = fill(bias, tensors)
        dtype = widen(tensors[0][:0]).dtype
        bias = FunctionBias(lambda b, h, i, j: own_bias.bias(IndexTile(b, h, i, j, size), dtype))
    mask = None if mask is None else map_masks(mask, lambda leaf: _as_function(leaf, tensors, size))
    score, mask, bias = (take_from(name, x) for name, x in (("score", score), ("mask", mask), ("bias", bias)))
    return (replace(plan, score=score, mask=mask, bias=bias), found) if found else (plan, found)


def _as_function(mask: Mask, tensors: Sequence[Tensor], size: Sizes) -> Mask:
    """Return a mask of a class of the user as one of a function of indices, and other masks as they are."""
    if has_text(type(mask)):
        return mask
    own: Any = fill(mask, tensors)
    return Where(lambda b, h, i, j: own.allowed(IndexTile(b, h, i, j, size)))


def run(backend: str, plan: Plan, tensors: Sequence[Tensor], functions: Sequence[Function]) -> tuple[Tensor, ...]:
    """Return the outputs of a plan with placeholders, in a graph that is being compiled or exported."""
    q, k = tensors[:2]
    L, S = q.shape[2], k.shape[2]
    rows, columns, for_vectors = _size(L, ROWS), _size(S, COLUMNS), _size(S, COLUMNS_OF_VECTORS)
    text, ints, floats = to_text(plan)
    components = [function.component for function in functions]

    def body(*inputs: Tensor) -> tuple[Tensor, ...]:
        # Copies, so that the inputs come first among the operands of the operator, in this order, and no result is an input.
        some_q, some_k, *indices = [x.clone() for x in inputs]
        results = []
        for function in functions:
            is_score = function.component == "score"
            result = function.call(some_q, some_k) if is_score else function.call(*indices)
            if is_score:
                check_scores(result, some_q, some_k)
            else:
                (check_allowed if function.component == "mask" else check_bias)(result, (1, 1, rows, columns))
            results.append(result.clone())
        like = widen(q)
        return (*results, *empty_outputs(fill(plan, tensors), like, k, tensors[2]))

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        return _lift(
            body, *inputs, tensors=list(tensors), backend=backend, text=text, ints=ints, floats=floats,
            components=components,
        )  # fmt: skip

    some_q, some_k = (widen(x.new_zeros(1, q.shape[1], n, x.shape[3])) for x, n in ((q, rows), (k, for_vectors)))
    shapes = (1, 1, 1, 1), (1, 1, 1, 1), (1, 1, rows, 1), (1, 1, 1, columns)
    indices = [torch.zeros(shape, dtype=torch.int64, device=q.device) for shape in shapes]
    outputs = _maybe_compile_and_run_fn(call, some_q, some_k, *indices)  # type: ignore[no-untyped-call]  # as torch.cond does
    return tuple(outputs[len(functions) :])


def _size(length: Any, sizes: Sequence[int]) -> int:
    """Return the smallest of the sizes of tiles that hold a length. A graph for all lengths gets the largest size."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    for size in sizes:
        if statically_known_true(length <= size):
            return size
    return sizes[-1]


class _Lift(BaseHOP):
    """The operator of a graph of the compiler. Its subgraph has the functions' values for a tile as its first results; then
    the outputs, of which it gives the shapes only. When the graph is lowered, this becomes the operator of `compiled_ops`.
    """

    def __init__(self) -> None:
        super().__init__("regard_lift")

    def __call__(
        self, subgraph: Any, *operands: Any, tensors: list[Tensor], backend: str, text: str, ints: list[Any],
        floats: list[Any], components: list[str],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if subgraph not in _recorded:
            _recorded[subgraph] = [_record(subgraph, operands, *item) for item in enumerate(components)]
        tensors, graphs = list(tensors), []
        for function in _recorded[subgraph]:
            slots = tuple([Slot(len(tensors) + index) for index in range(len(function.tensors))])
            tensors += [x if isinstance(x, Tensor) else operands[x] for x in function.tensors]
            graphs.append(function.graph(slots, tuple([operands[index] for index in function.numbers])))
        plan = map_leaves(
            from_text(text, ints, floats), lambda leaf: graphs[leaf.index] if isinstance(leaf, Recorded) else leaf
        )
        outputs = torch.ops.regard.forward(tensors, backend, *to_text(plan))
        return (*[tensors[0].new_zeros(()) for _ in graphs], *outputs)


_lift = _Lift()


class _Lifted(NamedTuple):
    """A function of a subgraph: its graph without what it closes over, and the operands that are its tensors and numbers."""

    graph: Callable[[tuple[Slot, ...], tuple[Any, ...]], Graph]
    tensors: list[Any]  # indices of operands, or tensors
    numbers: list[int]


_recorded: WeakKeyDictionary[torch.fx.GraphModule, list[_Lifted]] = WeakKeyDictionary()


def _record(subgraph: torch.fx.GraphModule, operands: Sequence[Any], index: int, component: str) -> _Lifted:
    """Return one of the functions of a subgraph."""
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
    q, k, _, _, query, key = [operands[n].shape for n in in_tile]
    own, kind, rows, columns = (
        (copies[:2], VectorGraph, q[2], k[2]) if component == "score" else (copies[2:], IndexGraph, query[2], key[3])
    )
    try:
        values = [getattr(subgraph, node.target) for node in constants]
        if not all(isinstance(x, Tensor) for x in values):
            raise NotImplementedError("a transform of torch.func")
        inputs = [*own, *[placeholders[n] for n in tensors], *constants, *[placeholders[n] for n in numbers]]
        steps = [x for x in nodes if x in needed and x.op in ("call_function", "call_method") and x not in copies]
        text = encode(steps, inputs, result)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"attention: {error} in a Python function cannot be part of a compiled graph in linear memory; "
            "backend='reference' compiles it, in memory L x S"
        ) from None
    return _Lifted(partial(kind, text, rows=rows, columns=columns), [*tensors, *values], numbers)
