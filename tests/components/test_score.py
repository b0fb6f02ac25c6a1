"""Scores: the reduced form of each says what its formula says, a new one is one class, and user's own are differentiable."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import oracle
from support.compare import KERNELS, judge, truth
from support.problems import decided, make
from torch import Tensor, nn

import regard
from regard import Summary, mask, position
from regard.components.score import _SCORES, Score
from regard.components.tensor_ops import widen
from regard.components.tile import Sizes, Tile

_L, _S = 5, 7


def _double(word: Score) -> Score:
    """The same score with parameters in float64."""
    fields = {f.name: getattr(word, f.name) for f in dataclasses.fields(word)}
    return type(word)(**{n: x.double() if isinstance(x, Tensor) else x for n, x in fields.items()})


@pytest.mark.parametrize("name", _SCORES)
@pytest.mark.parametrize("width", [1, 6])
def test_the_formula_is_what_the_reduced_form_computes(name: str, width: int) -> None:
    word = _double(_SCORES[name].example(1, width))
    q, k = torch.randn(2, 1, _L, width, dtype=torch.float64), torch.randn(2, 1, _S, width, dtype=torch.float64)
    tile = Tile((0, 2), (0, 1), (0, _L), (0, _S), Sizes(2, 1, 1, _L, _S), q.device)
    new_q, new_k, reduced = word.reduce(q, k)
    expected = torch.stack([
        torch.stack([torch.stack([word.pair(x, y).reshape(()) for y in k[b, 0]]) for x in q[b, 0]]) for b in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(reduced.scores(widen(new_q), widen(new_k), tile)[:, 0], expected, rtol=1e-12, atol=1e-12)
    # The formula broadcasts, too.
    broadcast = word.pair(q[:, 0, :, None], k[:, 0, None])
    torch.testing.assert_close(broadcast.reshape(expected.shape), expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# A new score is one class and one line in the table.


@dataclass(frozen=True)
class Laplacian(Score):
    """s_ij = -sum_d w_d |q_id - k_jd|. All that a score needs is its formula."""

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
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("hidden", [None, "a & b"])
def test_a_new_score_runs_everywhere(kernel: str, hidden: str | None) -> None:
    """The generic problems pick it up from the table, and the oracle scores it pair by pair."""
    for seed in range(12):
        problem = make(decided({"score": "laplacian", "mask": hidden}, seed))
        judge(problem, kernel, truth(problem))


@pytest.mark.usefixtures("laplacian")
def test_a_new_score_in_many_heads_and_tiles() -> None:
    """Against `cdist`, at a size where there are tiles."""
    q, k, v = torch.randn(2, 4, 150, 3), torch.randn(2, 2, 131, 3), torch.randn(2, 2, 131, 5)
    out = regard.attention(q, k, v, score=Laplacian(torch.ones(3)), backend="tiled")
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, torch.softmax(-torch.cdist(q, k, p=1), -1) @ v, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Scores that a user writes.


class Match(nn.Module):
    """A small network as a score."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(3, 4), nn.Linear(3, 4, bias=False), nn.Linear(4, 1)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.out(torch.relu(self.q(q)[..., :, None, :] + self.k(k)[..., None, :, :]))[..., 0]


def _plain(q: Tensor, k: Tensor, v: Tensor, scores: Any) -> Tensor:
    """Softmax attention by the oracle, for a score (q, k) -> (L, S) of one head."""
    return oracle.attend(q, k, v, score=lambda q, k, h, g: scores(q[None, None], k[None, None])[0, 0])["out"]


