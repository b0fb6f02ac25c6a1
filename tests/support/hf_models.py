"""Small Hugging Face models, each with inputs."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

IDS = torch.randint(5, 90, (2, 17), generator=torch.Generator().manual_seed(0))
PADDED = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS).index_fill(1, torch.arange(12, 17), 0)}
SMALL = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
# Arguments of `generate`: four tokens, deterministic.
GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def bert(implementation: str) -> tuple[nn.Module, dict[str, Tensor]]:
    return transformers.BertModel(transformers.BertConfig(**SMALL, attn_implementation=implementation)), PADDED


def gpt2(implementation: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(
        vocab_size=90,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=implementation,
    )
    return transformers.GPT2Model(config), PADDED


def llama(implementation: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, attn_implementation=implementation)
    return transformers.LlamaModel(config), {"input_ids": IDS}


def t5(implementation: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.T5Config(
        vocab_size=90, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, attn_implementation=implementation
    )
    return transformers.T5Model(config), {**PADDED, "decoder_input_ids": IDS[:, :9]}


def bart(implementation: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BartConfig(
        vocab_size=90, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32,
        attn_implementation=implementation,
    )  # fmt: skip
    return transformers.BartModel(config), {**PADDED, "decoder_input_ids": IDS[:, :9]}


def vit(implementation: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4,
        attn_implementation=implementation,
    )  # fmt: skip
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return transformers.ViTModel(config, add_pooling_layer=False), {"pixel_values": images}


def albert(implementation: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.AlbertConfig(**{**SMALL, "num_hidden_layers": 3}, embedding_size=16)
    config._attn_implementation = implementation
    return transformers.AlbertModel(config), PADDED


MODELS = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5, "bart": bart, "vit": vit, "albert": albert}
