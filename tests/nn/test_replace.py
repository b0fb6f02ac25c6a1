"""Models whose attention is replaced give what they gave: torch's, and those of Hugging Face, in one pass and decoding."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import regard
from regard.nn import replace
from regard.nn.multihead import MultiheadAttention
from regard.nn.replace import replace_attention

IDS = torch.randint(5, 90, (2, 13), generator=torch.Generator().manual_seed(0))
REAL = torch.arange(13) < torch.tensor([13, 8])[:, None]
SMALL = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {"image_size": 16, "patch_size": 4}
PADDED = {"input_ids": IDS, "attention_mask": REAL.long()}
BOTH = {**PADDED, "decoder_input_ids": IDS[:, :7]}
PICTURES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    return hf.BertModel(hf.BertConfig(**SMALL)), PADDED


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"vocab_size": 90, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True)), PADDED


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)), PADDED


def mistral() -> tuple[nn.Module, dict[str, Tensor]]:
    """A sliding window."""
    return hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=5)), PADDED


def gemma2() -> tuple[nn.Module, dict[str, Tensor]]:
    """A softcap, and a window in every other layer."""
    words = {"sliding_window": 6, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, **words)), PADDED


def gpt_oss() -> tuple[nn.Module, dict[str, Tensor]]:
    """Sinks that are learned, and a window in every other layer."""
    words = {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**GROUPED, **words))
    model.set_experts_implementation("eager")
    return model, PADDED


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    """A bias by distance that is learned, and cross attention."""
    sizes = {"vocab_size": 90, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0)), BOTH


def bart() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 40))}  # fmt: skip
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=90, d_model=32, **sizes)), BOTH


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    return hf.ViTModel(hf.ViTConfig(**{**SMALL, **IMAGE})), PICTURES


def siglip() -> tuple[nn.Module, dict[str, Tensor]]:
    """Its last layer is torch's own."""
    return hf.SiglipVisionModel(hf.SiglipVisionConfig(**{**SMALL, **IMAGE})), PICTURES


# With the implementation that they are compared with: torch's has neither softcap nor sinks.
MODELS = {bert: "sdpa", gpt2: "sdpa", llama: "sdpa", mistral: "sdpa", gemma2: "eager", gpt_oss: "eager", t5: "sdpa",
          bart: "sdpa", vit: "sdpa", siglip: "sdpa"}  # fmt: skip


