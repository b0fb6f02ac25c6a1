"""Workers: processes that share the work of a step. Products of small models gain little from more threads; a step whose
batch is shared out among processes gains all there is.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard.tasks.task import Task


class Share(NamedTuple):
    """What a part of a batch came to: its mean loss, and of how many predictions that is the mean."""

    loss: float
    predictions: int


class Workers:
    """A crew of processes, this one among them, that take the gradient of a batch together: each of its share of the
    examples. All see the same weights.

    Args:
        task: what learns. encoded: its examples, as numbers.
        count: how many processes, this one included. Each has as many threads as this one has now, divided by it.
        bf16: compute products in bfloat16.
    """

    def __init__(self, task: Task, encoded: Sequence[Any], count: int, bf16: bool) -> None:
        self.task, self.encoded, self.bf16 = task, encoded, bf16
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        self.sizes = [p.numel() for p in self.parameters]
        self.threads = torch.get_num_threads()
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self.gradients: list[Tensor] = []  # of the others, all parameters in a row
        if count == 1:
            return
        # Forking a process whose threads have computed is not safe everywhere.
        context = multiprocessing.get_context("spawn")
        task.model.share_memory()
        for _ in range(1, count):
            gradient = torch.zeros(sum(self.sizes))
            gradient.share_memory_()  # type: ignore[no-untyped-call]
            ours, theirs = context.Pipe()
            given = (theirs, task, list(encoded), gradient, self.own_threads(count), bf16)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
            self.gradients.append(gradient)

    def own_threads(self, count: int) -> int:
        """The threads of each of so many processes."""
        return max(self.threads // count, 1)

    @contextmanager
    def epoch(self, seed: int) -> Iterator[None]:
        """For the steps of an epoch: what is dropped depends on this seed, and each process has its share of the threads."""
        torch.manual_seed(seed)
        for rank, pipe in enumerate(self.pipes, 1):
            _tell(pipe, seed + rank * 7_368_787)
        if self.pipes:
            torch.set_num_threads(self.own_threads(len(self.pipes) + 1))
        try:
            yield
        finally:
            torch.set_num_threads(self.threads)

    def differentiate(self, batch: Sequence[int]) -> float:
        """The mean loss of these examples; its gradient is that of the parameters then."""
        count = len(self.pipes) + 1
        busy: list[tuple[Connection, Tensor]] = []
        for rank, (pipe, gradient) in enumerate(zip(self.pipes, self.gradients, strict=True), 1):
            if share := batch[rank::count]:
                _tell(pipe, share)
                busy.append((pipe, gradient))
        own = differentiate(self.task, [self.encoded[i] for i in batch[::count]], self.parameters, self.bf16)
        if not busy:
            return own.loss
        others = [_answer(pipe) for pipe, _ in busy]
        total = own.predictions + sum(other.predictions for other in others)
        sums = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(sums, own.predictions / total)
        for other, (_, gradient) in zip(others, busy, strict=True):
            parts = torch.split_with_sizes(gradient, self.sizes)
            added = [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True) if p.grad is not None]
            torch._foreach_add_(sums, added, alpha=other.predictions / total)
        return sum(share.loss * (share.predictions / total) for share in (own, *others))

    def close(self) -> None:
        """End the other processes."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join()
        self.processes, self.pipes, self.gradients = [], [], []


def differentiate(task: Task, batch: Sequence[Any], parameters: Sequence[nn.Parameter], bf16: bool) -> Share:
    """The mean loss of encoded examples; its gradient is that of the parameters then."""
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        loss, count = task.loss(batch)
    for p in parameters:
        p.grad = None
    torch.autograd.backward(loss)
    return Share(float(loss.detach()), count)


_GONE = "a worker ended before its time; the system may have run out of memory"


def _tell(pipe: Connection, what: Any) -> None:
    """Send another process a seed, or its share."""
    try:
        pipe.send(what)
    except OSError:
        raise RuntimeError(_GONE) from None


def _answer(pipe: Connection) -> Share:
    """What another process says of its share."""
    try:
        said = pipe.recv()
    except (EOFError, OSError):
        raise RuntimeError(_GONE) from None
    if isinstance(said, str):
        raise RuntimeError(f"a worker failed:\n{said}")
    return Share(*said)


def _serve(
    pipe: Connection, task: Task, encoded: Sequence[Any], gradient: Tensor, threads: int, bf16: bool
) -> None:  # pragma: no cover - in another process
    """Take gradients of shares until the pipe is closed. A number seeds what is dropped from here on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the first process's to handle
    torch.set_num_threads(threads)
    task.model.train()
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        if isinstance(asked, int):
            torch.manual_seed(asked)
            continue
        try:
            share = differentiate(task, [encoded[i] for i in asked], parameters, bf16)
            flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            torch.cat([x.flatten() for x in flat], out=gradient)
            pipe.send(tuple(share))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
