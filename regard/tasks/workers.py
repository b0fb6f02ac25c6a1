"""Data-parallel processes that share the batch of a step. Matrix products of small models do not scale with threads, but
batches scale with processes.
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


class PartialLoss(NamedTuple):
    """The mean loss of a part of a batch, and the number of predictions that it is averaged over."""

    loss: float
    predictions: int


class Workers:
    """Processes that compute the gradient of a batch together, each on a part of the examples, with shared weights.

    Args:
        task: the task to train.
        encoded: the encoded examples.
        count: number of processes, including this one. The current number of threads is divided among them.
        bf16: compute matrix products in bfloat16.
    """

    def __init__(self, task: Task, encoded: Sequence[Any], count: int, bf16: bool) -> None:
        self.task, self.encoded, self.bf16 = task, encoded, bf16
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        self.sizes = [p.numel() for p in self.parameters]
        self.threads = torch.get_num_threads()
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self.gradients: list[Tensor] = []  # per worker, the flattened gradients of all parameters, in shared memory
        if count == 1:
            return
        # Forking a process after its threads have computed is unsafe.
        context = multiprocessing.get_context("spawn")
        task.model.share_memory()
        for _ in range(1, count):
            gradient = torch.zeros(sum(self.sizes))
            gradient.share_memory_()  # type: ignore[no-untyped-call]
            ours, theirs = context.Pipe()
            arguments = (theirs, task, list(encoded), gradient, self.own_threads(count), bf16)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
            self.gradients.append(gradient)

    def own_threads(self, count: int) -> int:
        """Return the number of threads per process, for `count` processes."""
        return max(self.threads // count, 1)

    @contextmanager
    def epoch(self, seed: int) -> Iterator[None]:
        """Context of the steps of an epoch: sets the seeds of dropout, and the number of threads of each process."""
        torch.manual_seed(seed)
        for rank, pipe in enumerate(self.pipes, 1):
            _send(pipe, seed + rank * 7_368_787)
        if self.pipes:
            torch.set_num_threads(self.own_threads(len(self.pipes) + 1))
        try:
            yield
        finally:
            torch.set_num_threads(self.threads)

    def differentiate(self, batch: Sequence[int]) -> float:
        """Return the mean loss of the examples with these indices, and set the gradients of the parameters."""
        count = len(self.pipes) + 1
        busy: list[tuple[Connection, Tensor]] = []
        for rank, (pipe, gradient) in enumerate(zip(self.pipes, self.gradients, strict=True), 1):
            if part := batch[rank::count]:
                _send(pipe, part)
                busy.append((pipe, gradient))
        own = differentiate(self.task, [self.encoded[i] for i in batch[::count]], self.parameters, self.bf16)
        if not busy:
            return own.loss
        others = [_receive(pipe) for pipe, _ in busy]
        total = own.predictions + sum(other.predictions for other in others)
        sums = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(sums, own.predictions / total)
        for other, (_, gradient) in zip(others, busy, strict=True):
            parts = torch.split_with_sizes(gradient, self.sizes)
            terms = [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True) if p.grad is not None]
            torch._foreach_add_(sums, terms, alpha=other.predictions / total)
        return sum(part.loss * (part.predictions / total) for part in (own, *others))

    def close(self) -> None:
        """Stop the other processes."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join()
        self.processes, self.pipes, self.gradients = [], [], []


def differentiate(task: Task, batch: Sequence[Any], parameters: Sequence[nn.Parameter], bf16: bool) -> PartialLoss:
    """Compute the mean loss of encoded examples, and set the gradients of the parameters."""
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        loss, count = task.loss(batch)
    for p in parameters:
        p.grad = None
    torch.autograd.backward(loss)
    return PartialLoss(float(loss.detach()), count)


_EXITED = "a worker process exited unexpectedly; the system may have run out of memory"


def _send(pipe: Connection, message: int | Sequence[int]) -> None:
    """Send a seed, or the indices of examples, to a worker."""
    try:
        pipe.send(message)
    except OSError:
        raise RuntimeError(_EXITED) from None


def _receive(pipe: Connection) -> PartialLoss:
    """Receive the loss of a worker, or raise its error."""
    try:
        message = pipe.recv()
    except (EOFError, OSError):
        raise RuntimeError(_EXITED) from None
    if isinstance(message, str):
        raise RuntimeError(f"a worker process failed:\n{message}")
    return PartialLoss(*message)


def _work(
    pipe: Connection, task: Task, encoded: Sequence[Any], gradient: Tensor, threads: int, bf16: bool
) -> None:  # pragma: no cover - in another process
    """Compute gradients of parts of batches until the pipe is closed. An integer sets the seed of dropout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles interrupts
    torch.set_num_threads(threads)
    task.model.train()
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        if isinstance(message, int):
            torch.manual_seed(message)
            continue
        try:
            part = differentiate(task, [encoded[i] for i in message], parameters, bf16)
            flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            torch.cat([x.flatten() for x in flat], out=gradient)
            pipe.send(tuple(part))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
