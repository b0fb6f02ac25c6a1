"""Training: from examples to a directory with the model of the best epoch on the dev examples."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard import check
from regard.files import write_atomically
from regard.tasks.batch import make_batches
from regard.tasks.fit import Start, fit_to_data
from regard.tasks.lines import DataError
from regard.tasks.task import CONFIG, Task
from regard.tasks.workers import Workers

METRICS, CURVES, _CHECKPOINT = "metrics.json", "curves.png", "checkpoint.pt"
# While it exists, the other files may be incomplete: a run that was killed during its first save starts anew.
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Training:
    """Configuration of training.

    Args:
        epochs: maximum number of epochs.
        batch: number of tokens per batch, padding included.
        rate: maximum learning rate. It rises linearly over `warmup` steps, then falls to 0 along a cosine.
        decay: weight decay of AdamW.
        average: decay of the exponential moving average of the weights, which is evaluated and saved.
        patience: number of epochs without improvement on the dev examples after which training stops.
        seed: determines initial weights, order of examples and dropout. The same seed gives the same model on the same
            machine with the same number of threads.
        bf16: compute matrix products in bfloat16.
        workers: number of processes that share each batch. Results depend on it.
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
            check.integer(f"training: {name}", getattr(self, name), 1)
        check.integer("training: warmup", self.warmup, 0)
        check.integer("training: seed", self.seed, 0)
        check.positive("training: rate", self.rate)
        for name in ("decay", "average"):
            value = getattr(self, name)
            if not check.is_number(value) or not 0 <= value < 1:
                raise check.error(f"training: {name}", value, "a number from 0 to 1, without 1", check.is_number(value))


@dataclass(frozen=True)
class Epoch:
    """The result of one epoch."""

    number: int  # from 1
    loss: float  # mean over the steps
    dev: dict[str, float]  # metrics of the dev examples
    seconds: float
    tokens: int  # number of training tokens
    best: bool  # better than all epochs before


@dataclass(frozen=True)
class Step:
    """The state of training after one step."""

    epoch: int  # from 1
    done: int  # finished steps of this epoch
    steps: int  # total number of steps of this epoch
    loss: float  # of the last step
    speed: float  # tokens per second


@dataclass
class History:
    """The results of all epochs of a run."""

    epochs: list[Epoch] = field(default_factory=list)

    @property
    def best(self) -> Epoch | None:
        """The epoch whose model is saved."""
        return next((epoch for epoch in reversed(self.epochs) if epoch.best), None)

    def first_like(self, best: Epoch) -> Epoch:
        """Return the first epoch with the metrics of the best one, from which patience counts."""
        return next(epoch for epoch in self.epochs if epoch.dev == best.dev)


