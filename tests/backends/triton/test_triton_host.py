"""The host side of the Triton kernels: encoded masks, lists of tiles, sums of diagonals and launch configurations."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import regard
from regard import mask
from regard.backends.triton import backend, tuning
from regard.backends.triton import mask as triton_mask
from regard.backends.triton.bias_grad import sum_by_distance
from regard.components.tile import Grid, Sizes, Tile
from regard.plan.arguments import resolve_alignment

_IDS = torch.arange(67) // 23
_MASKS = {
    "causal": mask.causal(),
    "window": mask.causal() & mask.window(9, 0),
    "lengths": mask.lengths(torch.tensor([40, 0])),
    "documents": mask.documents(_IDS) & mask.causal(),
    "either": mask.causal() & mask.lengths(torch.tensor([50, 9])) | mask.prefix(3),
    "negated": ~(mask.causal() & ~mask.documents(_IDS)) | mask.dense(torch.eye(67, dtype=torch.bool)),
    "blocks": mask.blocks(torch.eye(3, dtype=torch.bool)[None, None], size=(23, 23)),
    "all": ~(mask.causal() & ~mask.causal()),
    "nothing": mask.causal() & ~mask.causal(),
}


def _aligned(name: str, size: Sizes) -> mask.Mask:
    aligned, _ = resolve_alignment(_MASKS[name], None, size)
    assert aligned is not None
    return aligned


@pytest.mark.parametrize("name", _MASKS)
def test_normal_form_equals_mask(name: str) -> None:
    size = Sizes(2, 1, 1, 67, 67)
    tile = Tile((0, 2), (0, 1), (0, 67), (0, 67), size, torch.device("cpu"))
    aligned = _aligned(name, size)
    any_term = torch.zeros(2, 1, 67, 67, dtype=torch.bool)
    terms = triton_mask.to_normal_form(aligned)
    for term in terms:
        all_literals = torch.ones_like(any_term)
        for literal, is_negated in term:
            all_literals &= literal.allowed(tile) ^ is_negated
        any_term |= all_literals
    assert torch.equal(any_term, aligned.allowed(tile).expand_as(any_term))
    counts = backend._count_literals(aligned)
    assert counts is not None and counts[0] >= sum(len(term) for term in terms)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", _MASKS)
def test_list_tiles_contains_all_nonempty_tiles(name: str, transposed: bool) -> None:
    size, (rows, columns) = Sizes(2, 1, 1, 67, 67), (32, 16)
    aligned = _aligned(name, size)
    tile = Tile((0, 2), (0, 1), (0, 67), (0, 67), size, torch.device("cpu"))
    allowed = aligned.allowed(tile).expand(2, 1, 67, 67)[:, 0]
    order, counts = triton_mask._make_lists(aligned, size, rows, columns, torch.device("cpu"), transposed)
    grid = Grid.of(size, rows, columns, torch.device("cpu"))
    num_lists, length = (3, 5)[:: -1 if transposed else 1]
    assert order.shape[1:] == (num_lists, length) and len(grid.first_query) == 3
    for b, index in itertools.product(range(2), range(num_lists)):
        full, partial = counts[b % len(counts), index].tolist()
        for n, other in enumerate(order[b % len(order), index].tolist()):
            r, c = (other, index) if transposed else (index, other)
            part = allowed[b, r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
            if n < full:
                assert part.shape == (rows, columns) and bool(part.all())
            elif n >= full + partial:
                assert not bool(part.any())


def test_cached_lists_are_reused_on_the_same_stream_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list is filled asynchronously: another stream might read it too early."""
    size, device = Sizes(1, 1, 1, 67, 67), torch.device("cpu")

    def list_tiles(stream: int | None) -> Any:
        monkeypatch.setattr(triton_mask, "_current_stream", lambda device: stream)
        return triton_mask.list_tiles(_aligned("causal", size), (), size, 32, 16, device, False)

    regard.clear_caches()
    lists = list_tiles(1)
    assert list_tiles(1) is lists
    assert list_tiles(2) is not lists
    assert all(torch.equal(x, y) for x, y in zip(list_tiles(2), lists, strict=True))
    assert list_tiles(1) is lists
    regard.clear_caches()
    assert list_tiles(1) is not lists


def test_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {torch.device("cuda", 0): 17, torch.device("cuda", 1): 23}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=streams[device]))
    assert {device: triton_mask._current_stream(device) for device in streams} == streams
    assert triton_mask._current_stream(torch.device("cpu")) is None


def test_sum_by_distance_adds_diagonals() -> None:
    T, R, C, L, S = 4, 3, 2, 11, 7
    full = torch.zeros(R * T, C * T)
    full[:L, :S] = torch.randn(L, S)
    diagonals = torch.zeros(1, R + C - 1, T, T)
    for r, c in itertools.product(range(R), range(C)):
        diagonals[0, r - c + C - 1] += full[r * T : (r + 1) * T, c * T : (c + 1) * T]
    table = sum_by_distance(diagonals, S)
    for distance in range(L + S - 1):
        torch.testing.assert_close(table[0, distance], full[:L, :S].diagonal(S - 1 - distance).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Launch configurations.


@pytest.mark.parametrize("row", [128, 256, 512, 1024])
@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_launch_config_fits_shared_memory(row: int, shared: int) -> None:
    for config in (tuning._FEW[256], tuning._DEFAULT[64], tuning.LaunchConfig(128, 128, 8, 3)):
        fitted = tuning.fit_shared_memory(config, row, shared)
        assert tuning._shared_memory(fitted, row) <= shared or fitted.keys == tuning._MIN_KEYS
        assert fitted.queries == config.queries
        assert fitted == config or tuning._shared_memory(config, row) > shared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
def test_bias_grad_tiles_are_square(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only square tiles hold the same distances along a diagonal."""
    assert tuning._INTERPRETED.queries != tuning._INTERPRETED.keys, "tests must notice exchanged queries and keys"
    monkeypatch.setattr(tuning, "is_interpreted", lambda: False)
    for architecture in ((8, 0), (8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(tuning, "_architecture", lambda device, found=architecture: found)
        for kernel in ("bias_grad", "additive bias_grad"):
            config = tuning.launch_config(kernel, dtype, width, torch.device("cuda"))
            assert config.queries == config.keys
