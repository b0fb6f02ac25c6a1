"""Which attention calls of a model are recorded, and what a record of one holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from regard.components.summary import AttentionSummary, Summary, Top
from regard.watch.capture.fragments import are_fragments
from regard.watch.capture.module_tracker import ModuleTracker
from regard.watch.recording.record import Record
from regard.watch.recording.recording import Recording

Shape = tuple[int, int, int, int]


class Recorder:
    """Appends records of a model's attention calls to a recording.

    Args:
        recording: receives the records.
        tracker: knows which module of the model is running.
        summary: the statistics to record of each call.
        layers: the layers to record; None for all.
    """

    def __init__(
        self, recording: Recording, tracker: ModuleTracker, summary: Summary, layers: frozenset[int] | None
    ) -> None:
        self.summary = summary
        self._recording, self._tracker, self._layers = recording, tracker, layers
        self._name, self._layer = "", 0
        self._unchecked: list[Record] = []
        self.fragmented: dict[str, None] = {}  # the names of modules whose calls were fragments
        tracker.on_exit = self._check_records

    def should_record(self, submodule: str = "") -> bool:
        """Count an attention call of the current module, and return whether to record it.

        submodule: the part of the module that attends, where torch calls no module for it.
        """
        if self._tracker.is_outside:
            return False
        self._name = self._tracker.name(submodule)
        self._layer = self._tracker.layer_index(self._name)
        return self._layers is None or self._layer in self._layers

    def record(self, summary: AttentionSummary, shape: Shape, is_causal: bool) -> None:
        """Record the call that `should_record` counted last.

        summary: its statistics. shape: (B, H, L, S). is_causal: no query may attend to a later key.
        """
        _, heads, queries, keys = shape
        if summary.max is not None and summary.max.requires_grad:
            summary = summary.each(Tensor.detach)
        assert summary.top is not None and summary.max is not None
        kind = self._tracker.kind(self._name, is_causal, queries, keys)
        top = summary.top
        if is_causal and kind == "decoder" and queries > 1:
            # Masks of large negative numbers leave later keys in the list, with weight 0.
            positions = torch.arange(queries, device=top.keys.device) + keys - queries
            top = Top(top.weights, top.keys.masked_fill((top.keys > positions[:, None]) & (top.weights == 0), -1))
        record = Record(
            name=self._name, layer=self._layer, call=self._tracker.call, kind=kind, heads=heads, queries=queries, keys=keys,
            top=top, max=summary.max, received=summary.received, entropy=summary.entropy, rows=summary.rows,
        )  # fmt: skip
        self._recording.records.append(record)
        self._unchecked.append(record)

    def _check_records(self, args: Any, output: Any) -> None:
        """Remove the records of the module that ends if they are fragments of its attention."""
        if not self._unchecked:
            return
        name, unchecked = self._tracker.name(), self._unchecked
        records = [record for record in unchecked if record.name == name]
        if not records:
            return
        self._unchecked = [] if len(records) == len(unchecked) else [x for x in unchecked if x.name != name]
        if self._tracker.attention_module() and are_fragments(records, args, output):
            self.fragmented[name] = None
            dropped = {id(record) for record in records}
            self._recording.records[:] = [x for x in self._recording.records if id(x) not in dropped]
            self._tracker.forget_layers(name)

    def num_heads(self) -> int | None:
        """Return the number of heads that the current module declares."""
        return None if self._tracker.is_outside else self._tracker.num_heads()

    def attention_module(self) -> str | None:
        """Return the name of the running module, if it, its class or a module around it is named after attention."""
        return None if self._tracker.is_outside else self._tracker.attention_module()

    def packed_heads(self, heads: int, queries: int) -> int | None:
        """Return the number of heads of a call with one query whose heads are packed into the axis of queries: a group
        that shares a key/value head, as transformers do for grouped heads with a mask. None for other calls.
        """
        groups = self._tracker.queries_per_key_head()
        return heads * groups if 1 < groups == queries and self._tracker.num_heads() == heads * groups else None


@contextmanager
def untracked() -> Iterator[None]:
    """Compute without gradients and without being recorded, for summaries that are computed separately."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        yield


def has_saved_tensor_hooks() -> bool:
    """Return whether hooks for saved tensors are active.

    Activation checkpointing recomputes a call and compares the tensors that it saves: the call must then stay what it
    is without a watch.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
