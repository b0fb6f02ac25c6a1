"""Scores: reduced forms match the formulas, new scores work on all backends, and functions of users are
differentiable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import oracle
from support.compare import BACKENDS, compare, compute_reference
from support.problems import fixed_choices, make_problem
from torch import Tensor, nn

import regard
from regard import Summary, mask, position
from regard.components.score import _SCORES, Score
from regard.components.tensor_ops import widen
from regard.components.tile import Sizes, Tile

_L, _S = 5, 7


def _double(instance: Score) -> Score:
    """Return the same score with parameters in float64."""
    fields = {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}
    return type(instance)(**{n: x.double() if isinstance(x, Tensor) else x for n, x in fields.items()})


@pytest.mark.parametrize("name", _SCORES)
@pytest.mark.parametrize("width", [1, 6])
def test_reduced_score_matches_formula(name: str, width: int) -> None:
    instance = _double(_SCORES[name].example(1, width))
    q, k = torch.randn(2, 1, _L, width, dtype=torch.float64), torch.randn(2, 1, _S, width, dtype=torch.float64)
    tile = Tile((0, 2), (0, 1), (0, _L), (0, _S), Sizes(2, 1, 1, _L, _S), q.device)
    new_q, new_k, reduced = instance.reduce(q, k)
    expected = torch.stack([
        torch.stack([torch.stack([instance.pair(x, y).reshape(()) for y in k[b, 0]]) for x in q[b, 0]]) for b in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(reduced.scores(widen(new_q), widen(new_k), tile)[:, 0], expected, rtol=1e-12, atol=1e-12)
    # `pair` broadcasts.
    broadcast = instance.pair(q[:, 0, :, None], k[:, 0, None])
    torch.testing.assert_close(broadcast.reshape(expected.shape), expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# A new score takes one class and one line in the table.


@dataclass(frozen=True)
class Laplacian(Score):
    """s_ij = -sum_d w_d |q_id - k_jd|. A score only needs its formula, with w (D,)."""

    w: Tensor

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return -(self.w * (q - k).abs()).sum(-1)

    @classmethod
    def example(cls, heads: int, width: int) -> Score:
        return cls(torch.rand(width) + 0.5)


@pytest.fixture
def laplacian(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(_SCORES, "laplacian", Laplacian)
    return


@pytest.mark.usefixtures("laplacian")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden", [None, "a & b"])
def test_new_score_runs_on_all_backends(backend: str, hidden: str | None) -> None:
    """The generic problems use the score from the table, and the oracle computes it pair by pair."""
    for seed in range(12):
        problem = make_problem(fixed_choices({"score": "laplacian", "mask": hidden}, seed))
        compare(problem, backend, compute_reference(problem))


@pytest.mark.usefixtures("laplacian")
def test_new_score_with_heads_and_tiles() -> None:
    """Compare with `cdist`, for a size with several tiles."""
    q, k, v = torch.randn(2, 4, 150, 3), torch.randn(2, 2, 131, 3), torch.randn(2, 2, 131, 5)
    out = regard.attention(q, k, v, score=Laplacian(torch.ones(3)), backend="tiled")
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, torch.softmax(-torch.cdist(q, k, p=1), -1) @ v, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Scores defined by users.


class Match(nn.Module):
    """A small network as a score."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(3, 4), nn.Linear(3, 4, bias=False), nn.Linear(4, 1)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.out(torch.relu(self.q(q)[..., :, None, :] + self.k(k)[..., None, :, :]))[..., 0]


def _oracle(q: Tensor, k: Tensor, v: Tensor, scores: Any) -> Tensor:
    """Softmax attention by the oracle, for a score (q, k) -> (L, S) of one head."""
    return oracle.attend(q, k, v, score=lambda q, k, h, g: scores(q[None, None], k[None, None])[0, 0])["out"]


