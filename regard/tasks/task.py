"""What all tasks have in common: a model, its vocabularies, and how it learns, is measured, kept and loaded."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.tasks.data import DataError
from regard.tasks.tokens import Tokens
from regard.version import __version__

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Told how many of how many examples are done.
Tell = Callable[[int, int], None]


def quiet(done: int, of: int) -> None:
    """Tells nobody."""


class Task(ABC):
    """A model with its vocabularies, for one kind of problem.

    A kind has a frozen dataclass of settings, which fixes the model; all else is learned from examples.
    """

    kind: ClassVar[str]
    settings_of: ClassVar[type[Any]]  # a frozen dataclass

    def __init__(self, settings: Any, tokens: dict[str, Tokens], labels: Sequence[str] = ()) -> None:
        self.settings, self.tokens, self.labels = settings, tokens, list(labels)
        self.model = self.build()

    @property
    @abstractmethod
    def metric(self) -> str:
        """What is watched on the dev examples: the name of a measure that `evaluate` gives."""

    @property
    def fewer_is_better(self) -> bool:
        """Is it an error?"""
        return False

    @classmethod
    def packages(cls, settings: Any) -> tuple[str, ...]:
        """Packages that learning and measuring need, beside those of all tasks."""
        return ()

    @classmethod
    @abstractmethod
    def learn_tokens(cls, settings: Any, examples: Sequence[Any]) -> tuple[dict[str, Tokens], list[str]]:
        """The vocabularies, by name, and the labels, that the examples need."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model that the settings and the sizes of the vocabularies ask for."""

    @abstractmethod
    def encode(self, examples: Sequence[Any]) -> list[Any]:
        """Examples as numbers. Raises a DataError at what cannot be learned from."""

    @abstractmethod
    def size(self, encoded: Any) -> int:
        """How many tokens an example counts for when batches are dealt."""

    @abstractmethod
    def loss(self, batch: Sequence[Any]) -> tuple[Tensor, int]:
        """The mean loss of encoded examples, and how many predictions it is the mean of."""

    @abstractmethod
    def evaluate(self, examples: Sequence[Any], tell: Tell = quiet) -> dict[str, float]:
        """Measures of the model on examples, by name."""

    @classmethod
    def begin(cls, settings: Any, examples: Sequence[Any], seed: int = 0) -> Any:
        """A task with a fresh model, whose vocabularies come from these examples."""
        tokens, labels = cls.learn_tokens(settings, examples)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(settings, tokens, labels)

    def better(self, measured: dict[str, float], than: dict[str, float] | None) -> bool:
        """Is one measurement of the dev examples better than another? Where the metric is the same, as it is while a model
        translates nothing yet, the other measures decide.
        """
        if than is None:
            return True
        names = sorted(measured, key=lambda name: name != self.metric)
        new, old = ([one[name] for name in names] for one in (measured, than))
        return new < old if self.fewer_is_better else new > old

    # -----------------------------------------------------------------------------------------------------------------
    # A directory: config.json, model.safetensors, and a JSON file a vocabulary.

    def save(self, folder: Path) -> None:
        """Write all that `load` needs. A file is there whole or not at all."""
        from safetensors.torch import save_file

        for name, tokens in self.tokens.items():
            write_whole(folder / f"{name}.json", tokens.save)
        config = {
            "regard": __version__,
            "task": self.kind,
            "settings": dataclasses.asdict(self.settings),
            "vocabularies": list(self.tokens),
            "labels": self.labels,
        }
        write_whole(
            folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        )
        weights = {name: x.contiguous() for name, x in _once(self.model).items()}
        write_whole(folder / WEIGHTS, lambda path: save_file(weights, path))

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> Any:
        """The task that `save` wrote. Nothing in the directory is trusted: it holds numbers and names, and no code."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        place = folder / CONFIG
        try:
            settings = cls.settings_of(**config["settings"])
            names, labels = list(config["vocabularies"]), list(config["labels"])
            if not all(isinstance(name, str) and name.isidentifier() for name in names):
                raise ValueError(f"vocabularies is {names!r}; expected plain names")
            tokens = {name: Tokens.load(folder / f"{name}.json") for name in names}
            # No memory is taken before the file is seen to hold as much.
            with torch.device("meta"):
                task = cls(settings, tokens, labels)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place}: is not what this version of regard writes ({error})") from error
        path = folder / WEIGHTS
        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        expected = {name: x.shape for name, x in _once(task.model).items()}
        if expected != {name: x.shape for name, x in weights.items()}:
            raise DataError(f"{path}: does not hold the weights of the model that {place} tells of")
        model: nn.Module = task.model
        model.load_state_dict({**weights, **_twins(model, weights)}, assign=True)
        model.eval()
        return task


def _once(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model; one that has several names, by its first."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, x in model.state_dict(keep_vars=True).items():
        if id(x) not in seen:
            seen.add(id(x))
            found[name] = x.detach()
    return found


def _twins(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other names of parameters that have several."""
    first: dict[int, str] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        first.setdefault(id(x), name)
    return {name: weights[first[id(x)]] for name, x in model.state_dict(keep_vars=True).items()}


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, and move it there once it is whole."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)
