"""`replace_attention` preserves outputs and gradients of torch and Hugging Face models."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import regard
from regard.nn import transformers as implementation
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
    arguments = {"sliding_window": 6, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, **arguments)), PADDED


def gpt_oss() -> tuple[nn.Module, dict[str, Tensor]]:
    """Learned sinks, and a window in every other layer."""
    arguments = {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**GROUPED, **arguments))
    model.set_experts_implementation("eager")
    return model, PADDED


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    """A learned relative position bias, and cross-attention."""
    sizes = {"vocab_size": 90, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0)), BOTH


def bart() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 40))}  # fmt: skip
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=90, d_model=32, **sizes)), BOTH


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    return hf.ViTModel(hf.ViTConfig(**{**SMALL, **IMAGE})), PICTURES


def siglip() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model whose last layer is a torch layer."""
    return hf.SiglipVisionModel(hf.SiglipVisionConfig(**{**SMALL, **IMAGE})), PICTURES


# Models with the implementation they are compared with: SDPA has neither softcap nor sinks.
MODELS = {bert: "sdpa", gpt2: "sdpa", llama: "sdpa", mistral: "sdpa", gemma2: "eager", gpt_oss: "eager", t5: "sdpa",
          bart: "sdpa", vit: "sdpa", siglip: "sdpa"}  # fmt: skip