def train(
    kind: type[Task],
    settings: Any,
    training: Training,
    examples: Sequence[Any],
    dev: Sequence[Any],
    out: Path,
    *,
    tell: Callable[[Start | Step | Epoch], None] = lambda _: None,
    limit: float = math.inf,
    fixed: Collection[str] | None = None,
) -> tuple[Task, History]:
    """Train a task, and save it in a directory. An interrupted run resumes after its last epoch, with the same results.

    Args:
        kind: the task class, such as `translate.Translate`.
        settings: the settings of the task.
        training: the configuration of training.
        examples, dev: training examples, and the examples that select the best epoch.
        out: the directory; created if it does not exist.
        tell: callback that receives the `Start`, and every `Step` and `Epoch`.
        limit: time in seconds after which no epoch starts.
        fixed: the names of the fields of `training` that stay; the others follow the number of steps, see `fit_to_data`.
            By default all stay.

    Returns:
        The task with the model of the best epoch, and the results of all epochs.

    Raises:
        DataError: an example is invalid, or `out` contains other files.
        ImportError: a package is missing.

    >>> import pathlib, tempfile
    >>> from regard.tasks.classify import Classify, ClassifySettings
    >>> from regard.tasks.data import Labeled
    >>> from regard.tasks.lines import Location
    >>> from regard.tasks.train import Training, train
    >>> location = Location(pathlib.Path("reviews.tsv"), 1)
    >>> reviews = [Labeled(f"a {word} film", label, location) for word, label in [("good", "+"), ("bad", "-")] * 20]
    >>> settings = ClassifySettings(model="conv", width=16, dropout=0.0)
    >>> training = Training(epochs=2, batch=32, rate=0.05, warmup=1)
    >>> with tempfile.TemporaryDirectory() as out:
    ...     task, history = train(Classify, settings, training, reviews, reviews, pathlib.Path(out))
    >>> [prediction.label for prediction in task.predict(["a bad film", "a good film"])], history.best.dev["accuracy"]
    (['-', '+'], 100.0)
    """
    # Check before training, not when a package is first used after an epoch.
    for package in ("safetensors", "tokenizers", "matplotlib", *kind.packages(settings)):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"training needs the package {package}: pip install 'regard[tasks]'")
    start = time.monotonic()
    kind.check(examples)
    _check_out(out)
    task: Task = kind.begin(settings, examples, training.seed)
    encoded = task.encode(examples)
    task.encode(dev)  # raises for unknown labels, which `evaluate` would find after the first epoch
    sizes = [task.size(example) for example in encoded]
    if fixed is not None:
        training = fit_to_data(training, sizes, fixed)
    config = {
        "task": kind.kind, "settings": dataclasses.asdict(settings), "training": dataclasses.asdict(training),
        "data": _fingerprint(examples, dev),
    }  # fmt: skip
    saved = _load_checkpoint(out, config)
    history = History()
    steps = len(make_batches(sizes, training.batch))
    tell(Start(training, steps))
    run = _Run(task, encoded, training, steps=steps * training.epochs)
    if saved is not None:
        history.epochs = [Epoch(**epoch) for epoch in saved["epochs"]]
        run.load(saved)
    with closing(run.workers):
        _train_epochs(run, history, sizes, dev, out, config, start + limit, tell)
    for name in (_CHECKPOINT, _UNFINISHED):
        (out / name).unlink(missing_ok=True)
    return kind.load(out, json.loads((out / CONFIG).read_text(encoding="utf-8"))), history


def _train_epochs(
    run: _Run, history: History, sizes: Sequence[int], dev: Sequence[Any], out: Path, config: dict[str, Any], end: float,
    tell: Callable[[Step | Epoch], None],
) -> None:  # fmt: skip
    """Train the epochs after those in the history."""
    task, training = run.task, run.training
    for number in range(len(history.epochs) + 1, training.epochs + 1):
        best = history.best
        if best is not None and number - history.first_like(best).number > training.patience:
            break
        if time.monotonic() > end:
            break
        started = time.monotonic()
        # The random numbers of an epoch depend only on the seed and its number, so that it can be repeated.
        seed = training.seed * 1_000_003 + number
        batches = make_batches(sizes, training.batch, torch.Generator().manual_seed(seed))
        total, tokens = 0.0, 0
        with run.workers.epoch(seed):
            for done, batch in enumerate(batches, 1):
                loss = run.step(batch)
                total, tokens = total + loss, tokens + sum(sizes[i] for i in batch)
                tell(Step(number, done, len(batches), loss, tokens / (time.monotonic() - started)))
        with run.averaged():
            metrics = task.evaluate(dev)
            # Small dev sets have equal metrics in many epochs: then the model that fits the training data better is saved.
            is_tie = best is not None and metrics == best.dev and total / len(batches) < best.loss
            is_best = is_tie or task.better(metrics, best.dev if best else None)
            epoch = Epoch(number, total / len(batches), metrics, time.monotonic() - started, tokens, is_best)
            history.epochs.append(epoch)
            if is_best:
                task.save(out)
        run.save(out / _CHECKPOINT, {**config, "epochs": [dataclasses.asdict(e) for e in history.epochs]})
        _write_metrics(out, config, history)
        tell(epoch)


