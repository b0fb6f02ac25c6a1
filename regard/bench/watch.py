"""What watching costs: whole models of transformers, unwatched, watched, and asked for all their weights.

`python -m regard.bench.watch llama 4096 2 watched` is a process of its own that measures memory: which model, how many
tokens, the threads, and whether it is "watched", "unwatched" or "eager".
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regard.bench.length import held
from regard.bench.measure import race
from regard.watch import Recording, watch

# The matrices of weights that an eager model gives are kept whole: those that would fill a machine are not asked for.
_MOST_WEIGHTS = 4 * 2**30


@dataclass(frozen=True)
class Length:
    """A model, its text, and the most that watching is to cost beside the same model unwatched."""

    model: str
    tokens: int
    goal: float


LENGTHS = [
    Length("bert", 512, 1.4),
    Length("llama", 1024, 1.6),
    Length("llama", 4096, 1.6),
    Length("llama", 16384, 1.6),
]


@dataclass(frozen=True)
class Result:
    """Milliseconds and bytes of a whole forward pass; None where it was not asked for.

    ratio: watched : unwatched, the median over the turns. error: of the output, watched beside unwatched, relative to its
    scale. weights_error: of the largest weights, beside the eager ones. memory: beyond the model.
    """

    length: Length
    unwatched_ms: float
    watched_ms: float
    eager_ms: float | None
    ratio: float
    error: float
    weights_error: float | None
    watched_memory: int | None
    unwatched_memory: int | None


def measure(lengths: Sequence[Length], threads: int, rounds: int = 7) -> Iterator[Result]:
    """Measure each: all three ways in turns, in this process, and the memory of two of them in their own."""
    torch.set_num_threads(threads)
    for length in lengths:
        model, ids = _model(length)
        heads = model.config.num_hidden_layers * model.config.num_attention_heads
        eager = heads * length.tokens**2 * 4 <= _MOST_WEIGHTS
        with torch.no_grad():
            before, after = _run(model, ids, "unwatched")[0], _run(model, ids, "watched")
            weights_error = None
            if eager:
                weights_error = _weights_error(after[1], _run(model, ids, "eager")[1])
            ways = ["unwatched", "watched", *(["eager"] if eager else [])]
            calls: list[Callable[[], object]] = [partial(_run, model, ids, way) for way in ways]
            times = race(calls, rounds=(rounds if length.tokens < 10_000 else 3, rounds), burst=0.0)
        medians = [statistics.median(taken) * 1e3 for taken in times]
        yield Result(
            length=length,
            unwatched_ms=medians[0],
            watched_ms=medians[1],
            eager_ms=medians[2] if eager else None,
            ratio=statistics.median(b / a for a, b in zip(times[0], times[1], strict=True)),
            error=float((after[0] - before).abs().max() / before.abs().max()),
            weights_error=weights_error,
            watched_memory=_memory(length, threads, "watched"),
            unwatched_memory=_memory(length, threads, "unwatched"),
        )


def _model(length: Length) -> tuple[Any, Tensor]:
    """A model of random weights, and a text."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("this measures models of transformers: pip install 'regard[look]'") from error
    torch.manual_seed(0)
    model: Any
    if length.model == "bert":
        model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    else:
        config = transformers.LlamaConfig(
            vocab_size=1000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
            max_position_embeddings=32768,
        )  # fmt: skip
        model = transformers.LlamaModel(config)
    return model.eval(), torch.randint(5, 1000, (1, length.tokens))


def _run(model: Any, ids: Tensor, way: str) -> tuple[Tensor, Any]:
    """The output, and what was seen: by a watch, or all weights of an eager model."""
    model.set_attn_implementation("eager" if way == "eager" else "sdpa")
    words = {"use_cache": False} if model.config.model_type == "llama" else {}
    with watch(model) if way == "watched" else nullcontext() as seen:
        out = model(ids, output_attentions=way == "eager", **words)
    return out.last_hidden_state, out.attentions if way == "eager" else seen


def _weights_error(seen: Recording, weights: Sequence[Tensor]) -> float:
    """How far the weights that a watch tells are from those of the eager model, at most."""
    return max(
        float(
            (record.top.weights - whole.gather(-1, record.top.keys.clamp(min=0)) * (record.top.keys >= 0)).abs().max()
        )
        for record, whole in zip(seen, weights, strict=True)
    )


def _memory(length: Length, threads: int, way: str) -> int | None:
    if sys.platform != "linux":
        return None
    done = subprocess.run(
        [sys.executable, "-m", "regard.bench.watch", length.model, str(length.tokens), str(threads), way],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise OSError(f"the process that measures memory has failed: {done.stderr.strip().splitlines()[-1]}")
    return int(json.loads(done.stdout))


def _beyond(length: Length, way: str) -> int:
    model, ids = _model(length)
    with torch.no_grad():
        _run(model, ids[:, :16], way)  # what the first call sets up is not the text's
        before = held()
        kept = _run(model, ids, way)
    assert kept is not None
    return held() - before


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(_beyond(Length(sys.argv[1], int(sys.argv[2]), 0.0), sys.argv[4])))
