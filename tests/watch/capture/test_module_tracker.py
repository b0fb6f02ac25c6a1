"""Names, numbers, runs and kinds: where in a model an attention stands."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.hf_models import IDS, albert, bart, gpt2, quiet, t5
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import regard


def test_shared_layers_are_numbered_by_their_turns() -> None:
    model, inputs = albert("sdpa")
    with torch.no_grad(), regard.watch(model.eval()) as seen:
        model(**inputs)
        model(**inputs)
    assert [(record.call, record.layer) for record in seen] == [(call, layer) for call in (0, 1) for layer in range(3)]
    assert len({record.name for record in seen}) == 1


def test_generation_with_a_cache() -> None:
    """A prompt, then a token at a time: each layer keeps its number, and is known as a decoder with one query too."""
    config = transformers.GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    before = model.generate(IDS, **quiet)
    with regard.watch(model) as seen:
        watched = model.generate(IDS, **quiet)
    assert torch.equal(before, watched)
    shapes = [(17, 17), (1, 18), (1, 19), (1, 20)]
    assert [(record.queries, record.keys) for record in seen] == [shape for shape in shapes for _ in range(2)]
    assert [(record.call, record.layer) for record in seen] == [(call, layer) for call in range(4) for layer in (0, 1)]
    assert {record.kind for record in seen} == {"decoder"}


@pytest.mark.parametrize("prompt", [1, 3])
def test_one_query_is_a_decoder_by_what_its_module_says(prompt: int) -> None:
    model, _ = gpt2("sdpa")
    with torch.no_grad(), regard.watch(model.eval()) as seen:
        cache = model(IDS[:, :prompt], use_cache=True).past_key_values
        model(IDS[:, prompt : prompt + 1], past_key_values=cache)
    assert {record.kind for record in seen} == {"decoder"}


@pytest.mark.parametrize("family", [t5, bart], ids=lambda family: family.__name__)
def test_generation_from_an_encoder(family: object) -> None:
    """The encoder is run once, and belongs to the first step."""
    base, inputs = family("sdpa")  # type: ignore[operator]
    base.config.decoder_start_token_id = 0
    head = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}[base.config.model_type]
    model = getattr(transformers, head)(base.config).eval()
    words = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with regard.watch(model) as seen:
        model.generate(**words, **quiet, num_beams=1)
        model.generate(**words, **quiet, num_beams=1)
    assert [record.call for record in seen][len(seen) // 2] == 4, "the encoder begins the next one"
    first = [record for record in seen if record.call == 0]
    assert [record.kind for record in first] == ["self", "self", "decoder", "cross", "decoder", "cross"]
    assert [record.layer for record in first] == list(range(6))
    for call in range(1, 4):
        later = [record for record in seen if record.call == call]
        assert [record.layer for record in later] == [2, 3, 4, 5]
        assert [record.kind for record in later] == ["decoder", "cross"] * 2
        assert [record.keys for record in later] == [call + 1, 17] * 2


class Two(nn.Module):
    """Two layers by hand, of which the second may be computed again for its gradients."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.again = again
        self.first, self.second = nn.Linear(8, 8), Attend()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return checkpoint(self.second, x, use_reentrant=False) if self.again else self.second(x)


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.map(x), x, x)


def test_what_is_computed_again_for_gradients_is_not_told_again() -> None:
    x = torch.randn(2, 5, 8, requires_grad=True)
    model = Two(again=True)
    with regard.watch(model) as seen:
        model(x).sum().backward()
        late = model(x).sum()
    late.backward()  # when nobody watches
    assert [(record.call, record.layer, record.name) for record in seen] == [(0, 0, "second"), (1, 0, "second")]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_hugging_face(reentrant: bool) -> None:
    model, inputs = gpt2("sdpa")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    gradients = []
    for watched in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        with regard.watch(model) if watched else nullcontext() as seen:
            model(**inputs, use_cache=False).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert seen is not None
    assert [(record.call, record.layer) for record in seen] == [(0, 0), (0, 1)]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("error:Using `torch.compile:UserWarning")
def test_names_of_compiled_modules_are_those_of_what_was_compiled() -> None:
    torch._dynamo.reset()
    model = Two()
    model.second = torch.compile(model.second, backend="eager")  # type: ignore[assignment]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), regard.watch(compiled) as seen:
        compiled(torch.randn(2, 5, 8))
    assert [record.name for record in seen] == ["second"]


def test_cross_attention_is_known_by_its_lengths() -> None:
    class Cross(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k)

    with regard.watch(model := Cross()) as seen:
        model(torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8))
        model(torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8))
    assert [record.kind for record in seen] == ["cross", "self"]


@pytest.mark.parametrize("shape", ["2d", "3d", "5d", "broadcast", "grouped", "mask"])
def test_shapes_that_torch_takes(shape: str) -> None:
    """Other leading axes, of q, k and v apart, and masks that are repeated over them."""
    words: dict[str, object] = {}
    q, k, v = torch.randn(2, 3, 4, 5, 8), torch.randn(2, 3, 4, 7, 8), torch.randn(2, 3, 4, 7, 6)
    if shape == "2d":
        q, k, v = q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]
    if shape == "3d":
        q, k, v = q[0, 0], k[0, 0], v[0, 0]
        words["attn_mask"] = torch.rand(4, 5, 7) > 0.3
    if shape == "broadcast":
        q, k, v = q[:1], k[:, :1], v[:, :, :1]
    if shape == "grouped":
        k, v, words["enable_gqa"] = k[:, :, :2], v[:, :, :2], True
    if shape == "mask":
        words["attn_mask"] = torch.randn(2, 1, 1, 5, 7)

    class Model(nn.Module):
        def forward(self) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, **words)  # type: ignore[arg-type]

    model = Model()
    before = model()
    with regard.watch(model, top=7) as seen:
        watched = model()
    assert watched.shape == before.shape
    assert (watched - before).abs().max() <= 16 * torch.finfo(torch.float32).eps * before.abs().max()
    assert seen[0].queries == 5
    assert seen[0].keys == 7
    rows = seen[0].top.weights.sum(-1)
    assert torch.allclose(rows, torch.ones_like(rows))
