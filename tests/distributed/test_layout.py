"""Layouts divide any sequence, balance the work of masks, and send no keys that nothing needs."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from regard import mask
from regard.components.predicate import Mask
from regard.components.tile import Sizes
from regard.distributed.layout import LAYOUTS, best_layout, busiest, ranges_of
from regard.distributed.needs import find_needs
from regard.distributed.shards import SequenceShards
from regard.distributed.transport import ThreadTransport, run_ranks

CPU = torch.device("cpu")


@given(st.integers(0, 300), st.integers(1, 9), st.sampled_from(LAYOUTS), st.sampled_from([None, mask.causal()]))
def test_each_position_has_one_rank(length: int, ranks: int, layout: str, masked: Mask | None) -> None:
    ranges = ranges_of(layout, length, ranks, masked)
    assert len(ranges) == ranks
    assert sorted(n for parts in ranges for part in parts for n in range(*part)) == list(range(length))
    assert all(first < stop for parts in ranges for first, stop in parts)
    assert all(parts == tuple(sorted(parts)) for parts in ranges)


def packed(length: int) -> Mask:
    """Documents of very different lengths, causal."""
    torch.manual_seed(0)
    ends = torch.randint(1, length, (9,)).sort().values
    return mask.documents((torch.arange(length)[:, None] >= ends).sum(1)) & mask.causal()


@pytest.mark.parametrize(
    ("name", "masked", "most"),
    [
        ("none", None, 1.0),
        ("causal", mask.causal(), 1.05),
        ("window", mask.causal() & mask.window(left=500), 1.1),
        ("documents", packed(16_384), 1.15),
        ("prefix", mask.causal() | mask.prefix(6000), 1.15),
    ],
)
def test_best_layout_is_balanced(name: str, masked: Mask | None, most: float) -> None:
    layout = best_layout(16_384, 8, masked)
    assert busiest(ranges_of(layout, 16_384, 8, masked), 16_384, masked) <= most
    if name == "causal":
        assert busiest(ranges_of("even", 16_384, 8), 16_384, masked) == pytest.approx(1.87, abs=0.01)


def test_ranks_need_the_keys_that_the_mask_allows() -> None:
    sizes, ranges = Sizes(2, 3, 3, 1024, 1024), ranges_of("even", 1024, 4)
    needs = find_needs(mask.causal() & mask.window(left=100), sizes, ranges, CPU)
    assert needs.of == [((0, 256),), ((128, 512),), ((384, 768),), ((640, 1024),)]
    assert needs.between(ranges[0], 1) == ((128, 256),)
    assert needs.between(ranges[3], 0) == ()
    # Keys between a prefix and a window are not sent.
    needs = find_needs(mask.causal() & (mask.window(left=60) | mask.prefix(64)), sizes, ranges, CPU)
    assert needs.of[3] == ((0, 64), (704, 1024))
    assert needs.spans[3] == [(0, 1024)]
    assert find_needs(None, sizes, ranges, CPU).of == [((0, 1024),)] * 4


def test_bytes_are_those_of_the_needed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from regard.distributed import attention

    sent = [0] * 4
    exchange = ThreadTransport.exchange

    def count(
        self: ThreadTransport, outgoing: list[torch.Tensor], incoming: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        sent[self.rank] += sum(x.numel() for n, x in enumerate(outgoing) if n != self.rank)
        return exchange(self, outgoing, incoming)

    monkeypatch.setattr(ThreadTransport, "exchange", count)
    window = mask.causal() & mask.window(left=100)

    def work(transport: ThreadTransport) -> None:
        shards = SequenceShards(1024, transport, layout="even")
        q, k, v = (torch.randn(1, heads, 256, 8) for heads in (4, 2, 2))
        attention(q, k, v, shards=shards, mask=window)

    run_ranks(4, work)
    # Each of the first three ranks sends the last two tiles of its keys and values to the next one.
    assert sent == [2 * 128 * 16, 2 * 128 * 16, 2 * 128 * 16, 0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"length": -1}, "shards: length is -1; expected an integer >= 0"),
        ({"length": 8, "layout": "zigzag"}, "shards: layout is 'zigzag'; expected 'even' or 'mirrored' or 'balanced'"),
        ({"length": 8, "mask": torch.ones(8, 8)}, "shards: mask"),
        ({"length": 8}, "shards: torch.distributed is not initialized; expected a program that torchrun starts"),
    ],
)
def test_invalid_shards_are_refused(arguments: dict[str, object], error: str) -> None:
    group = None if error.startswith("shards: torch") else run_ranks(1, lambda transport: transport)[0]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=error.replace("(", r"\(")):
        SequenceShards(**arguments, group=group)  # type: ignore[arg-type]
