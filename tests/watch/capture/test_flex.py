"""FlexAttention under a watch: its functions of scores and masks, in linear memory, with its outputs and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.records import dense
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import regard
from regard.watch.capture import flex

EPS = torch.finfo(torch.float32).eps
DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3])
SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])


def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score - SLOPES[h] * (q - k).abs()


def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return 2 * torch.tanh(score / 2)


def causal_rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return DOCUMENTS[q] == DOCUMENTS[k]


def but_one(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A query that may attend to nothing, in one text."""
    return (q != 3) | (b != 1)


class Flexible(nn.Module):
    def __init__(self, call: Callable[..., Any] = flex_attention, **words: Any) -> None:
        super().__init__()
        self.call, self.words = call, words

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.call(q, k, v, **self.words)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 13, 8), torch.randn(2, 2, 13, 8), torch.randn(2, 2, 13, 8)


def blocks(function: Callable[..., Tensor]) -> Any:
    return create_block_mask(function, 2, None, 13, 13, device="cpu", BLOCK_SIZE=4)


WORDS = [
    {}, {"score_mod": alibi}, {"score_mod": capped, "scale": 0.7}, {"block_mask": blocks(causal_rule)},
    {"block_mask": blocks(documents), "score_mod": alibi}, {"block_mask": blocks(but_one)},
    {"block_mask": create_block_mask(causal_rule, None, None, 13, 13, device="cpu")},
]  # fmt: skip
quiet = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")


def weights_of(
    q: Tensor, k: Tensor, score_mod: Any = None, block_mask: Any = None, scale: float | None = None
) -> Tensor:
    """The equation, number by number."""
    scores = q @ k.repeat_interleave(2, 1).mT * (8**-0.5 if scale is None else scale)
    places = torch.meshgrid(*(torch.arange(n) for n in scores.shape), indexing="ij")
    if score_mod is not None:
        scores = score_mod(scores, *places)
    if block_mask is not None:
        scores = scores.masked_fill(~block_mask.mask_mod(*places), -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


@quiet
@pytest.mark.parametrize("words", WORDS, ids=lambda words: "+".join(words) or "plain")
def test_functions_of_scores_and_masks(words: dict[str, Any]) -> None:
    q, k, v = problem()
    model = Flexible(enable_gqa=True, return_aux=AuxRequest(lse=True), **words)
    before, aux = model(q, k, v)
    with regard.watch(model, top=13, rows=[3]) as seen:
        watched, aux_watched = model(q, k, v)
    assert (watched - before).abs().max() <= 8 * EPS * before.abs().max()
    assert torch.allclose(aux.lse, aux_watched.lse, atol=8 * EPS * float(aux.lse.nan_to_num(neginf=0).abs().max()))
    (record,) = seen
    truth = weights_of(q, k, **words)
    assert (record.heads, record.queries, record.keys) == (4, 13, 13)
    assert record.kind == (
        "decoder" if "block_mask" in words and words["block_mask"].mask_mod is causal_rule else "self"
    )
    assert (dense(record) - truth).abs().max() <= 8 * EPS
    assert record.rows is not None
    assert (record.rows - truth[:, :, 3:4]).abs().max() <= 8 * EPS


@quiet
@pytest.mark.parametrize("learned", [False, True])
def test_gradients(learned: bool) -> None:
    """Of q, k and v by our own steps; of what a function closes over by those of the operator, where torch has any."""
    slopes = nn.Parameter(SLOPES.double()) if learned else SLOPES

    def change(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score - slopes[h] * (q - k).abs()

    tensors = [x.double().requires_grad_() for x in problem()]
    inputs = [*tensors, *([slopes] if isinstance(slopes, nn.Parameter) else [])]
    mask = (13, 13, torch.ones(1, 1, 1), torch.zeros(1, 1, 1, 1), None, None, 128, 128, causal_rule)

    def operator(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.meshgrid(*(torch.arange(n) for n in (2, 4, 13, 13)), indexing="ij")
        scores = change(q @ k.repeat_interleave(2, 1).mT * 8**-0.5, *places).masked_fill(
            ~causal_rule(*places), -torch.inf
        )
        return scores.softmax(-1) @ v.repeat_interleave(2, 1), scores.logsumexp(-1) / math.log(2), scores.amax(-1)

    summary = regard.Summary(max=True, top=13)
    out, _, _ = flex.answer(summary, operator, *tensors, change, mask, 8**-0.5, {})
    truth = operator(*tensors)
    both = [torch.autograd.grad(o[0].square().sum() + o[1].sum(), inputs) for o in (out, truth)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


def test_largest_scores_are_the_operators_own() -> None:
    """Asked for them, as it can be on a GPU alone, it answers itself, and is summarised beside."""
    q, k, v = problem()
    own = tuple(torch.ones(1) for _ in range(3))
    mask = (13, 13, torch.ones(1, 1, 1), torch.zeros(1, 1, 1, 1), None, None, 128, 128, lambda b, h, q, k: q >= k)
    out, seen, causal = flex.answer(
        regard.Summary(max=True, top=13), lambda *_: own, q, k, v, capped, mask, 8**-0.5, {"OUTPUT_MAX": True}
    )
    assert out is own
    assert causal
    assert seen.top is not None
    truth = weights_of(q, k, capped, create_block_mask(causal_rule, None, None, 13, 13, device="cpu"))
    assert (seen.top.weights - truth.sort(-1, descending=True).values).abs().max() <= 8 * EPS


@quiet
def test_memory_is_linear_and_layers_may_be_left_out() -> None:
    """8192 x 8192 scores would be 256 MB a head."""
    tracemalloc = torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU])
    q = torch.randn(1, 1, 8192, 4)
    model = Flexible(score_mod=capped)
    with torch.no_grad(), regard.watch(model), tracemalloc as profile:
        model(q, q, q)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < 4 * 8192 * 8192 * 4
    peak = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert peak < 100e6
    with regard.watch(model, layers=[]) as seen:
        model(*(problem()[0],) * 3)
    assert not seen.records


@quiet
@pytest.mark.slow
def test_compiled() -> None:
    """A compiled graph shows nothing: it runs uncompiled while it is watched, and compiled again after."""
    q, k, v = problem()
    model = Flexible(torch.compile(flex_attention), enable_gqa=True, score_mod=alibi)
    with torch.no_grad():
        before = model(q, k, v)
        with regard.watch(model, top=13) as seen:
            watched = model(q, k, v)
    assert torch.allclose(before, watched, atol=1e-6)
    assert (dense(seen[0]) - weights_of(q, k, score_mod=alibi)).abs().max() <= 8 * EPS
