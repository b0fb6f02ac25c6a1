"""Names, layer indices, calls and kinds of records."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.hf_models import GENERATE, IDS, albert, bart, gpt2, t5
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import regard


def test_shared_module_has_one_layer_index_per_use() -> None:
    model, inputs = albert("sdpa")
    with torch.no_grad(), regard.watch(model.eval()) as recording:
        model(**inputs)
        model(**inputs)
    assert [(record.call, record.layer) for record in recording] == [
        (call, layer) for call in (0, 1) for layer in range(3)
    ]
    assert len({record.name for record in recording}) == 1


def test_generation_with_a_cache() -> None:
    """A prompt, then one token per call: layers keep their index, and are decoders with one query, too."""
    config = transformers.GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    before = model.generate(IDS, **GENERATE)
    with regard.watch(model) as recording:
        watched = model.generate(IDS, **GENERATE)
    assert torch.equal(before, watched)
    shapes = [(17, 17), (1, 18), (1, 19), (1, 20)]
    assert [(record.queries, record.keys) for record in recording] == [shape for shape in shapes for _ in range(2)]
    assert [(record.call, record.layer) for record in recording] == [
        (call, layer) for call in range(4) for layer in (0, 1)
    ]
    assert {record.kind for record in recording} == {"decoder"}


@pytest.mark.parametrize("prompt", [1, 3])
def test_single_query_is_decoder_by_module_attribute(prompt: int) -> None:
    model, _ = gpt2("sdpa")
    with torch.no_grad(), regard.watch(model.eval()) as recording:
        cache = model(IDS[:, :prompt], use_cache=True).past_key_values
        model(IDS[:, prompt : prompt + 1], past_key_values=cache)
    assert {record.kind for record in recording} == {"decoder"}


@pytest.mark.parametrize("family", [t5, bart], ids=lambda family: family.__name__)
def test_encoder_decoder_generation(family: object) -> None:
    """The encoder runs once, and belongs to the call of the first step."""
    base, inputs = family("sdpa")  # type: ignore[operator]
    base.config.decoder_start_token_id = 0
    head = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}[base.config.model_type]
    model = getattr(transformers, head)(base.config).eval()
    arguments = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with regard.watch(model) as recording:
        model.generate(**arguments, **GENERATE, num_beams=1)
        model.generate(**arguments, **GENERATE, num_beams=1)
    assert [record.call for record in recording][len(recording) // 2] == 4, "the encoder must start the next call"
    first = [record for record in recording if record.call == 0]
    assert [record.kind for record in first] == ["self", "self", "decoder", "cross", "decoder", "cross"]
    assert [record.layer for record in first] == list(range(6))
    for call in range(1, 4):
        later = [record for record in recording if record.call == call]
        assert [record.layer for record in later] == [2, 3, 4, 5]
        assert [record.kind for record in later] == ["decoder", "cross"] * 2
        assert [record.keys for record in later] == [call + 1, 17] * 2


class TwoLayers(nn.Module):
    """A linear layer and an attention layer, optionally under activation checkpointing."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.first, self.second = nn.Linear(8, 8), SelfAttention()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return checkpoint(self.second, x, use_reentrant=False) if self.checkpointed else self.second(x)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.map(x), x, x)


def test_recomputation_is_not_recorded() -> None:
    x = torch.randn(2, 5, 8, requires_grad=True)
    model = TwoLayers(checkpointed=True)
    with regard.watch(model) as recording:
        model(x).sum().backward()
        late = model(x).sum()
    late.backward()  # after the watch
    assert [(record.call, record.layer, record.name) for record in recording] == [(0, 0, "second"), (1, 0, "second")]


@pytest.mark.parametrize("reentrant", [False, True])
def test_hugging_face_gradient_checkpointing(reentrant: bool) -> None:
    model, inputs = gpt2("sdpa")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    gradients = []
    for watched in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        with regard.watch(model) if watched else nullcontext() as recording:
            model(**inputs, use_cache=False).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert recording is not None
    assert [(record.call, record.layer) for record in recording] == [(0, 0), (0, 1)]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("error:Using `torch.compile:UserWarning")
def test_compiled_module_names_have_no_prefix() -> None:
    torch._dynamo.reset()
    model = TwoLayers()
    model.second = torch.compile(model.second, backend="eager")  # type: ignore[assignment]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), regard.watch(compiled) as recording:
        compiled(torch.randn(2, 5, 8))
    assert [record.name for record in recording] == ["second"]


def test_kind_is_cross_if_lengths_differ() -> None:
    class CrossAttention(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k)

    with regard.watch(model := CrossAttention()) as recording:
        model(torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8))
        model(torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8))
    assert [record.kind for record in recording] == ["cross", "self"]


@pytest.mark.parametrize("shape", ["2d", "3d", "5d", "broadcast", "grouped", "mask"])
def test_sdpa_shapes(shape: str) -> None:
    """Leading dimensions that differ between q, k and v, and masks that broadcast over them."""
    arguments: dict[str, object] = {}
    q, k, v = torch.randn(2, 3, 4, 5, 8), torch.randn(2, 3, 4, 7, 8), torch.randn(2, 3, 4, 7, 6)
    if shape == "2d":
        q, k, v = q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]
    if shape == "3d":
        q, k, v = q[0, 0], k[0, 0], v[0, 0]
        arguments["attn_mask"] = torch.rand(4, 5, 7) > 0.3
    if shape == "broadcast":
        q, k, v = q[:1], k[:, :1], v[:, :, :1]
    if shape == "grouped":
        k, v, arguments["enable_gqa"] = k[:, :, :2], v[:, :, :2], True
    if shape == "mask":
        arguments["attn_mask"] = torch.randn(2, 1, 1, 5, 7)

    class Model(nn.Module):
        def forward(self) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, **arguments)  # type: ignore[arg-type]

    model = Model()
    before = model()
    with regard.watch(model, top=7) as recording:
        watched = model()
    assert watched.shape == before.shape
    assert (watched - before).abs().max() <= 16 * torch.finfo(torch.float32).eps * before.abs().max()
    assert recording[0].queries == 5
    assert recording[0].keys == 7
    rows = recording[0].top.weights.sum(-1)
    assert torch.allclose(rows, torch.ones_like(rows))
