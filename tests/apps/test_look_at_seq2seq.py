"""`look` at encoder-decoders of transformers: what they generate, or a given target, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from regard.apps.look import look
from regard.view.page import page
from regard.view.terminal import terminal

transformers = pytest.importorskip("transformers")

_WORDS = ["<pad>", "</s>", "<unk>", "<s>", "the", "animal", "did", "not", "cross"]
_SIZES = {
    "vocab_size": 20, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 3,
}  # fmt: skip
_T5 = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
_TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def _prophetnet(t: Any) -> Any:
    sizes = {"hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_encoder_attention_heads": 2}
    heads = {"num_decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return t.ProphetNetForConditionalGeneration(
        t.ProphetNetConfig(vocab_size=20, **sizes, **heads, max_position_embeddings=70)
    )


def _bert_to_bert(t: Any, **options: Any) -> Any:
    parts = [t.BertConfig(vocab_size=20, **_TOWER, **options) for _ in range(2)]
    return t.EncoderDecoderModel(t.EncoderDecoderConfig.from_encoder_decoder_configs(*parts))


_MODELS: dict[str, Callable[[Any], Any]] = {
    "t5": lambda t: t.T5ForConditionalGeneration(t.T5Config(**_T5)),
    "marian": lambda t: t.MarianMTModel(t.MarianConfig(**_SIZES, max_position_embeddings=70, decoder_start_token_id=0)),
    "pegasus": lambda t: t.PegasusForConditionalGeneration(t.PegasusConfig(**_SIZES, max_position_embeddings=70)),
    "m2m100": lambda t: t.M2M100ForConditionalGeneration(t.M2M100Config(**_SIZES, max_position_embeddings=70)),
    "bart": lambda t: t.BartForConditionalGeneration(t.BartConfig(**_SIZES, max_position_embeddings=70)),
    "prophetnet": _prophetnet,
    "two berts": _bert_to_bert,
    "longt5": lambda t: t.LongT5ForConditionalGeneration(t.LongT5Config(**_T5)),
    "short marian": lambda t: t.MarianMTModel(
        t.MarianConfig(**_SIZES, max_position_embeddings=8, decoder_start_token_id=0)
    ),
    "short bart": lambda t: t.BartForConditionalGeneration(t.BartConfig(**_SIZES, max_position_embeddings=8)),
    "two short berts": lambda t: _bert_to_bert(t, max_position_embeddings=8),
    "short roberta": lambda t: t.RobertaModel(t.RobertaConfig(vocab_size=20, **_TOWER, max_position_embeddings=10)),
    "t5 encoder": lambda t: t.T5EncoderModel(t.T5Config(**_T5, is_encoder_decoder=False, use_cache=False)),
    "whisper": lambda t: t.WhisperForConditionalGeneration(
        t.WhisperConfig(**_SIZES, num_mel_bins=4, max_source_positions=10, max_target_positions=10)
    ),
    "clip": lambda t: t.CLIPModel(
        t.CLIPConfig(
            text_config={**_TOWER, "vocab_size": 20}, vision_config={**_TOWER, "image_size": 8, "patch_size": 4}
        )
    ),
    "bert": lambda t: t.BertModel(t.BertConfig(vocab_size=20, **_TOWER)),
}


@pytest.fixture
def save(tmp_path: Path) -> Callable[[str], str]:
    """Save a small model with its tokenizer, and return the directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    def make(name: str) -> str:
        torch.manual_seed(0)
        _MODELS[name](transformers).save_pretrained(tmp_path)
        raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(_WORDS)}, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(tmp_path)
        return str(tmp_path)

    return make