class _Run:
    """A model in training: its worker processes, optimizer, schedule, and the moving average of its weights."""

    def __init__(self, task: Task, encoded: Sequence[Any], training: Training, steps: int) -> None:
        self.task, self.training = task, training
        self.workers = Workers(task, encoded, training.workers, training.bf16)
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        # No weight decay for vectors, such as biases and the scales of norms.
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": training.decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=training.rate, betas=(0.9, 0.98), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _rate_factor(step, training.warmup, steps)
        )
        self.mean = [p.detach().clone() for p in self.parameters]
        self.steps = 0

    def step(self, batch: Sequence[int]) -> float:
        """Take one optimizer step on a batch, given as indices of examples. Return the loss."""
        self.task.model.train()
        loss = self.workers.differentiate(batch)
        if not math.isfinite(loss):
            raise DataError(f"the loss is {loss} after {self.steps} steps; try a smaller --rate")
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.steps += 1
        # A shorter average in the first steps, so that the initial weights are forgotten.
        decay = min(self.training.average, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1 - decay)
        return loss

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the averaged weights, in eval mode, within the context."""
        weights = [p.detach().clone() for p in self.parameters]
        self._set_weights(self.mean)
        self.task.model.eval()
        try:
            yield
        finally:
            self._set_weights(weights)

    def _set_weights(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_([*self.parameters], [*weights])

    def save(self, path: Path, more: dict[str, Any]) -> None:
        state = {
            "weights": [p.detach() for p in self.parameters],
            "mean": self.mean,
            "buffers": dict(self.task.model.named_buffers()),
            "optimiser": self.optimizer.state_dict(),  # the spelling of version 0.1, whose checkpoints can be resumed
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "steps": self.steps,
            **more,
        }
        write_atomically(path, lambda part: torch.save(state, part))

    def load(self, saved: dict[str, Any]) -> None:
        with torch.no_grad():
            self._set_weights(saved["weights"])
            torch._foreach_copy_(self.mean, saved["mean"])
            for name, buffer in self.task.model.named_buffers():
                buffer.copy_(saved["buffers"][name])
        self.optimizer.load_state_dict(saved["optimiser"])
        self.schedule.last_epoch = saved["schedule"]["last_epoch"]
        self.steps = saved["steps"]


def _rate_factor(step: int, warmup: int, steps: int) -> float:
    """Return the learning rate of a step as a fraction of the maximum."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))


def _check_out(out: Path) -> None:
    """Create the directory. Raise if it is a file, or holds something else than an interrupted run."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out: {out} is a file; expected a directory, or the name of a new one")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"--out: {out} cannot be created ({error.strerror}); expected the name of a new directory"
        ) from error
    if any(out.iterdir()) and not (out / _CHECKPOINT).exists() and not (out / _UNFINISHED).exists():
        raise DataError(f"--out: {out} is not empty; expected a new directory, or one with an interrupted run")
    (out / _UNFINISHED).touch()


def _fingerprint(*parts: Sequence[Any]) -> str:
    """Return a hash of the contents of examples."""
    digest = hashlib.sha256()
    for examples in parts:
        for example in examples:
            fields = example._asdict() if hasattr(example, "_asdict") else {"example": example}
            digest.update(repr([value for name, value in fields.items() if name != "place"]).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _load_checkpoint(out: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the checkpoint of an interrupted run, or None if the directory is new or empty."""
    path = out / _CHECKPOINT
    if path.exists():
        try:
            saved: dict[str, Any] = torch.load(path, weights_only=True)
        except Exception as error:  # a damaged file can raise anything
            raise DataError(
                f"{path}: is not a valid checkpoint ({error or type(error).__name__}); remove it to start over"
            ) from error
        if saved.get("data", config["data"]) != config["data"]:  # version 0.1 saved none
            raise DataError(
                f"--out: {out} contains an interrupted run on other data; use the same files to resume it, or another "
                f"directory, or remove {path.name} to start over"
            )
        for name in ("task", "settings", "training"):
            if saved.get(name) != config[name]:
                difference = _describe_difference(saved.get(name), config[name])
                raise DataError(
                    f"--out: {out} contains an interrupted run with other settings ({difference}); use the same settings "
                    f"to resume it, or another directory, or remove {path.name} to start over"
                )
        return saved
    return None


def _describe_difference(old: Any, new: Any) -> str:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"{old!r} before, {new!r} now"
    return ", ".join(f"{key} was {old.get(key)!r} and is now {new[key]!r}" for key in new if old.get(key) != new[key])


def _write_metrics(out: Path, config: dict[str, Any], history: History) -> None:
    """Write the metrics of all epochs as JSON, and plot them."""
    best = history.best
    metrics = {
        **config,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "best": best.dev if best else None,
        "epochs": [dataclasses.asdict(epoch) for epoch in history.epochs],
    }
    write_atomically(
        out / METRICS, lambda path: path.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    )
    draw(history, out / CURVES)


def draw(history: History, path: Path) -> None:
    """Plot the training loss and the metrics of the dev examples over epochs."""
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
    write_atomically(path, lambda part: figure.savefig(part, dpi=120, format="png"))
