"""Statistics of the weights: those of the package, and those of users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard import Summary, mask, normalizer, summary
from regard.backends.cpu import extension
from regard.components.statistic import BUILT_IN, Statistic, Weights
from regard.components.tile import Sizes

_KEYS, _QUERIES = 7, 5


@dataclass(frozen=True)
class Moment(Statistic):
    """sum_j p_ij^n, for several n."""

    powers: tuple[float, ...]
    name = "moment"
    axes = "BHLM"

    def size(self, axis: str) -> int:
        return len(self.powers)

    def compute(self, weights: Weights) -> Tensor:
        return torch.stack([weights.p.pow(n).sum(-1) for n in self.powers], -1)


class Squares(Statistic):
    """sum_i p_ij^2 of each key."""

    name = "squares"
    axes = "BHS"

    def compute(self, weights: Weights) -> Tensor:
        return weights.p.square().sum(-2)


class Logs(Statistic):
    """log(1 + p_ij), and -100 for pairs that may not attend."""

    name = "logs"
    axes = "BHLS"
    empty = -100.0

    def compute(self, weights: Weights) -> Tensor:
        return weights.p.log1p()


class Effective(Statistic):
    """1 / sum_j p_ij^2, and -1 for queries that may attend to no key."""

    name = "effective"
    empty = -1.0

    def compute(self, weights: Weights) -> Tensor:
        return 1 / weights.p.square().sum(-1)


def _qkv(L: int = _QUERIES, S: int = _KEYS) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, n, 4).requires_grad_() for heads, n in ((4, L), (2, S), (2, S))]


@pytest.mark.parametrize("backend", [None, "tiled", "reference"])
@pytest.mark.parametrize("hidden", [None, mask.causal("end"), mask.lengths([3, 0])])
def test_statistics_of_users_match_full_weights(backend: str | None, hidden: mask.Mask | None) -> None:
    x = _qkv(150, 170)
    request = Summary(full=True, lse=True, other=[Moment((1.0, 3.0)), Squares(), Logs(), Effective()])
    _, stats = regard.attention(*x, mask=hidden, summary=request, backend=backend)
    p, is_masked, is_empty = stats.full, stats.full == 0, stats.lse == -torch.inf
    expected = {
        "moment": torch.stack([p.sum(-1), p.pow(3).sum(-1)], -1),
        "squares": p.square().sum(-2),
        "logs": p.log1p().masked_fill(is_masked, -100.0),
        "effective": (1 / p.square().sum(-1).masked_fill(is_empty, 1.0)).masked_fill(is_empty, -1.0),
    }
    assert stats.other is not None
    assert list(stats.other) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(stats.other[name], value)
    weights = {name: torch.randn_like(value) for name, value in expected.items()}
    got, exact = (
        torch.autograd.grad(sum((values[name] * w).sum() for name, w in weights.items()), x[:2], retain_graph=True)
        for values in (stats.other, expected)
    )
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


def test_other_statistics_change_with_each() -> None:
    stats = regard.attention(*_qkv(), summary=Summary(top=2, other=[Squares()]))[1].each(torch.neg)
    assert stats.other is not None
    assert bool((stats.other["squares"] <= 0).all())


class NoName(Statistic):
    pass


class WrongShape(Squares):
    name = "wrong"
    axes = "BHL"


class WrongAxes(Squares):
    axes = "HLS"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Squares(), r"summary: other is an object of class Squares; expected a tuple of objects"),
        ((Squares,), r"summary: other is the class Squares; expected"),
        ((Statistic(),), r"summary: other is an object of class Statistic; expected"),
        ((NoName(),), r"summary: other has a statistic named ''; expected"),
        ((Squares(), Squares()), r"summary: other has a statistic named 'squares'; expected"),
        ((WrongAxes(),), r"summary: squares has axes 'HLS'; expected different letters, the first two BH"),
        (
            (WrongShape(),),
            r"summary: wrong of some queries has shape \(2, 4, 7\); expected \(2, 4, 5\) for its axes BHL",
        ),
    ],
)
def test_invalid_statistics_raise(other: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        regard.attention(*_qkv(), summary=Summary(other=other))


def test_backends_refuse_statistics_that_they_lack() -> None:
    x = _qkv()
    reasons = regard.explain(*x, summary=Summary(other=[Squares()])).reasons
    assert reasons["cpu"] == "it does not support the summary squares"
    assert reasons["sdpa"] == "it does not support the summary squares" or "triton" in reasons
    assert reasons["tiled"] is None


def test_native_table_has_the_names_and_axes_of_the_classes() -> None:
    """Each native statistic is a class, and its axes are those of the result that the operator returns."""
    names = extension.names("summaries")
    kinds = {kind.name: kind for kind in BUILT_IN}
    assert set(names) <= set(kinds)
    request = Summary(
        lse=True, max=True, entropy=True, top=3, received=True, full=True, rows=[0, 2],
        mass=summary.groups([0, 1, 0, 1, 0, 1, 0]),
    )  # fmt: skip
    stats = regard.attention(*_qkv(), summary=request, backend="cpu")[1]
    results = {**stats._asdict(), "top_weights": stats.top.weights, "top_keys": stats.top.keys}
    size = Sizes(2, 4, 2, _QUERIES, _KEYS)
    for statistic in request.statistics:
        assert results[statistic.name].shape == statistic.shape(size), statistic.name


class Sharper(normalizer.Softmax):
    """Softmax of twice the score."""

    def weights(self, s: Tensor, tile: Any) -> Tensor:
        return super().weights(2 * s, tile)


class Shifted(mask.Band):
    """A causal mask without the diagonal."""

    def allowed(self, tile: Any) -> Tensor:
        return tile.behind("start") > 0

    def coverage(self, grid: Any) -> Any:
        return mask.Mask.coverage(self, grid)


def test_subclasses_of_built_in_components_are_computed_as_they_define() -> None:
    """A fused backend knows what Softmax is, but not what a subclass of it is."""
    q, k, v = (x.detach() for x in _qkv())
    out = regard.attention(q, k, v, normalizer=Sharper())
    torch.testing.assert_close(out, regard.attention(2 * q, k, v))
    out = regard.attention(q, k, v, mask=Shifted(None, 0, "start"))
    torch.testing.assert_close(out, regard.attention(q, k, v, mask=mask.causal("start") & ~mask.window(0, 0, "start")))
    with regard.record_backends() as ran:
        regard.attention(q, k, v, normalizer=Sharper(), mask=Shifted(None, 0, "start"))
    assert ran == ["tiled"]