@pytest.mark.parametrize("target", [None, "the animal cross"])
@pytest.mark.parametrize("name", ["t5", "marian", "pegasus", "m2m100", "bart", "prophetnet", "two berts"])
def test_look_shows_encoder_decoder_and_cross_attention(
    name: str, target: str | None, save: Callable[[str], str]
) -> None:
    result = look("the animal did not cross", save(name), target=target)
    assert result.source == ["the", "animal", "did", "not", "cross"]
    assert result.produced is not None
    assert result.produced[:-1] == result.tokens[1:]
    if target is not None:
        assert result.produced == ["the", "animal", "cross"]
    L = len(result.tokens)
    kinds = [(record.kind, record.queries, record.keys) for record in result.recording]
    if name == "prophetnet":  # its decoder has several streams, whose lengths are not that of the text
        assert kinds == [("self", 5, 5)]
        assert result.note == "1 records have other lengths than the texts, and are not shown."
        assert result.notes[1].startswith("Attention was not recorded in prophetnet.decoder.layers.0.self_attn: ")
    else:
        assert kinds == [("self", 5, 5), ("decoder", L, L), ("cross", L, 5)]
    words = {"key_tokens": result.source, "produced": result.produced}
    assert "<html" in page(result.recording, result.tokens, **words)
    console = Console(file=StringIO(), width=100)
    console.print(terminal(result.recording, result.tokens, **words))
    assert "encoder" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "target", "error"),
    [
        ("whisper", None, "does not read and write texts; expected such as T5"),
        ("clip", None, "reads texts and pictures together; expected a model that reads texts"),
        ("bert", "the animal", "has no decoder; expected no target, or an encoder-decoder such as T5"),
        ("t5", " ", "target: is empty; expected some words"),
    ],
)
def test_models_without_texts_are_refused(
    name: str, target: str | None, error: str, save: Callable[[str], str]
) -> None:
    with pytest.raises(ValueError, match=error):
        look("the animal did not cross", save(name), target=target)


@pytest.mark.parametrize("name", ["short marian", "short bart", "two short berts"])
def test_texts_end_at_the_maximum_length(name: str, save: Callable[[str], str]) -> None:
    """Generation, too, which would go on after the last position."""
    path = save(name)
    text = "the animal did not cross " * 3
    result = look(text, path)
    assert result.source is not None
    assert len(result.source) == 8
    assert len(result.tokens) <= 8
    assert result.truncated == 7
    result = look("the animal", path, target=text)
    assert len(result.tokens) == 8
    assert result.notes == ["The last 7 tokens of the target exceed the model's maximum length and are omitted."]


@pytest.mark.parametrize("name", ["two berts", "bart"])
def test_sides_of_equal_length_differ_by_name(name: str, save: Callable[[str], str]) -> None:
    """Each layer by its name: a decoder that is a BERT has an encoder and cross attention of its own."""
    result = look("the animal did", save(name), target="cross not the")
    assert [record.kind for record in result.recording] == ["self", "decoder", "cross"]
    words = {"key_tokens": result.source, "produced": result.produced}
    console = Console(file=StringIO(), width=100)
    console.print(terminal(result.recording, result.tokens, **words))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("encoder layer") == text.count("cross layer") == 1


def test_positions_of_roberta_start_after_padding(save: Callable[[str], str]) -> None:
    result = look("the animal did not cross " * 3, save("short roberta"))
    assert len(result.tokens) == 8
    assert result.truncated == 7


def test_encoder_of_an_encoder_decoder_runs_alone(save: Callable[[str], str]) -> None:
    result = look("the animal did not cross", save("t5 encoder"))
    assert [(record.kind, record.queries) for record in result.recording] == [("self", 5)]


def test_layers_that_are_not_recorded_are_named(save: Callable[[str], str]) -> None:
    result = look("the animal did not cross", save("longt5"), target="the animal")
    assert [record.kind for record in result.recording] == ["decoder", "cross"]
    (note,) = result.notes
    assert note.startswith(
        "Attention was not recorded in encoder.block.0.layer.0.LocalSelfAttention: it is computed in blocks"
    )


def test_models_that_cannot_generate_ask_for_a_target(
    save: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(transformers.T5ForConditionalGeneration, "generate", fail)
    path = save("t5")
    with pytest.raises(ValueError, match=r"cannot generate a text; expected a target text \(--target\)$"):
        look("the animal", path)
    assert look("the animal", path, target="cross").produced == ["cross"]