def made(family: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Tensor]]:
    """A model with weights so large that attention is far from even."""
    torch.manual_seed(0)
    model, inputs = family()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    model.set_attn_implementation(MODELS[family])
    return model.eval().to(dtype), {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output where tokens are real, and the gradients of all parameters."""
    outputs = model(**inputs)
    out = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    if "pooler_output" in outputs:
        out = torch.cat([out, outputs.pooler_output[:, None]], 1)
    elif out.shape[:2] == REAL.shape:
        out = out[REAL]
    leaves = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True)
    return out.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The words that models of Hugging Face are asked for with."""
    found: list[dict[str, Any]] = []
    attention = replace.attention

    def note(*x: Tensor, **words: Any) -> Any:
        found.append(words)
        return attention(*x, **words)

    monkeypatch.setattr(replace, "attention", note)
    return found


@pytest.mark.parametrize("family", MODELS, ids=lambda family: family.__name__)
def test_hugging_face(family: Any, calls: list[dict[str, Any]]) -> None:
    """Outputs and gradients, padded; then with attentions, as eager gives them."""
    model, inputs = made(family)
    told = run(model, inputs)
    assert replace_attention(model) is model
    assert model.config._attn_implementation == "regard"
    found = run(model, inputs)
    assert len(calls) == {t5: 6, bart: 6}.get(family, 2)
    # Gemma's own code computes its weights in float32, whatever its inputs are.
    near = 8 * torch.finfo(torch.float32).eps if family is gemma2 else 1e-12
    scale = max(float(g.abs().max()) for g in told[1])
    assert (found[0] - told[0]).abs().max() <= near * told[0].abs().max()
    for got, expected in zip(found[1], told[1], strict=True):
        assert (got - expected).abs().max() <= near * scale


@pytest.mark.parametrize("family", [bert, llama, gpt_oss, bart], ids=lambda family: family.__name__)
def test_weights(family: Any) -> None:
    """Models that hand on the wish for them get them, as their own code gives them."""
    model, inputs = made(family)
    model.set_attn_implementation("eager")
    told = model(**inputs, output_attentions=True)
    found = replace_attention(model)(**inputs, output_attentions=True)
    names = [n for n in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions") if told.get(n)]
    assert len(names) == (3 if family is bart else 1)
    for got, expected in ((g, e) for n in names for g, e in zip(found[n], told[n], strict=True)):
        assert got.dtype == expected.dtype
        assert (got - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps  # where eager computes them


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("family", [gpt2, llama, gemma2, gpt_oss, t5, bart], ids=lambda family: family.__name__)
def test_generation(family: Any, how: dict[str, Any]) -> None:
    """Decoding with a cache gives the same tokens; from prompts of unequal length, or into a cache with room to spare."""
    model, inputs = made(family, torch.float32)
    model.set_attn_implementation("eager")
    prompts = {"input_ids": IDS, "attention_mask": inputs["attention_mask"]}
    if "decoder_input_ids" not in inputs:
        prompts["attention_mask"] = prompts["attention_mask"].flip(1)  # on the left
    if "cache_implementation" in how:
        prompts["attention_mask"] = torch.ones_like(IDS)
    words = {**prompts, **how, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        told = model.generate(**words)
        assert torch.equal(replace_attention(model).generate(**words), told)


def test_it_can_be_chosen_and_left(calls: list[dict[str, Any]]) -> None:
    """As any implementation of Hugging Face's, once it is registered; and a watch sees it."""
    model, inputs = made(llama)
    replace_attention(replace_attention(model))
    told = model(**inputs).logits
    model.set_attn_implementation("sdpa")
    before = len(calls)
    model(**inputs)
    assert len(calls) == before
    model.set_attn_implementation("regard")
    assert torch.equal(model(**inputs).logits, told)
    with torch.no_grad(), regard.watch(model) as seen:
        model(**inputs)
    assert len(seen) == 2
    other = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, attn_implementation="regard"))
    assert other.config._attn_implementation == "regard"


def test_causal_costs_no_table(calls: list[dict[str, Any]]) -> None:
    model, _ = made(llama)
    replace_attention(model)
    model(input_ids=IDS)
    assert [call["mask"] for call in calls] == [regard.mask.causal(align="end")] * 2
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :6], use_cache=True).past_key_values
        model(input_ids=IDS[:, 6:7], past_key_values=cache)
        told = model(input_ids=IDS).logits
        found = model(input_ids=IDS[:, 7:], past_key_values=cache).logits
    assert calls[4]["mask"] is None
    assert (found - told[:, 7:]).abs().max() <= 1e-12 * told.abs().max()


