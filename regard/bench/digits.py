"""What the layers of `regard.nn.vision` do for a small network: the digits of scikit-learn, 1,797 images of 8x8.

One network of three convolutions, with a layer of attention before the last of them, or in the place of the mean over the
places. All else is the same: the split, the parameters that all have in common, the order of the images, the recipe. The
recipe and the width were chosen for the network without attention, on other seeds. It has three convolutions since, of two,
most layers had cost some accuracy. As it is, it knows 98 % of the images without attention: what a layer gains is to be read
beside its error.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.nn.vision import (
    CBAM,
    AttentionPool2d,
    NonLocalBlock,
    PatchAttention,
    Rotary2d,
    SqueezeExcitation,
    WindowAttention2d,
)

_CHANNELS, _BATCH, _RATE = 8, 32, 0.02
_TEST = 0.3  # the share of images that are held back
_BETWEEN, _POOL = 7, 11  # the places in the network that a layer may take


class Variant(NamedTuple):
    """A layer, made for maps of eight channels, and the place that it takes in the network."""

    make: Callable[[], nn.Module]
    place: int = _BETWEEN


NONE = "none"
VARIANTS: dict[str, Variant] = {
    NONE: Variant(nn.Identity),
    "squeeze-and-excitation": Variant(lambda: SqueezeExcitation(_CHANNELS, reduction=4)),
    "CBAM": Variant(lambda: CBAM(_CHANNELS, reduction=4)),
    "non-local": Variant(lambda: NonLocalBlock(_CHANNELS)),
    "non-local, without norm": Variant(lambda: NonLocalBlock(_CHANNELS, norm=False)),
    "patches, sinusoidal": Variant(lambda: PatchAttention(_CHANNELS, 2)),
    "patches, rotary": Variant(lambda: PatchAttention(_CHANNELS, 2, position=Rotary2d(4))),
    "windows, then shifted": Variant(
        lambda: nn.Sequential(WindowAttention2d(_CHANNELS, 2, 2), WindowAttention2d(_CHANNELS, 2, 2, shift=1))
    ),
    "attention pooling": Variant(lambda: AttentionPool2d(_CHANNELS, 2), _POOL),
}


@dataclass(frozen=True)
class Result:
    """One network, trained from one seed: its parameters, and the share of the images held back that it knows."""

    variant: str
    seed: int
    parameters: int
    accuracy: float


def measure(
    seeds: Iterable[int] = range(5), variants: Sequence[str] = tuple(VARIANTS), epochs: int = 30
) -> Iterator[Result]:
    """Train every variant from every seed; each result as soon as it is there. The same seeds give the same results.

    Args:
        seeds: each is a split of its own, stratified, 70 % for training; and a start of its own.
        variants: names of `VARIANTS`.
    """
    for name in variants:
        if name not in VARIANTS:
            raise ValueError(f"digits: there is no variant {name!r}; expected one of {', '.join(VARIANTS)}")
    images, digits = _digits()
    for seed in seeds:
        train, test = _split(digits, seed)
        for name in variants:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = _network(VARIANTS[name])
                _train(network, images[train], digits[train], epochs, seed)
            with torch.no_grad():
                known = network.eval()(images[test]).argmax(1) == digits[test]
            parameters = sum(parameter.numel() for parameter in network.parameters())
            yield Result(name, seed, parameters, known.double().mean().item())


def table(results: Iterable[Result]) -> str:
    """A line per variant, in Markdown: accuracy as mean and standard deviation over the seeds, and what it gains on `NONE`
    from the same seeds, as mean and standard error.
    """
    ordered = sorted(results, key=lambda r: list(VARIANTS).index(r.variant))
    plain = {r.seed: r.accuracy for r in ordered if r.variant == NONE}
    lines = ["| attention | parameters | accuracy, % | gain | seeds |", "|---|---|---|---|---|"]
    for name, group in groupby(ordered, key=lambda r: r.variant):
        own = list(group)
        mean, deviation = _mean([100 * r.accuracy for r in own])
        gains = [100 * (r.accuracy - plain[r.seed]) for r in own if r.seed in plain and name != NONE]
        gain = ""
        if gains:
            more, spread = _mean(gains)
            gain = f"{more:+.2f} ± {spread / len(gains) ** 0.5:.2f}"
        lines.append(f"| {name} | {own[0].parameters:,} | {mean:.2f} ± {deviation:.2f} | {gain} | {len(own)} |")
    return "\n".join(lines)


def _mean(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; of one number, the deviation is unknown."""
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else float("nan")


def _digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) from 0 to 1, and what they show, (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    return torch.tensor(data.images / 16.0, dtype=torch.float32)[:, None], torch.tensor(data.target)


def _split(digits: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The numbers of the images for training, and of those held back; of each digit the same share."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(range(len(digits)), test_size=_TEST, stratify=digits.numpy(), random_state=seed)
    return torch.tensor(train), torch.tensor(test)


def _network(variant: Variant) -> nn.Sequential:
    C = _CHANNELS
    network = nn.Sequential(
        nn.Conv2d(1, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(),
        nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(), nn.MaxPool2d(2),
        nn.Identity(),
        nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(C, 10),
    )  # fmt: skip
    # Made last, so that the others start from the same numbers in every variant.
    network[variant.place] = variant.make()
    return network


def _train(network: nn.Module, images: Tensor, digits: Tensor, epochs: int, seed: int) -> None:
    optimiser = torch.optim.Adam(network.parameters(), _RATE)
    batches = len(digits) // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=epochs * batches)
    # Its own generator: the layers have drawn different amounts from torch's.
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits), generator=order)[: batches * _BATCH].view(batches, _BATCH):
            optimiser.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(images[batch]), digits[batch]))
            optimiser.step()
            schedule.step()
