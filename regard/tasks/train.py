"""Training: from examples to a directory with the model that did best on the dev examples."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard import check
from regard.tasks.batch import deal
from regard.tasks.data import DataError
from regard.tasks.task import Task, write_whole
from regard.tasks.workers import Workers

METRICS, CURVES, _CHECKPOINT = "metrics.json", "curves.png", "checkpoint.pt"


@dataclass(frozen=True)
class Training:
    """How to train.

    Args:
        epochs: how often the examples are gone through, at most.
        batch: how many tokens a step learns from, padding included.
        rate: the largest learning rate. It rises over `warmup` steps, and falls to 0 at the last epoch along a cosine.
        decay: of the weights (AdamW).
        average: the model that is kept is a mean over the steps, in which older ones count less by this factor each.
        patience: training ends after so many epochs without a better result on the dev examples.
        seed: fixes the first weights, the order of the examples and what is dropped: the same seed gives the same model on
            the same machine with as many threads.
        bf16: compute products in bfloat16.
        workers: how many processes share each batch; the results of one number are not those of another.
    """

    epochs: int = 20
    batch: int = 2048
    rate: float = 1e-3
    warmup: int = 400
    decay: float = 0.01
    average: float = 0.998
    patience: int = 5
    seed: int = 0
    bf16: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "patience", "workers"):
            check.whole(f"training: {name}", getattr(self, name), 1)
        check.whole("training: warmup", self.warmup, 0)
        check.whole("training: seed", self.seed, 0)
        check.positive("training: rate", self.rate)
        for name in ("decay", "average"):
            value = getattr(self, name)
            if not check.is_number(value) or not 0 <= value < 1:
                raise check.wrong(f"training: {name}", value, "a number from 0 to 1, without 1", check.is_number(value))


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to."""

    number: int  # from 1
    loss: float  # the mean over its steps
    dev: dict[str, float]
    seconds: float
    tokens: int  # learned from
    best: bool  # better than every epoch before


@dataclass(frozen=True)
class Step:
    """Where training stands."""

    epoch: int  # from 1
    done: int  # steps of this epoch
    steps: int  # of this epoch, in all
    loss: float  # of the last step
    speed: float  # tokens a second


@dataclass
class History:
    """All epochs of a run."""

    epochs: list[Epoch] = field(default_factory=list)

    @property
    def best(self) -> Epoch | None:
        """The epoch whose model is kept."""
        return next((epoch for epoch in reversed(self.epochs) if epoch.best), None)


def train(
    kind: type[Task],
    settings: Any,
    training: Training,
    examples: Sequence[Any],
    dev: Sequence[Any],
    out: Path,
    *,
    tell: Callable[[Step | Epoch], None] = lambda _: None,
    limit: float = math.inf,
) -> tuple[Task, History]:
    """Train a task, and leave it in a directory. A run that was interrupted goes on where its last epoch ended, to the same
    results.

    Args:
        kind: what to learn, such as `translate.Translate`.
        settings: those of the kind.
        training: how to train.
        examples, dev: what to learn from, and what to choose the best epoch by.
        out: the directory; made if it is not there.
        tell: told of every step and epoch.
        limit: seconds after which no further epoch begins.

    Returns:
        The task, with the model of its best epoch, and what each epoch came to.

    Raises:
        DataError: an example cannot be learned from, or `out` holds something else.
        ImportError: a package is missing that is needed later on.
    """
    # Not after an epoch, when it is first used.
    for package in ("safetensors", "tokenizers", "matplotlib", *kind.packages(settings)):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"training needs the package {package}: pip install 'regard[tasks]'")
    began = time.monotonic()
    wanted = {"task": kind.kind, "settings": dataclasses.asdict(settings), "training": dataclasses.asdict(training)}
    saved = _resume(out, wanted)
    task: Task = kind.begin(settings, examples, training.seed)
    encoded = task.encode(examples)
    sizes = [task.size(one) for one in encoded]
    history = History()
    run = _Run(task, encoded, training, steps=len(deal(sizes, training.batch)) * training.epochs)
    if saved is not None:
        history.epochs = [Epoch(**epoch) for epoch in saved["epochs"]]
        run.load(saved)
    with closing(run.workers):
        _go_on(run, history, sizes, dev, out, wanted, began + limit, tell)
    (out / _CHECKPOINT).unlink(missing_ok=True)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return kind.load(out, config), history


def _go_on(
    run: _Run, history: History, sizes: Sequence[int], dev: Sequence[Any], out: Path, wanted: dict[str, Any], end: float,
    tell: Callable[[Step | Epoch], None],
) -> None:  # fmt: skip
    """The epochs after those of the history."""
    task, training = run.task, run.training
    for number in range(len(history.epochs) + 1, training.epochs + 1):
        best = history.best
        if best is not None and number - best.number > training.patience:
            break
        if time.monotonic() > end:
            break
        started = time.monotonic()
        # What is drawn in an epoch depends on its number alone, so that it can be begun anew.
        seed = training.seed * 1_000_003 + number
        batches = deal(sizes, training.batch, torch.Generator().manual_seed(seed))
        total, tokens = 0.0, 0
        with run.workers.epoch(seed):
            for done, batch in enumerate(batches, 1):
                loss = run.step(batch)
                total, tokens = total + loss, tokens + sum(sizes[i] for i in batch)
                tell(Step(number, done, len(batches), loss, tokens / (time.monotonic() - started)))
        with run.averaged():
            measured = task.evaluate(dev)
            better = task.better(measured, best.dev if best else None)
            epoch = Epoch(number, total / len(batches), measured, time.monotonic() - started, tokens, better)
            history.epochs.append(epoch)
            if better:
                task.save(out)
        run.save(out / _CHECKPOINT, {**wanted, "epochs": [dataclasses.asdict(one) for one in history.epochs]})
        _write(out, wanted, history)
        tell(epoch)