def _assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def _qkv(heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, heads, 70, 3), (2, 2, 67, 3), (2, 2, 67, 4))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_module_score_parameter_gradients(backend: str) -> None:
    torch.manual_seed(0)
    module, (q, k, v) = Match().double(), _qkv(4)
    parameters = [*module.parameters(), q, k, v]
    with regard.record_backends() as ran:
        out = regard.attention(q, k, v, score=module, backend=backend)
    assert ran == [backend]
    weights = torch.randn_like(out)
    expected = _oracle(q, k, v, module)
    _assert_close([out], [expected])
    _assert_close(*([*torch.autograd.grad(x, parameters, weights)] for x in (out, expected)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [None, 40])
def test_function_score_gradients_of_captured_nonleaf(
    backend: str, block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block_size:
        monkeypatch.setattr("regard.backends.tiled.row_block._BLOCK_SIZE", block_size)
        monkeypatch.setattr("regard.backends.tiled.row_block._TILE", 16)
    q, k, v = _qkv()
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    made = torch.linalg.matrix_exp(w / 4)
    # w also determines the queries, so its gradient has two parts.
    projected = q @ w
    out = regard.attention(
        projected, k, v, score=lambda q, k: q @ made @ k.mT, mask=mask.causal("start"), backend=backend
    )
    allowed = torch.ones(2, 2, 70, 67, dtype=torch.bool).tril()
    scores = oracle.attend(projected, k, v, score=lambda q, k, h, g: q @ made @ k.T, allowed=allowed)["out"]
    weights = torch.randn_like(out)
    _assert_close(*([*torch.autograd.grad(x, [w, q, k, v], weights, retain_graph=True)] for x in (out, scores)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_score_second_derivatives_of_captured(backend: str) -> None:
    q, k, v = (x[:1, :, :4].detach().requires_grad_() for x in _qkv())
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    everything = [w, q, k, v]
    found = []
    for out in (
        regard.attention(q, k, v, score=lambda q, k: torch.tanh(q @ w) @ k.mT, backend=backend),
        _oracle(q, k, v, lambda q, k: torch.tanh(q @ w) @ k.mT),
    ):
        first = torch.autograd.grad(out.pow(2).sum(), everything, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(x.pow(3).sum() for x in first), everything)])  # type: ignore[arg-type]
    _assert_close(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_module_score_gets_no_gradients(backend: str) -> None:
    module, (q, k, v) = Match().double().requires_grad_(False), _qkv()
    out = regard.attention(q, k, v, score=module, backend=backend)
    _assert_close([out], [_oracle(q, k, v, module)])
    out.sum().backward()
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_score_gets_float32_for_half_precision(backend: str) -> None:
    dtypes = set()

    def score(q: Tensor, k: Tensor) -> Tensor:
        dtypes.update((q.dtype, k.dtype))
        return q @ k.mT

    q, k, v = (x.detach().bfloat16() for x in _qkv())
    assert regard.attention(q, k, v, score=score, backend=backend).dtype == torch.bfloat16
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_score_with_all_other_components(backend: str) -> None:
    q, k, v = _qkv(4)
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    arguments = {
        "mask": mask.causal("start"),
        "bias": position.ALiBi(slopes),
        "softcap": 3.0,
        "summary": Summary(entropy=True),
    }
    out, stats = regard.attention(q, k, v, score=lambda q, k: q @ w @ k.mT, backend=backend, **arguments)  # type: ignore[arg-type]
    expected, expected_stats = regard.attention(
        q, k, v, score=regard.score.Bilinear(w), backend="reference", **arguments
    )  # type: ignore[arg-type]
    leaves = [w, slopes, q, k, v]
    _assert_close([out, stats.entropy], [expected, expected_stats.entropy])
    _assert_close(
        *(
            [*torch.autograd.grad((x.sum(), y.sum()), leaves)]
            for x, y in ((out, stats.entropy), (expected, expected_stats.entropy))
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_score_of_wrong_shape_raises(backend: str) -> None:
    with pytest.raises(ValueError, match="score"):
        regard.attention(*_qkv(), score=lambda q, k: (q @ k.mT)[0], backend=backend)
    with pytest.raises(TypeError, match="score"):
        regard.attention(*_qkv(), score=lambda q, k: None, backend=backend)  # type: ignore[arg-type, return-value]
