"""Watch what any PyTorch model attends to, in memory linear in length.

with regard.watch(model) as seen:
    model(**inputs)
seen[0].top.keys
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from regard.components.summary import AttentionSummary, Summary, Top
from regard.deprecated import getter
from regard.watch.analysis.compare import Comparison, compare, differing
from regard.watch.analysis.heads import Heads, Share, heads, share, similarity
from regard.watch.analysis.rollout import Rollout, flow, rollout
from regard.watch.capture import torch_layers
from regard.watch.capture.hf_config import readable
from regard.watch.capture.intercept import Intercept
from regard.watch.capture.module_tracker import Place
from regard.watch.capture.recorder import Shape
from regard.watch.recording.record import Record
from regard.watch.recording.recording import Recording

__all__ = [
    "Comparison",
    "Heads",
    "Record",
    "Recording",
    "Rollout",
    "Share",
    "compare",
    "differing",
    "flow",
    "heads",
    "rollout",
    "share",
    "similarity",
    "watch",
]  # fmt: skip

__getattr__ = getter("regard.watch")


@contextmanager
def watch(
    model: nn.Module,
    *,
    top: int = 8,
    received: bool = True,
    entropy: bool = True,
    rows: Sequence[int] | None = None,
    layers: Collection[int] | None = None,
) -> Iterator[Recording]:
    """Record what a model attends to while it runs inside the `with` block, in this thread.

    Every call of `regard.attention`, `F.scaled_dot_product_attention` and FlexAttention under the model is seen; torch's own
    layers, on their fast path too; models of transformers, whatever their `attn_implementation`; and attention that is
    written by hand, a softmax and then a product. The model's outputs stay what they are: to the bit where the same kernel
    computes them, within rounding otherwise. Compiled graphs run uncompiled inside the block, since they show nothing.

    Args:
        model: any module; transformers models, `nn.Transformer` and hand-written ones.
        top: how many of the largest weights of each row to keep.
        received: keep how much attention each key got.
        entropy: keep the entropy of each row.
        rows: keep the whole weights of these queries.
        layers: keep these layers alone, numbered in the order of the calls. The first run gives the order: generation, step
            by step, keeps it.

    Yields:
        `Recording`: a sequence of `Record`, one per call of attention.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(top, int) or top < 1:
        raise ValueError(f"top: {top!r}; expected a whole number > 0: how many weights of each row to keep")
    watched, place = Recording(), Place(model)
    ask = _Ask(
        watched,
        place,
        Summary(max=True, top=top, received=received, entropy=entropy, rows=tuple(rows or ())),
        None if layers is None else frozenset(layers),
    )
    with ExitStack() as stack:
        stack.enter_context(torch_layers.exchanged())
        stack.enter_context(readable(model))
        stack.enter_context(place.follow())
        stack.enter_context(Intercept(ask))
        yield watched
    if not watched.records and place.call >= 0 and layers is None:
        warnings.warn(
            f"no attention was seen in {type(model).__name__}: it calls no attention function of torch or regard, and takes "
            "no softmax that multiplies values",
            stacklevel=3,
        )


class _Ask:
    """What a watch asks of each call, and the records that it makes of the answers."""

    def __init__(self, watched: Recording, place: Place, summary: Summary, layers: frozenset[int] | None) -> None:
        self._watched, self._place, self._summary, self._layers = watched, place, summary, layers
        self._name, self._layer = "", 0

    def wanted(self, within: str = "") -> Summary | None:
        if self._place.is_outside:
            return None
        self._name = self._place.name(within)
        self._layer = self._place.number(self._name)
        return self._summary if self._layers is None or self._layer in self._layers else None

    def tell(self, seen: AttentionSummary, shape: Shape, causal: bool) -> None:
        _, heads, queries, keys = shape
        seen = seen.each(Tensor.detach)
        assert seen.top is not None and seen.max is not None
        kind = self._place.kind(self._name, causal, queries, keys)
        top = seen.top
        if causal and kind == "decoder":
            # Large negative numbers forbid later keys as a mask does, but leave them among those of weight 0.
            own = torch.arange(queries, device=top.keys.device) + keys - queries
            top = Top(top.weights, top.keys.masked_fill((top.keys > own[:, None]) & (top.weights == 0), -1))
        self._watched.records.append(
            Record(
                name=self._name,
                layer=self._layer,
                call=self._place.call,
                kind=kind,
                heads=heads,
                queries=queries,
                keys=keys,
                top=top,
                max=seen.max,
                received=seen.received,
                entropy=seen.entropy,
                rows=seen.rows,
            )
        )

    def heads(self) -> int | None:
        return None if self._place.is_outside else self._place.heads()
