"""Base class of tasks: a model with its vocabularies, its loss and metrics, saving and loading."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard import deprecated
from regard.files import write_atomically
from regard.tasks.lines import DataError
from regard.tasks.split import remark_on_overlap, split
from regard.tasks.tokens import Tokens, remark_on_characters
from regard.version import __version__

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Called with the number of processed examples and the total number.
ProgressCallback = Callable[[int, int], None]


def ignore_progress(done: int, of: int) -> None:
    """Do nothing (the default progress callback)."""


class Task(ABC):
    """A model with its vocabularies for one kind of problem.

    A frozen dataclass of settings determines the model; vocabularies, labels and parameters are learned from examples.
    """

    kind: ClassVar[str]
    settings_of: ClassVar[type[Any]]  # the dataclass of settings

    def __init__(self, settings: Any, tokens: dict[str, Tokens], labels: Sequence[str] = ()) -> None:
        self.settings, self.tokens, self.labels = settings, tokens, list(labels)
        self.model = self.build()

    @property
    @abstractmethod
    def metric(self) -> str:
        """The metric that selects the best epoch: a key of the result of `evaluate`."""

    @property
    def fewer_is_better(self) -> bool:
        """Whether lower values of the metric are better."""
        return False

    @classmethod
    def packages(cls, settings: Any) -> tuple[str, ...]:
        """Return the packages that training and evaluation need, in addition to those of all tasks."""
        return ()

    @classmethod
    @abstractmethod
    def learn_tokens(cls, settings: Any, examples: Sequence[Any]) -> tuple[dict[str, Tokens], list[str]]:
        """Build the vocabularies, by name, and the list of labels from examples."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Create the model for the settings and the sizes of the vocabularies."""

    @abstractmethod
    def encode(self, examples: Sequence[Any]) -> list[Any]:
        """Convert examples to integers. Raises a DataError for invalid examples."""

    @abstractmethod
    def size(self, encoded: Any) -> int:
        """Return the number of tokens of an example, which determines the batches."""

    @abstractmethod
    def loss(self, batch: Sequence[Any]) -> tuple[Tensor, int]:
        """Return the mean loss of encoded examples, and the number of predictions it is averaged over."""

    @abstractmethod
    def evaluate(self, examples: Sequence[Any], tell: ProgressCallback = ignore_progress) -> dict[str, float]:
        """Return the metrics of the model on examples, by name. `tell` is called with the progress."""

    @classmethod
    def begin(cls, settings: Any, examples: Sequence[Any], seed: int = 0) -> Any:
        """Create a task with a newly initialized model, and vocabularies from these examples."""
        tokens, labels = cls.learn_tokens(settings, examples)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(settings, tokens, labels)

    @classmethod
    def check(cls, examples: Sequence[Any]) -> None:
        """Raise a DataError if nothing can be learned from the training examples."""
        if not examples:
            raise DataError("got no training examples; expected at least one")

    @classmethod
    def hold_out(cls, examples: Sequence[Any], share: float, seed: int = 0) -> list[list[Any]]:
        """Split examples into training examples and a fraction of dev examples, whose labels all occur in training."""
        return split(examples, [share], seed)

    @classmethod
    def remarks(cls, examples: Sequence[Any], dev: Sequence[Any]) -> list[str]:
        """Return what a user must know of training and dev examples to judge the metrics, one line each."""
        return remark_on_overlap(examples, dev)

    def remarks_on_texts(self, texts: Sequence[str]) -> list[str]:
        """Return what a user must know of texts to judge the predictions for them, one line each."""
        return remark_on_characters(texts, next(iter(self.tokens.values())))

    @property
    def attends_to_words(self) -> bool:
        """Whether the model attends to words, which `regard look` shows."""
        return True

    def chance(self, examples: Sequence[Any]) -> tuple[float, str] | None:
        """Return the `metric` of the best answer that is always the same, and this answer; None if there is none."""
        return None

    def better(self, measured: dict[str, float], than: dict[str, float] | None) -> bool:
        """Return whether the metrics `measured` are better than `than`. If `metric` is equal, as BLEU is in the first epochs
        (0), the other metrics decide.
        """
        if than is None:
            return True
        names = sorted(measured, key=lambda name: name != self.metric)
        new, old = ([metrics[name] for name in names] for metrics in (measured, than))
        return new < old if self.fewer_is_better else new > old

    # -----------------------------------------------------------------------------------------------------------------
    # The directory: config.json, model.safetensors, and one JSON file per vocabulary.

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads. Each file is written atomically."""
        from safetensors.torch import save_file

        for name, tokens in self.tokens.items():
            write_atomically(folder / f"{name}.json", tokens.save)
        config = {
            "regard": __version__,
            "task": self.kind,
            "settings": dataclasses.asdict(self.settings),
            "vocabularies": list(self.tokens),
            "labels": self.labels,
        }
        write_atomically(
            folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        )
        weights = {name: x.contiguous() for name, x in _unique_state(self.model).items()}
        write_atomically(folder / WEIGHTS, lambda path: save_file(weights, path))

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> Any:
        """Load a task that `save` wrote. The directory is not trusted: no code in it is executed."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config_path = folder / CONFIG
        try:
            settings = cls.settings_of(**config["settings"])
            names, labels = list(config["vocabularies"]), list(config["labels"])
            if not all(isinstance(name, str) and name.isidentifier() for name in names):
                raise ValueError(f"vocabularies is {names!r}; expected plain names")
            tokens = {name: Tokens.load(folder / f"{name}.json") for name in names}
            # Sizes in the configuration allocate no memory before they are compared with the file of weights.
            with torch.device("meta"):
                task = cls(settings, tokens, labels)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{config_path}: is not a valid configuration for this version of regard ({error})"
            ) from error
        path = folder / WEIGHTS
        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        expected = {name: x.shape for name, x in _unique_state(task.model).items()}
        if expected != {name: x.shape for name, x in weights.items()}:
            raise DataError(f"{path}: does not contain the weights of the model in {config_path}")
        model: nn.Module = task.model
        model.load_state_dict({**weights, **_tied_state(model, weights)}, assign=True)
        model.eval()
        return task


def most_frequent(labels: Iterable[str]) -> tuple[float, str]:
    """Return the share of the most frequent label, in percent, and this label.

    >>> most_frequent(["+", "-", "+", "+"])
    (75.0, '+')
    """
    counts = Counter(labels)
    [(label, count)] = counts.most_common(1)
    return 100.0 * count / counts.total(), label


def _unique_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model. Tied ones are listed once, by their first name."""
    state: dict[str, Tensor] = {}
    visited: set[int] = set()
    for name, x in model.state_dict(keep_vars=True).items():
        if id(x) not in visited:
            visited.add(id(x))
            state[name] = x.detach()
    return state


def _tied_state(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of all names, including the further names of tied parameters."""
    first: dict[int, str] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        first.setdefault(id(x), name)
    return {name: weights[first[id(x)]] for name, x in model.state_dict(keep_vars=True).items()}


__getattr__ = deprecated.getter("regard.tasks.task")