def made(family: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Tensor]]:
    """Return a model with large weights, so that attention is far from uniform."""
    torch.manual_seed(0)
    model, inputs = family()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    model.set_attn_implementation(MODELS[family])
    return model.eval().to(dtype), {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs of real tokens and the gradients of all parameters."""
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
    """The arguments of attention in calls of Hugging Face models."""
    found: list[dict[str, Any]] = []
    attention = implementation.attention

    def note(*x: Tensor, **arguments: Any) -> Any:
        found.append(arguments)
        return attention(*x, **arguments)

    monkeypatch.setattr(implementation, "attention", note)
    return found


@pytest.mark.parametrize("family", MODELS, ids=lambda family: family.__name__)
def test_hugging_face_outputs_match_eager(family: Any, calls: list[dict[str, Any]]) -> None:
    """Outputs and gradients with padding; then the attention weights, against eager."""
    model, inputs = made(family)
    reference = run(model, inputs)
    assert replace_attention(model) is model
    assert model.config._attn_implementation == "regard"
    found = run(model, inputs)
    assert len(calls) == {t5: 6, bart: 6}.get(family, 2)
    # Gemma's eager implementation computes the weights in float32 for all dtypes.
    near = 8 * torch.finfo(torch.float32).eps if family is gemma2 else 1e-12
    scale = max(float(g.abs().max()) for g in reference[1])
    assert (found[0] - reference[0]).abs().max() <= near * reference[0].abs().max()
    for got, expected in zip(found[1], reference[1], strict=True):
        assert (got - expected).abs().max() <= near * scale


@pytest.mark.parametrize("family", [bert, llama, gpt_oss, bart], ids=lambda family: family.__name__)
def test_output_attentions_match_eager(family: Any) -> None:
    """Models that pass on output_attentions return the same weights as their eager implementation."""
    model, inputs = made(family)
    model.set_attn_implementation("eager")
    reference = model(**inputs, output_attentions=True)
    found = replace_attention(model)(**inputs, output_attentions=True)
    names = [
        n for n in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions") if reference.get(n)
    ]
    assert len(names) == (3 if family is bart else 1)
    for got, expected in ((g, e) for n in names for g, e in zip(found[n], reference[n], strict=True)):
        assert got.dtype == expected.dtype
        assert (got - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps  # where eager computes them


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("family", [gpt2, llama, gemma2, gpt_oss, t5, bart], ids=lambda family: family.__name__)
def test_generation_matches_eager(family: Any, how: dict[str, Any]) -> None:
    """Cached decoding generates the same tokens, with padded prompts and with static caches."""
    model, inputs = made(family, torch.float32)
    model.set_attn_implementation("eager")
    prompts = {"input_ids": IDS, "attention_mask": inputs["attention_mask"]}
    if "decoder_input_ids" not in inputs:
        prompts["attention_mask"] = prompts["attention_mask"].flip(1)  # left padding
    if "cache_implementation" in how:
        prompts["attention_mask"] = torch.ones_like(IDS)
    arguments = {**prompts, **how, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        reference = model.generate(**arguments)
        assert torch.equal(replace_attention(model).generate(**arguments), reference)


def test_attention_implementation_can_be_switched(calls: list[dict[str, Any]]) -> None:
    """Like any registered Hugging Face implementation. `watch` records its calls."""
    model, inputs = made(llama)
    replace_attention(replace_attention(model))
    reference = model(**inputs).logits
    model.set_attn_implementation("sdpa")
    before = len(calls)
    model(**inputs)
    assert len(calls) == before
    model.set_attn_implementation("regard")
    assert torch.equal(model(**inputs).logits, reference)
    with torch.no_grad(), regard.watch(model) as statistics:
        model(**inputs)
    assert len(statistics) == 2
    other = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, attn_implementation="regard"))
    assert other.config._attn_implementation == "regard"


def test_causal_mask_is_not_materialized(calls: list[dict[str, Any]]) -> None:
    model, _ = made(llama)
    replace_attention(model)
    model(input_ids=IDS)
    assert [call["mask"] for call in calls] == [regard.mask.causal(align="end")] * 2
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :6], use_cache=True).past_key_values
        model(input_ids=IDS[:, 6:7], past_key_values=cache)
        reference = model(input_ids=IDS).logits
        found = model(input_ids=IDS[:, 7:], past_key_values=cache).logits
    assert calls[4]["mask"] is None
    assert (found - reference[:, 7:]).abs().max() <= 1e-12 * reference.abs().max()


def test_dropout_applies_in_training() -> None:
    model = replace_attention(
        hf.BertModel(hf.BertConfig(**SMALL, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0))
    )
    first, second = (model.train()(**PADDED).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


def test_unsupported_models_and_arguments_raise() -> None:
    gptj = hf.GPTJModel(hf.GPTJConfig(vocab_size=90, n_embd=32, n_layer=1, n_head=4, rotary_dim=4))
    both = nn.ModuleList([nn.MultiheadAttention(8, 2), gptj])
    with pytest.raises(
        ValueError, match=r"^replace_attention: GPTJModel cannot select an attention implementation; expected"
    ):
        replace_attention(both)
    assert type(both[0]) is nn.MultiheadAttention and gptj.config._attn_implementation != "regard"
    q = torch.zeros(1, 2, 3, 4)
    for name in ("indices", "block_indices", "sinks", "cache"):
        with pytest.raises(
            ValueError, match=rf"^regard as the attention of Identity: {name} is not supported; expected"
        ):
            implementation._attend(nn.Identity(), q, q, q, None, **{name: q})


def test_learned_queries_and_tensor_scales() -> None:
    """Queries of batch size 1 broadcast, and the scale may be a tensor, as in some models."""
    q, k, scale = torch.randn(1, 2, 3, 4), torch.randn(5, 2, 7, 4), torch.tensor(0.7, requires_grad=True)
    out, weights = implementation._attend(nn.Identity(), q, k, k, None, scaling=scale, is_causal=False)
    reference = nn.functional.scaled_dot_product_attention(q.expand(5, -1, -1, -1), k, k, scale=0.7).transpose(1, 2)
    torch.testing.assert_close(out, reference)
    assert weights is None
    out.sum().backward()
    assert scale.grad is not None
    table = torch.rand(5, 1, 3, 7)
    out, _ = implementation._attend(nn.Identity(), q, k, k, table, position_bias=torch.ones(1, 2, 3, 1), is_causal=True)
    reference = nn.functional.scaled_dot_product_attention(q.expand(5, -1, -1, -1), k, k, table).transpose(1, 2)
    torch.testing.assert_close(out, reference)


# ---------------------------------------------------------------------------------------------------------------------
# Models of torch.


class Own(nn.MultiheadAttention):
    """A subclass of the layer of torch."""


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_transformer_outputs_are_unchanged(batch_first: bool) -> None:
    torch.manual_seed(0)
    arguments = {"dim_feedforward": 17, "dropout": 0.0, "batch_first": batch_first, "dtype": torch.float64}
    theirs = nn.Transformer(12, 2, 2, 2, **arguments)
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
    reference = theirs(x, y, **given)
    for model in (ours, ours.train()):
        torch.testing.assert_close(model(x, y, **given), reference, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), regard.record_backends() as ran:
        torch.testing.assert_close(ours.eval()(x, y, **given), reference, rtol=1e-12, atol=1e-12)
    assert len(ran) == 6
    dout = torch.randn_like(reference)
    pairs = zip(
        *(torch.autograd.grad(m(x, y, **given), list(m.parameters()), dout) for m in (ours, theirs)), strict=True
    )
    for name, (got, expected) in zip(parameters, pairs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12, msg=name)


def test_single_and_shared_layers_are_replaced() -> None:
    layer = nn.MultiheadAttention(12, 2, dropout=0.3, kdim=5, vdim=7, add_bias_kv=True, add_zero_attn=True, bias=False)
    handled = []
    layer.register_forward_hook(lambda *_: handled.append(1))
    model = nn.ModuleList([layer, layer, Own(12, 2)])
    q, k, v = torch.randn(3, 12), torch.randn(4, 5), torch.randn(4, 7)
    reference = layer.eval()(q, k, v)
    assert replace_attention(model) is model
    assert model[0] is model[1] is layer and type(model[2]) is Own
    for got, expected in zip(layer(q, k, v), reference, strict=True):
        torch.testing.assert_close(got, expected)
    assert len(handled) == 2 and layer.dropout == 0.3
    assert replace_attention(nn.MultiheadAttention(8, 2)).kv_heads == 2


def test_models_without_replaceable_attention_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^replace_attention: Linear has no attention that can be replaced; expected"):
        replace_attention(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"^replace_attention: Own has no attention that can be replaced"):
        replace_attention(Own(4, 2))
    with pytest.raises(TypeError, match=r"^replace_attention: model is 3; expected a torch.nn.Module"):
        replace_attention(3)  # type: ignore[type-var]
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(ValueError, match="Linear has no attention"):
        replace_attention(nn.Linear(2, 3))
    assert "transformers" not in sys.modules


class _Own(nn.MultiheadAttention):
    """A subclass, which may compute something else."""


def test_layers_that_are_not_replaced_are_named() -> None:
    model = nn.ModuleDict({name: nn.MultiheadAttention(8, 2) for name in ("plain", "normed")})
    model["own"] = _Own(8, 2)
    torch.nn.utils.parametrizations.weight_norm(model["normed"], "in_proj_weight")
    x = torch.randn(3, 1, 8)
    before = model["normed"](x, x, x)[0]
    with pytest.warns(UserWarning, match=r"normed \(parametrized\), own \(of class _Own\) are not replaced"):
        replace_attention(model)
    assert isinstance(model["plain"], MultiheadAttention) and type(model["own"]) is _Own
    torch.testing.assert_close(model["normed"](x, x, x)[0], before)
    with pytest.raises(
        ValueError, match=r"no attention that can be replaced \(own \(of class _Own\) is not replaced\)"
    ):
        replace_attention(nn.ModuleDict({"own": _Own(8, 2)}))
