"""The benchmark on scikit-learn's digits: splits, networks, and the table. The benchmark itself takes minutes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from regard.bench import digits
from regard.bench.digits import NONE, VARIANTS, DigitsResult, measure, table


def test_split_is_stratified() -> None:
    images, labels = digits._load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (0.0, 1.0)
    test_indices = []
    for seed in (0, 1):
        train, test = digits._split(labels, seed)
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(1797))
        for digit in range(10):
            share = (labels[test] == digit).sum().item() / (labels == digit).sum().item()
            assert abs(share - 0.3) <= 1 / (labels == digit).sum().item()
        assert torch.equal(test, digits._split(labels, seed)[1])
        test_indices.append(test)
    assert not torch.equal(*test_indices)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_differ_only_in_their_layer(name: str) -> None:
    variant, index = VARIANTS[name], VARIANTS[name].module_index
    torch.manual_seed(3)
    network = digits._network(variant)
    torch.manual_seed(3)
    plain = digits._network(VARIANTS[NONE])
    assert len(network) == len(plain)
    for i, (part, other) in enumerate(zip(network, plain, strict=True)):
        if i != index:
            same = zip(part.state_dict().values(), other.state_dict().values(), strict=True)
            assert type(part) is type(other)
            assert all(torch.equal(x, y) for x, y in same)
    assert type(network[index]) is type(variant.make())
    assert network(torch.rand(5, 1, 8, 8)).shape == (5, 10)


def test_training_is_reproducible() -> None:
    before = torch.get_rng_state()
    results = list(measure((4,), ("CBAM", "attention pooling"), epochs=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert [r.variant for r in results] == ["CBAM", "attention pooling"]
    assert all(0.2 < r.accuracy <= 1.0 for r in results)  # by chance it is 0.1
    assert [r.parameters for r in results] == [
        sum(p.numel() for p in digits._network(VARIANTS[r.variant]).parameters()) for r in results
    ]
    torch.rand(3)  # the state of the default generator has no effect
    assert list(measure((4,), ("CBAM",), epochs=1)) == results[:1]


def test_training_matches_explicit_loop() -> None:
    """One epoch, written out: every batch once, without the last, incomplete one."""
    images, labels = digits._load_digits()
    train, test = digits._split(labels, 7)
    torch.manual_seed(7)
    network = digits._network(VARIANTS[NONE])
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=39)
    order = torch.randperm(1257, generator=torch.Generator().manual_seed(7))
    for step in range(39):
        batch = train[order[32 * step : 32 * (step + 1)]]
        loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    correct = sum(int(network(images[i : i + 1]).argmax()) == int(labels[i]) for i in test.tolist())
    assert next(measure((7,), (NONE,), epochs=1)).accuracy == pytest.approx(correct / 540, abs=1.5 / 540)


def test_table_shows_mean_deviation_and_gain() -> None:
    results = [
        DigitsResult("CBAM", 0, 1527, 0.98), DigitsResult("CBAM", 1, 1527, 0.99), DigitsResult("CBAM", 2, 1527, 0.97),
        DigitsResult(NONE, 2, 1386, 0.97), DigitsResult(NONE, 0, 1386, 0.96), DigitsResult(NONE, 1, 1386, 0.98),
    ]  # fmt: skip
    # Gains of 2, 1 and 0: mean 1, standard deviation 1, standard error 1 / sqrt(3).
    assert table(results).splitlines() == [
        "| attention | parameters | accuracy, % | gain | seeds |",
        "|---|---|---|---|---|",
        "| none | 1,386 | 97.00 ± 1.00 |  | 3 |",
        "| CBAM | 1,527 | 98.00 ± 1.00 | +1.00 ± 0.58 | 3 |",
    ]
    assert table(results[:1]).splitlines()[2] == "| CBAM | 1,527 | 98.00 ± nan |  | 1 |"


def test_unknown_variant_raises() -> None:
    message = "digits: variant is 'cbam'; expected one of none, squeeze-and-excitation, CBAM"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        next(measure(variants=("cbam",)))
