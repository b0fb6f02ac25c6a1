"""Time and memory of `regard.watch`: models of transformers without a watch, with one, and returning all weights.

Memory is measured in its own process, `python -m regard.bench.watch llama 4096 2 watched`: model, number of tokens,
number of threads, and mode ("watched", "unwatched" or "eager").
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

from regard.bench.length import peak_memory
from regard.bench.measure import time_interleaved
from regard.watch import Recording, watch

# In bytes. An eager model returns all of its weights; it is skipped where they would take more than this.
_MAX_WEIGHTS = 4 * 2**30


@dataclass(frozen=True)
class WatchCase:
    """A model, the length of its input, and the goal for the ratio of the times with and without a watch."""

    model: str
    tokens: int
    goal: float


CASES = [
    WatchCase("bert", 512, 1.4),
    WatchCase("llama", 1024, 1.6),
    WatchCase("llama", 4096, 1.6),
    WatchCase("llama", 16384, 1.6),
]


@dataclass(frozen=True)
class WatchResult:
    """Milliseconds and bytes of a forward pass; None where it was not measured.

    ratio: watched / unwatched, the median over the rounds. error: of the watched output relative to the largest element
    of the unwatched one. weights_error: of the recorded weights against the eager ones. memory: in addition to the
    model.
    """

    case: WatchCase
    unwatched_ms: float
    watched_ms: float
    eager_ms: float | None
    ratio: float
    error: float
    weights_error: float | None
    watched_memory: int | None
    unwatched_memory: int | None


def measure(cases: Sequence[WatchCase], threads: int, rounds: int = 7) -> Iterator[WatchResult]:
    """Measure cases: time of the three modes interleaved in this process, and memory of two of them in their own."""
    torch.set_num_threads(threads)
    for case in cases:
        model, ids = _model(case)
        heads = model.config.num_hidden_layers * model.config.num_attention_heads
        eager = heads * case.tokens**2 * 4 <= _MAX_WEIGHTS
        with torch.no_grad():
            before, after = _run(model, ids, "unwatched")[0], _run(model, ids, "watched")
            weights_error = None
            if eager:
                weights_error = _weights_error(after[1], _run(model, ids, "eager")[1])
            modes = ["unwatched", "watched", *(["eager"] if eager else [])]
            calls: list[Callable[[], object]] = [partial(_run, model, ids, mode) for mode in modes]
            times = time_interleaved(calls, rounds=(rounds if case.tokens < 10_000 else 3, rounds), burst=0.0)
        medians = [statistics.median(taken) * 1e3 for taken in times]
        yield WatchResult(
            case=case,
            unwatched_ms=medians[0],
            watched_ms=medians[1],
            eager_ms=medians[2] if eager else None,
            ratio=statistics.median(b / a for a, b in zip(times[0], times[1], strict=True)),
            error=float((after[0] - before).abs().max() / before.abs().max()),
            weights_error=weights_error,
            watched_memory=_memory(case, threads, "watched"),
            unwatched_memory=_memory(case, threads, "unwatched"),
        )


@dataclass(frozen=True)
class StepCase:
    """A step of decoding: one query, and the keys of a cache. `model` is "llama", or "layer": one call of SDPA."""

    model: str
    keys: int
    goal: float = 2.0


STEPS = [StepCase("layer", 512), StepCase("layer", 2048), StepCase("llama", 512), StepCase("llama", 4096)]


@dataclass(frozen=True)
class StepResult:
    """Microseconds per step; `ratio`: watched / unwatched, the median over the rounds."""

    case: StepCase
    unwatched_us: float
    watched_us: float
    ratio: float


def measure_steps(cases: Sequence[StepCase], threads: int, rounds: int = 15, steps: int = 40) -> Iterator[StepResult]:
    """Measure steps of decoding, with and without a watch around all of them, interleaved."""
    torch.set_num_threads(threads)
    for case in cases:
        model, step = _decoder(case)
        calls = [partial(_decode, model, step, steps, is_watched) for is_watched in (False, True)]
        with torch.no_grad():
            unwatched, watched = time_interleaved(calls, rounds=(rounds, rounds), burst=0.0)
        yield StepResult(
            case=case,
            unwatched_us=statistics.median(unwatched) / steps * 1e6,
            watched_us=statistics.median(watched) / steps * 1e6,
            ratio=statistics.median(b / a for a, b in zip(unwatched, watched, strict=True)),
        )


class _SingleCall(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _decoder(case: StepCase) -> tuple[torch.nn.Module, Callable[[], object]]:
    """Return a model, and a function that runs one step of it."""
    if case.model == "layer":
        layer = _SingleCall()
        q, k, v = (torch.randn(1, 8, length, 64) for length in (1, case.keys, case.keys))
        return layer, lambda: layer(q, k, v)
    model, ids = _model(WatchCase("llama", case.keys, 0.0))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values

    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return model, step


def _decode(model: torch.nn.Module, step: Callable[[], object], steps: int, is_watched: bool) -> None:
    with watch(model) if is_watched else nullcontext():
        for _ in range(steps):
            step()


def _model(case: WatchCase) -> tuple[Any, Tensor]:
    """Return a model with random parameters, and token ids."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("this benchmark requires transformers: pip install 'regard[look]'") from error
    torch.manual_seed(0)
    model: Any
    if case.model == "bert":
        model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    else:
        config = transformers.LlamaConfig(
            vocab_size=1000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
            max_position_embeddings=32768,
        )  # fmt: skip
        model = transformers.LlamaModel(config)
    return model.eval(), torch.randint(5, 1000, (1, case.tokens))


def _run(model: Any, ids: Tensor, mode: str) -> tuple[Tensor, Any]:
    """Return the output, and the recording of a watch or all weights of an eager model."""
    model.set_attn_implementation("eager" if mode == "eager" else "sdpa")
    arguments = {"use_cache": False} if model.config.model_type == "llama" else {}
    with watch(model) if mode == "watched" else nullcontext() as recording:
        out = model(ids, output_attentions=mode == "eager", **arguments)
    return out.last_hidden_state, out.attentions if mode == "eager" else recording


def _weights_error(recording: Recording, weights: Sequence[Tensor]) -> float:
    """Return the maximum absolute error of the recorded weights against those of the eager model."""
    return max(
        float((record.top.weights - full.gather(-1, record.top.keys.clamp(min=0)) * (record.top.keys >= 0)).abs().max())
        for record, full in zip(recording, weights, strict=True)
    )


def _memory(case: WatchCase, threads: int, mode: str) -> int | None:
    if sys.platform != "linux":
        return None
    process = subprocess.run(
        [sys.executable, "-m", "regard.bench.watch", case.model, str(case.tokens), str(threads), mode],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if process.returncode:
        raise OSError(f"the process that measures memory failed: {process.stderr.strip().splitlines()[-1]}")
    return int(json.loads(process.stdout))


def _added_memory(case: WatchCase, mode: str) -> int:
    model, ids = _model(case)
    with torch.no_grad():
        _run(model, ids[:, :16], mode)  # one-time setup is not counted
        before = peak_memory()
        result = _run(model, ids, mode)
    assert result is not None
    return peak_memory() - before


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(_added_memory(WatchCase(sys.argv[1], int(sys.argv[2]), 0.0), sys.argv[4])))