class _Run:
    """A model, its optimiser, and the mean of its weights."""

    def __init__(self, task: Task, encoded: Sequence[Any], training: Training, steps: int) -> None:
        self.task, self.training = task, training
        self.workers = Workers(task, encoded, training.workers, training.bf16)
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        # Vectors, such as biases and the scales of norms, are not drawn to 0.
        matrices, vectors = ([p for p in self.parameters if (p.dim() > 1) == many] for many in (True, False))
        groups = [{"params": matrices, "weight_decay": training.decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=training.rate, betas=(0.9, 0.98), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda n: _share(n, training.warmup, steps))
        self.mean = [p.detach().clone() for p in self.parameters]
        self.steps = 0

    def step(self, batch: Sequence[int]) -> float:
        """Learn from a batch, numbers of examples; give its loss."""
        self.task.model.train()
        value = self.workers.differentiate(batch)
        if not math.isfinite(value):
            raise DataError(f"the loss is {value} after {self.steps} steps; try a smaller --rate")
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.steps += 1
        # A mean over few steps must not remember where they began.
        keep = min(self.training.average, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1 - keep)
        return value

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """For the time of a block, the model has its mean weights, and drops nothing."""
        kept = [p.detach().clone() for p in self.parameters]
        self._set(self.mean)
        self.task.model.eval()
        try:
            yield
        finally:
            self._set(kept)

    def _set(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_([*self.parameters], [*weights])

    def save(self, path: Path, more: dict[str, Any]) -> None:
        state = {
            "weights": [p.detach() for p in self.parameters],
            "mean": self.mean,
            "buffers": dict(self.task.model.named_buffers()),
            "optimiser": self.optimiser.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "steps": self.steps,
            **more,
        }
        write_whole(path, lambda part: torch.save(state, part))

    def load(self, saved: dict[str, Any]) -> None:
        with torch.no_grad():
            for own, mean, weight, other in zip(
                self.parameters, self.mean, saved["weights"], saved["mean"], strict=True
            ):
                own.copy_(weight)
                mean.copy_(other)
            for name, buffer in self.task.model.named_buffers():
                buffer.copy_(saved["buffers"][name])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.schedule.last_epoch = saved["schedule"]["last_epoch"]
        self.steps = saved["steps"]


def _share(step: int, warmup: int, steps: int) -> float:
    """Which share of the largest rate a step has."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))


def _resume(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint of a run that was interrupted, if there is one."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out: {out} is a file; expected a directory, or a name for a new one")
    out.mkdir(parents=True, exist_ok=True)
    path = out / _CHECKPOINT
    if path.exists():
        try:
            saved: dict[str, Any] = torch.load(path, weights_only=True)
        except Exception as error:  # whatever a damaged file makes of the reader
            raise DataError(f"{path}: is no checkpoint ({error}); remove it to begin anew") from error
        for name in ("task", "settings", "training"):
            if saved.get(name) != wanted[name]:
                others = _difference(saved.get(name), wanted[name])
                raise DataError(
                    f"--out: {out} holds an interrupted run with other settings ({others}); give the same to go on, or "
                    f"another directory, or remove {path.name} to begin anew"
                )
        return saved
    if any(out.iterdir()):
        raise DataError(f"--out: {out} is not empty; expected a new directory, or one with an interrupted run")
    return None


def _difference(old: Any, new: Any) -> str:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"{old!r} before, {new!r} now"
    return ", ".join(f"{key} was {old.get(key)!r}, and is {new[key]!r}" for key in new if old.get(key) != new[key])


def _write(out: Path, wanted: dict[str, Any], history: History) -> None:
    """The measurements so far, for machines, and as curves for people."""
    best = history.best
    measured = {
        **wanted,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "best": best.dev if best else None,
        "epochs": [dataclasses.asdict(epoch) for epoch in history.epochs],
    }
    write_whole(out / METRICS, lambda path: path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8"))
    draw(history, out / CURVES)


def draw(history: History, path: Path) -> None:
    """Draw the loss and the measures of the dev examples, an epoch a point."""
    from matplotlib.figure import Figure

    names = list(history.epochs[0].dev)
    figure = Figure(figsize=(4 * (len(names) + 1), 3.2), layout="constrained")
    axes = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    numbers = [epoch.number for epoch in history.epochs]
    best = history.best
    curves = {
        "training loss": [e.loss for e in history.epochs],
        **{n: [e.dev[n] for e in history.epochs] for n in names},
    }
    for axis, (name, values) in zip(axes, curves.items(), strict=True):
        axis.plot(numbers, values, marker=".", color="#2563eb")
        if best is not None:
            axis.axvline(best.number, color="#94a3b8", linewidth=1, linestyle=":")
        axis.set_title(name if name == "training loss" else f"dev: {name}", fontsize=10)
        axis.set_xlabel("epoch", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    write_whole(path, lambda part: figure.savefig(part, dpi=120, format="png"))