def test_training_drops_weights() -> None:
    model = replace_attention(
        hf.BertModel(hf.BertConfig(**SMALL, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0))
    )
    first, second = (model.train()(**PADDED).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


def test_what_is_not_served() -> None:
    gptj = hf.GPTJModel(hf.GPTJConfig(vocab_size=90, n_embd=32, n_layer=1, n_head=4, rotary_dim=4))
    both = nn.ModuleList([nn.MultiheadAttention(8, 2), gptj])
    with pytest.raises(
        ValueError, match=r"^replace_attention: GPTJModel cannot be told how to compute attention; expected"
    ):
        replace_attention(both)
    assert type(both[0]) is nn.MultiheadAttention and gptj.config._attn_implementation != "regard"
    q = torch.zeros(1, 2, 3, 4)
    for name in ("indices", "block_indices", "sinks", "cache"):
        with pytest.raises(
            ValueError, match=rf"^regard as the attention of Identity: it is asked for {name}, which it does"
        ):
            replace._attend(nn.Identity(), q, q, q, None, **{name: q})


def test_learned_queries_and_scales() -> None:
    """One row of queries for all of a batch, and a scale that is learned, as some models have them."""
    q, k, scale = torch.randn(1, 2, 3, 4), torch.randn(5, 2, 7, 4), torch.tensor(0.7, requires_grad=True)
    out, weights = replace._attend(nn.Identity(), q, k, k, None, scaling=scale, is_causal=False)
    told = nn.functional.scaled_dot_product_attention(q.expand(5, -1, -1, -1), k, k, scale=0.7).transpose(1, 2)
    torch.testing.assert_close(out, told)
    assert weights is None
    out.sum().backward()
    assert scale.grad is not None
    table = torch.rand(5, 1, 3, 7)
    out, _ = replace._attend(nn.Identity(), q, k, k, table, position_bias=torch.ones(1, 2, 3, 1), is_causal=True)
    told = nn.functional.scaled_dot_product_attention(q.expand(5, -1, -1, -1), k, k, table).transpose(1, 2)
    torch.testing.assert_close(out, told)


# ---------------------------------------------------------------------------------------------------------------------
# Torch's.


class Own(nn.MultiheadAttention):
    """Somebody else's layer."""


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_transformer_of_torch(batch_first: bool) -> None:
    torch.manual_seed(0)
    words = {"dim_feedforward": 17, "dropout": 0.0, "batch_first": batch_first, "dtype": torch.float64}
    theirs = nn.Transformer(12, 2, 2, 2, **words)
    x, y = (torch.randn((3, n, 12) if batch_first else (n, 3, 12), dtype=torch.float64) for n in (7, 5))
    padding = torch.arange(7) >= torch.tensor([7, 2, 4])[:, None]
    lower = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    given = {"tgt_mask": lower, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    ours, parameters = copy.deepcopy(theirs), dict(theirs.named_parameters())
    before, state = list(ours.parameters()), ours.state_dict()
    replace_attention(ours.eval())
    layers = [m for m in ours.modules() if isinstance(m, nn.MultiheadAttention)]
    assert len(layers) == 6 and all(type(m) is MultiheadAttention and not m.training for m in layers)
    assert all(m.batch_first == batch_first for m in layers)
    assert all(a is b for a, b in zip(before, ours.parameters(), strict=True))
    assert not ours.encoder.use_nested_tensor
    assert list(ours.state_dict()) == list(state) == list(theirs.state_dict())
    told = theirs(x, y, **given)
    for model in (ours, ours.train()):
        torch.testing.assert_close(model(x, y, **given), told, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), regard.record_backends() as ran:
        torch.testing.assert_close(ours.eval()(x, y, **given), told, rtol=1e-12, atol=1e-12)
    assert len(ran) == 6
    pull = torch.randn_like(told)
    pairs = zip(
        *(torch.autograd.grad(m(x, y, **given), list(m.parameters()), pull) for m in (ours, theirs)), strict=True
    )
    for name, (got, expected) in zip(parameters, pairs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12, msg=name)


def test_one_layer_and_those_that_are_shared() -> None:
    layer = nn.MultiheadAttention(12, 2, dropout=0.3, kdim=5, vdim=7, add_bias_kv=True, add_zero_attn=True, bias=False)
    handled = []
    layer.register_forward_hook(lambda *_: handled.append(1))
    model = nn.ModuleList([layer, layer, Own(12, 2)])
    q, k, v = torch.randn(3, 12), torch.randn(4, 5), torch.randn(4, 7)
    told = layer.eval()(q, k, v)
    assert replace_attention(model) is model
    assert model[0] is model[1] is layer and type(model[2]) is Own
    for got, expected in zip(layer(q, k, v), told, strict=True):
        torch.testing.assert_close(got, expected)
    assert len(handled) == 2 and layer.dropout == 0.3
    assert replace_attention(nn.MultiheadAttention(8, 2)).kv_heads == 2


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"^replace_attention: there is no attention in Linear that can be replaced; expected"
    ):
        replace_attention(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"^replace_attention: there is no attention in Own that can be replaced"):
        replace_attention(Own(4, 2))
    with pytest.raises(TypeError, match=r"^replace_attention: model is 3; expected a torch.nn.Module"):
        replace_attention(3)  # type: ignore[type-var]
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(ValueError, match="there is no attention in Linear"):
        replace_attention(nn.Linear(2, 3))
    assert "transformers" not in sys.modules