def _agree(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def _qkv(heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, heads, 70, 3), (2, 2, 67, 3), (2, 2, 67, 4))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_reach_the_parameters_of_a_module(kernel: str) -> None:
    torch.manual_seed(0)
    module, (q, k, v) = Match().double(), _qkv(4)
    parameters = [*module.parameters(), q, k, v]
    with regard.record_backends() as ran:
        out = regard.attention(q, k, v, score=module, backend=kernel)
    assert ran == [kernel]
    weights = torch.randn_like(out)
    expected = _plain(q, k, v, module)
    _agree([out], [expected])
    _agree(*([*torch.autograd.grad(x, parameters, weights)] for x in (out, expected)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("strip", [None, 40])
def test_gradients_reach_what_a_captured_tensor_was_made_of(
    kernel: str, strip: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if strip:
        monkeypatch.setattr("regard.backends.tiled.strip._STRIP", strip)
        monkeypatch.setattr("regard.backends.tiled.strip._TILE", 16)
    q, k, v = _qkv()
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    made = torch.linalg.matrix_exp(w / 4)
    # The weight makes the queries as well: both ways count.
    turned = q @ w
    out = regard.attention(turned, k, v, score=lambda q, k: q @ made @ k.mT, mask=mask.causal("start"), backend=kernel)
    allowed = torch.ones(2, 2, 70, 67, dtype=torch.bool).tril()
    scores = oracle.attend(turned, k, v, score=lambda q, k, h, g: q @ made @ k.T, allowed=allowed)["out"]
    weights = torch.randn_like(out)
    _agree(*([*torch.autograd.grad(x, [w, q, k, v], weights, retain_graph=True)] for x in (out, scores)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_second_derivatives_with_respect_to_what_is_captured(kernel: str) -> None:
    q, k, v = (x[:1, :, :4].detach().requires_grad_() for x in _qkv())
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    everything = [w, q, k, v]
    found = []
    for out in (
        regard.attention(q, k, v, score=lambda q, k: torch.tanh(q @ w) @ k.mT, backend=kernel),
        _plain(q, k, v, lambda q, k: torch.tanh(q @ w) @ k.mT),
    ):
        first = torch.autograd.grad(out.pow(2).sum(), everything, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(x.pow(3).sum() for x in first), everything)])  # type: ignore[arg-type]
    _agree(*found)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_frozen_module_is_left_alone(kernel: str) -> None:
    module, (q, k, v) = Match().double().requires_grad_(False), _qkv()
    out = regard.attention(q, k, v, score=module, backend=kernel)
    _agree([out], [_plain(q, k, v, module)])
    out.sum().backward()
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("kernel", KERNELS)
def test_in_half_precision_a_function_is_given_float32(kernel: str) -> None:
    given = set()

    def score(q: Tensor, k: Tensor) -> Tensor:
        given.update((q.dtype, k.dtype))
        return q @ k.mT

    q, k, v = (x.detach().bfloat16() for x in _qkv())
    assert regard.attention(q, k, v, score=score, backend=kernel).dtype == torch.bfloat16
    assert given == {torch.float32}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_function_with_everything_else(kernel: str) -> None:
    q, k, v = _qkv(4)
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    words = {
        "mask": mask.causal("start"),
        "bias": position.ALiBi(slopes),
        "softcap": 3.0,
        "summary": Summary(entropy=True),
    }
    out, seen = regard.attention(q, k, v, score=lambda q, k: q @ w @ k.mT, backend=kernel, **words)  # type: ignore[arg-type]
    told, said = regard.attention(q, k, v, score=regard.score.Bilinear(w), backend="reference", **words)  # type: ignore[arg-type]
    leaves = [w, slopes, q, k, v]
    _agree([out, seen.entropy], [told, said.entropy])
    _agree(
        *([*torch.autograd.grad((x.sum(), y.sum()), leaves)] for x, y in ((out, seen.entropy), (told, said.entropy)))
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_function_of_the_wrong_shape(kernel: str) -> None:
    with pytest.raises(ValueError, match="score"):
        regard.attention(*_qkv(), score=lambda q, k: (q @ k.mT)[0], backend=kernel)
    with pytest.raises(TypeError, match="score"):
        regard.attention(*_qkv(), score=lambda q, k: None, backend=kernel)  # type: ignore[arg-type, return-value]
