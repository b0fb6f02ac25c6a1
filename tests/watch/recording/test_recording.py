"""Recordings: joining, saving, loading and exporting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from support.hf_models import GENERATE, IDS, bart
from support.records import dense_weights, make_record, random_weights

import regard
from regard.watch import Record, Recording


def is_equal(a: Record, b: Record) -> bool:
    for name in ("name", "layer", "call", "kind", "heads", "queries", "keys"):
        if getattr(a, name) != getattr(b, name):
            return False
    tensors = [(x.top.weights, x.top.keys, x.max, x.received, x.entropy, x.rows) for x in (a, b)]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(*tensors, strict=True))


def test_joined_generation_matches_single_call() -> None:
    config = transformers.GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    with regard.watch(model, top=20) as steps:
        text = model.generate(IDS, **GENERATE)
    with torch.no_grad(), regard.watch(model, top=20) as once:
        model(text[:, :-1])
    joined = steps.joined()
    assert len(joined) == len(once) == 2
    for a, b in zip(joined, once, strict=True):
        assert (a.name, a.layer, a.kind, a.queries, a.keys) == (b.name, b.layer, b.kind, 20, 20)
        torch.testing.assert_close(dense_weights(a), dense_weights(b))
        for name in ("max", "received", "entropy"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name))


def test_joined_encoder_decoder_generation() -> None:
    base, inputs = bart("sdpa")
    base.config.decoder_start_token_id = 0
    model = transformers.BartForConditionalGeneration(base.config).eval()
    with regard.watch(model, top=3, received=False) as recording:
        for _ in range(2):
            model.generate(**{key: inputs[key] for key in ("input_ids", "attention_mask")}, **GENERATE, num_beams=1)
    joined = recording.joined()
    shapes = [(record.kind, record.queries, record.keys) for record in joined]
    expected = [("self", 17, 17)] * 2 + [("decoder", 4, 4), ("cross", 4, 17)] * 2
    assert shapes == expected * 2
    assert joined[0].received is None
    again = joined.joined()
    assert all(a is b for a, b in zip(joined, again, strict=True)), "joining twice must change nothing"


def example_recording() -> Recording:
    first = make_record(random_weights(2, 3, 5, 5, causal=True), 0, k=2, causal=True)
    second = make_record(random_weights(2, 3, 5, 7), 1, kind="cross")
    return Recording([first, second], list("abcde"), list("tuvwxyz"))


def test_save_load_round_trip(tmp_path: Path) -> None:
    recording = example_recording()
    recording.save(tmp_path / "recording.safetensors")
    loaded = Recording.load(tmp_path / "recording.safetensors")
    assert all(is_equal(a, b) for a, b in zip(recording, loaded, strict=True))
    assert (loaded.tokens, loaded.key_tokens) == (recording.tokens, recording.key_tokens)
    Recording().save(tmp_path / "empty.safetensors")
    assert len(Recording.load(tmp_path / "empty.safetensors")) == 0


def test_save_load_all_fields_in_float64(tmp_path: Path) -> None:
    model, inputs = bart("sdpa")
    with torch.no_grad(), regard.watch(model.double().eval(), rows=[0, 2]) as recording:
        model(**inputs)
    recording.save(tmp_path / "recording.safetensors")
    assert all(
        is_equal(a, b) for a, b in zip(recording, Recording.load(tmp_path / "recording.safetensors"), strict=True)
    )


DAMAGES: list[tuple[str, Any, str]] = [
    ("tensors", {"0.max": None}, "record 0: max is missing"),
    ("tensors", {"0.max": torch.zeros(2, 3, 4)}, r"record 0: max has shape \(2, 3, 4\)"),
    ("tensors", {"0.top.keys": torch.full((2, 3, 5, 2), 5, dtype=torch.int32)}, r"has keys outside of 0..4"),
    ("tensors", {"0.top.keys": torch.full((2, 3, 5, 2), -2, dtype=torch.int32)}, r"has keys outside of 0..4"),
    ("tensors", {"0.top.keys": torch.zeros(2, 3, 5, 2)}, "top.keys has dtype torch.float32"),
    ("tensors", {"0.top.keys": torch.zeros(2, 3, 5, 1, dtype=torch.int32)}, "top.weights has shape"),
    ("tensors", {"0.entropy": torch.full((2, 3, 5), torch.nan)}, "entropy has nonfinite elements"),
    ("tensors", {"7.max": torch.zeros(1)}, "'7.max' belongs to no record"),
    ("record", {"heads": "many"}, "record 0: heads is 'many'; expected an integer >= 0"),
    ("record", {"heads": True}, "heads is True"),
    ("record", {"queries": -1}, "queries is -1"),
    ("record", {"kind": "strange"}, "kind is 'strange'; expected one of self, decoder, cross"),
    ("record", {"name": 3}, "not an object with a name"),
    ("content", {"tokens": "abc"}, "tokens is str; expected a list of strings, or null"),
    ("content", {"records": {}}, "has no list of records"),
    ("metadata", {"version": "99"}, "version is '99'; expected '1'"),
    ("metadata", {"format": "pt"}, "not a recording; expected"),
    ("metadata", {"content": "{"}, "content is not valid JSON"),
]


@pytest.mark.parametrize(("where", "change", "message"), DAMAGES, ids=[message for _, _, message in DAMAGES])
def test_untrusted_file_is_rejected(tmp_path: Path, where: str, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "recording.safetensors"
    example_recording().save(path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    content = json.loads(metadata["content"])
    if where == "tensors":
        tensors = {name: x for name, x in (tensors | change).items() if x is not None}
    if where == "record":
        content["records"][0] |= change
    if where == "content":
        content |= change
    metadata["content"] = json.dumps(content)
    if where == "metadata":
        metadata |= change
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=message):
        Recording.load(path)


def test_load_of_other_files_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        Recording.load(tmp_path / "none")
    (tmp_path / "text").write_text("not a recording" * 10)
    with pytest.raises(ValueError, match="not a safetensors file"):
        Recording.load(tmp_path / "text")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Recording.load(tmp_path / "pickle.pt")


def test_exports() -> None:
    recording = example_recording()
    first = recording[0]
    arrays = recording.numpy()
    assert arrays[0]["weights"].shape == (2, 3, 5, 2)
    assert set(arrays[0]) == {"weights", "keys", "max", "received", "entropy"}
    frame = recording.frame()
    assert len(frame) == int((first.top.keys >= 0).sum()) + int((recording[1].top.keys >= 0).sum())
    own = frame[(frame.layer == 0) & (frame.batch == 1) & (frame["head"] == 2) & (frame["query"] == 4)]
    assert own.key.tolist() == first.top.keys[1, 2, 4].tolist()
    assert own.weight.tolist() == pytest.approx(first.top.weights[1, 2, 4].tolist())
    assert set(own.query_token) == {"e"}
    assert own.key_token.tolist() == ["abcde"[n] for n in own.key]
    cross = frame[frame.kind == "cross"].iloc[0]
    assert cross.key_token == "tuvwxyz"[cross.key]
    content = json.loads(recording.json())
    assert content["tokens"] == list("abcde")
    assert torch.equal(torch.tensor(content["records"][1]["top"]["weights"]), recording[1].top.weights)
    assert "rows" not in content["records"][0]
    assert Recording().frame().empty
    assert "query_token" not in Recording([first]).frame()


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding"])
def test_joined_generation_of_other_caches_matches_single_call(cache: str) -> None:
    """A static cache holds more keys than there are, a sliding window the last ones only."""
    common = {
        "vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    if cache == "sliding":
        layer_types = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(**common, head_dim=8, sliding_window=4, layer_types=layer_types)
        model = transformers.Gemma3ForCausalLM(config).eval()
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common)).eval()
    ids = torch.randint(5, 90, (2, 8))
    options = {"cache_implementation": "static"} if cache == "static" else {}
    with torch.no_grad(), regard.watch(model, top=12) as steps:
        out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)
    with torch.no_grad(), regard.watch(model, top=12) as single:
        model(out[:, :-1])
    joined = steps.joined()
    assert [(record.queries, record.keys) for record in joined] == [(11, 11), (11, 11)]
    for record, whole in zip(joined, single, strict=True):
        torch.testing.assert_close(record.max, whole.max, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(record.received, whole.received, rtol=1e-4, atol=1e-5)
        assert torch.equal(record.top.keys[..., 0], whole.top.keys[..., 0])
