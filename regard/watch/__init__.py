"""Record the attention of any PyTorch model, in memory linear in length.

with regard.watch(model) as recording:
    model(**inputs)
recording[0].top.keys
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from regard.components.summary import Summary
from regard.deprecated import getter
from regard.watch.analysis.compare import Comparison, compare, differing
from regard.watch.analysis.heads import Heads, Share, heads, share, similarity
from regard.watch.analysis.rollout import Rollout, flow, rollout
from regard.watch.capture import torch_layers
from regard.watch.capture.hf_config import observable
from regard.watch.capture.intercept import AttentionMode
from regard.watch.capture.module_tracker import ModuleTracker
from regard.watch.capture.recorder import Recorder
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
    """Record the attention of a model while it runs inside the `with` block, in this thread.

    The following calls are recorded: `regard.attention`, `F.scaled_dot_product_attention`, FlexAttention, torch's own
    layers (also on their fast path), models of transformers with any `attn_implementation`, and attention written as a
    softmax followed by a matrix product. The outputs of the model are bit-identical where the same kernel computes
    them, and equal within rounding otherwise. Compiled graphs run uncompiled inside the block.

    Args:
        model: any module; models of transformers, `nn.Transformer` and others.
        top: how many of the largest weights of each row to record.
        received: record the sum of the weights that each key receives.
        entropy: record the entropy of each row.
        rows: the queries whose full rows of weights to record; negative indices count from the end.
        layers: the layers to record, by their index in the order of the calls in the first forward pass; None for all.

    Yields:
        `Recording`: a sequence of `Record`, one per attention call.

    >>> model = nn.MultiheadAttention(16, 4, batch_first=True)
    >>> x = torch.randn(2, 7, 16)
    >>> with regard.watch(model, top=7) as recording:
    ...     _, weights = model(x, x, x, average_attn_weights=False)
    >>> recording
    Recording(1 calls in 1 layers; 4 heads, 7 queries x 7 keys in the last call)
    >>> bool(torch.allclose(recording[0].top.weights, weights.sort(-1, descending=True).values))
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(top, int) or top < 1:
        raise ValueError(f"top: {top!r}; expected an integer > 0: how many weights of each row to record")
    recording, tracker = Recording(), ModuleTracker(model)
    summary = Summary(max=True, top=top, received=received, entropy=entropy, rows=tuple(rows or ()))
    recorder = Recorder(recording, tracker, summary, None if layers is None else frozenset(layers))
    with ExitStack() as stack:
        stack.enter_context(torch_layers.patched())
        stack.enter_context(observable(model))
        stack.enter_context(tracker.track())
        mode = AttentionMode(recorder)
        stack.enter_context(mode)
        yield recording
    reasons = (
        (mode.softmax.unseen, "weights of a softmax there reach no matrix product with values by operations that can be "
         "followed"),
        (list(recorder.fragmented), "it is computed in blocks, whose queries are not the positions of the layer"),
    )  # fmt: skip
    for names, reason in reasons:
        if names:
            listed = ", ".join(names[:8]) + (f" and {len(names) - 8} others" if len(names) > 8 else "")
            warnings.warn(f"attention was not recorded in {listed}: {reason}", stacklevel=3)
    if any(names for names, _ in reasons):
        return
    if not recording.records and tracker.call >= 0 and layers is None:
        warnings.warn(
            f"no attention was recorded in {type(model).__name__}: it calls no attention function of torch or regard, and "
            "multiplies no values by the result of a softmax",
            stacklevel=3,
        )
