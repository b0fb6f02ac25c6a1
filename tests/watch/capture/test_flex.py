"""FlexAttention under a watch: outputs, gradients and weights with score and mask functions, in linear memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.records import dense_weights
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import regard
from regard.watch.capture import flex

EPS = torch.finfo(torch.float32).eps
DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3])
SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])


def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score - SLOPES[h] * (q - k).abs()


def softcap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return 2 * torch.tanh(score / 2)


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return DOCUMENTS[q] == DOCUMENTS[k]


def except_one_row(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Query 3 of one sequence attends to nothing."""
    return (q != 3) | (b != 1)


class FlexModel(nn.Module):
    def __init__(self, call: Callable[..., Any] = flex_attention, **arguments: Any) -> None:
        super().__init__()
        self.call, self.arguments = call, arguments

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.call(q, k, v, **self.arguments)


def random_qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 13, 8), torch.randn(2, 2, 13, 8), torch.randn(2, 2, 13, 8)


def block_mask_of(function: Callable[..., Tensor]) -> Any:
    return create_block_mask(function, 2, None, 13, 13, device="cpu", BLOCK_SIZE=4)


ARGUMENTS = [
    {}, {"score_mod": alibi}, {"score_mod": softcap, "scale": 0.7}, {"block_mask": block_mask_of(causal)},
    {"block_mask": block_mask_of(documents), "score_mod": alibi}, {"block_mask": block_mask_of(except_one_row)},
    {"block_mask": create_block_mask(causal, None, None, 13, 13, device="cpu")},
]  # fmt: skip
ignore_uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")


def reference_weights(
    q: Tensor, k: Tensor, score_mod: Any = None, block_mask: Any = None, scale: float | None = None
) -> Tensor:
    """Compute the weights from the full score matrix."""
    scores = q @ k.repeat_interleave(2, 1).mT * (8**-0.5 if scale is None else scale)
    indices = torch.meshgrid(*(torch.arange(n) for n in scores.shape), indexing="ij")
    if score_mod is not None:
        scores = score_mod(scores, *indices)
    if block_mask is not None:
        scores = scores.masked_fill(~block_mask.mask_mod(*indices), -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


@ignore_uncompiled
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: "+".join(arguments) or "plain")
def test_score_and_mask_functions(arguments: dict[str, Any]) -> None:
    q, k, v = random_qkv()
    model = FlexModel(enable_gqa=True, return_aux=AuxRequest(lse=True), **arguments)
    before, aux = model(q, k, v)
    with regard.watch(model, top=13, rows=[3]) as recording:
        watched, aux_watched = model(q, k, v)
    assert (watched - before).abs().max() <= 8 * EPS * before.abs().max()
    assert torch.allclose(aux.lse, aux_watched.lse, atol=8 * EPS * float(aux.lse.nan_to_num(neginf=0).abs().max()))
    (record,) = recording
    expected = reference_weights(q, k, **arguments)
    assert (record.heads, record.queries, record.keys) == (4, 13, 13)
    assert record.kind == (
        "decoder" if "block_mask" in arguments and arguments["block_mask"].mask_mod is causal else "self"
    )
    assert (dense_weights(record) - expected).abs().max() <= 8 * EPS
    assert record.rows is not None
    assert (record.rows - expected[:, :, 3:4]).abs().max() <= 8 * EPS


@ignore_uncompiled
@pytest.mark.parametrize("learned", [False, True])
def test_gradients(learned: bool) -> None:
    """Gradients of q, k and v, and of tensors that a score function closes over."""
    slopes = nn.Parameter(SLOPES.double()) if learned else SLOPES

    def change(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score - slopes[h] * (q - k).abs()

    tensors = [x.double().requires_grad_() for x in random_qkv()]
    inputs = [*tensors, *([slopes] if isinstance(slopes, nn.Parameter) else [])]
    mask = (13, 13, torch.ones(1, 1, 1), torch.zeros(1, 1, 1, 1), None, None, 128, 128, causal)

    def operator(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        indices = torch.meshgrid(*(torch.arange(n) for n in (2, 4, 13, 13)), indexing="ij")
        scores = change(q @ k.repeat_interleave(2, 1).mT * 8**-0.5, *indices).masked_fill(~causal(*indices), -torch.inf)
        return scores.softmax(-1) @ v.repeat_interleave(2, 1), scores.logsumexp(-1) / math.log(2), scores.amax(-1)

    summary = regard.Summary(max=True, top=13)
    out, _, _ = flex.attend(summary, operator, *tensors, change, mask, 8**-0.5, {})
    expected = operator(*tensors)
    both = [torch.autograd.grad(o[0].square().sum() + o[1].sum(), inputs) for o in (out, expected)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


def test_output_max_calls_operator() -> None:
    """With OUTPUT_MAX, which torch supports on a GPU only, the operator runs and the summaries are computed separately."""
    q, k, v = random_qkv()
    outputs = tuple(torch.ones(1) for _ in range(3))
    mask = (13, 13, torch.ones(1, 1, 1), torch.zeros(1, 1, 1, 1), None, None, 128, 128, lambda b, h, q, k: q >= k)
    out, summary, is_causal = flex.attend(
        regard.Summary(max=True, top=13), lambda *_: outputs, q, k, v, softcap, mask, 8**-0.5, {"OUTPUT_MAX": True}
    )
    assert out is outputs
    assert is_causal
    assert summary.top is not None
    expected = reference_weights(q, k, softcap, create_block_mask(causal, None, None, 13, 13, device="cpu"))
    assert (summary.top.weights - expected.sort(-1, descending=True).values).abs().max() <= 8 * EPS


@ignore_uncompiled
def test_memory_is_linear_and_layers_can_be_skipped() -> None:
    """8192 x 8192 scores would take 256 MB per head."""
    profiler = torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU])
    q = torch.randn(1, 1, 8192, 4)
    model = FlexModel(score_mod=softcap)
    with torch.no_grad(), regard.watch(model), profiler as profile:
        model(q, q, q)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < 4 * 8192 * 8192 * 4
    peak = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert peak < 100e6
    with regard.watch(model, layers=[]) as recording:
        model(*(random_qkv()[0],) * 3)
    assert not recording.records


@ignore_uncompiled
@pytest.mark.slow
def test_compiled_graph_runs_uncompiled() -> None:
    """A compiled model is recorded, with the output of the compiled graph."""
    q, k, v = random_qkv()
    model = FlexModel(torch.compile(flex_attention), enable_gqa=True, score_mod=alibi)
    with torch.no_grad():
        before = model(q, k, v)
        with regard.watch(model, top=13) as recording:
            watched = model(q, k, v)
    assert torch.allclose(before, watched, atol=1e-6)
    assert (dense_weights(recording[0]) - reference_weights(q, k, score_mod=alibi)).abs().max() <= 8 * EPS
