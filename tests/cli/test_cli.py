"""The command line, run as its users run it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from support.command_line import run
from support.page import block
from support.paths import ROOT

from regard.apps.look import look, look_at_record
from regard.cli import main
from regard.watch import Recording


@pytest.fixture(scope="module")
def causal_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small Llama with a tokenizer of its own, saved as users save theirs."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llama")
    words = ["<unk>", "<s>", "the", "cat", "sat", "on", "mat", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=12,
    )  # fmt: skip
    transformers.LlamaModel(config).save_pretrained(folder)
    return str(folder)


def test_look_at_the_default_model(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run("look", "The animal didn't cross the street because it was too tired.", "--out", str(page))
    assert "6 layers" in done.stdout
    assert "previous token" in done.stdout
    document = page.read_text(encoding="utf-8")
    assert "all-MiniLM-L6-v2" in document
    assert "http://" not in document.replace("http://www.w3.org/", "")


def test_look_records_the_weights_of_the_model() -> None:
    looked = look("A cat, a mat.")
    assert looked.tokens == ["[CLS]", "a", "cat", ",", "a", "mat", ".", "[SEP]"]
    assert len(looked.watched) == 6
    for record in looked.watched:
        assert record.top.weights.shape == (1, 12, 8, 8)
        assert not record.causal
        assert torch.allclose(record.top.weights.sum(-1), torch.ones(1, 12, 8), atol=1e-5)


def test_look_at_a_causal_model_and_cut_what_is_too_long(causal_model: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = "the cat sat on the mat . the cat sat on the mat ."
    done = run("look", "-", "--model", causal_model, "--out", str(page), stdin=text)
    assert "The last 2 tokens are beyond what the model can take" in done.stdout
    looked = look(text, causal_model)
    assert looked.truncated == 2
    assert [record.causal for record in looked.watched] == [True, True]
    assert int(looked.watched[0].top.keys[0, 0, 0, 1:].max()) == -1


def test_what_was_seen_is_saved_and_looked_at_again(causal_model: str, tmp_path: Path) -> None:
    saved, first, again = (tmp_path / name for name in ("seen.safetensors", "first.html", "again.html"))
    run("look", "the cat sat", "--model", causal_model, "--save", str(saved), "--out", str(first))
    run("look", str(saved), "--out", str(again))
    data = [block(page.read_text(encoding="utf-8")) for page in (first, again)]
    assert [token[0] for token in data[1]["texts"][0]] == ["the", "cat", "sat"]
    assert data[0]["layers"] == data[1]["layers"]
    watched = Recording.load(saved)
    watched.tokens = None
    watched.save(saved)
    assert look_at_record(saved).tokens == ["0", "1", "2"], "the numbers of the places stand for tokens"
    saved.write_bytes(b"nothing" * 9)
    with pytest.raises(ValueError, match="is no safetensors file"):
        look_at_record(saved)


def test_look_tells_what_is_wrong(tmp_path: Path) -> None:
    assert "text: is empty" in run("look", "  ", "--out", str(tmp_path / "p.html"), expect=2).stderr
    assert "does not exist" in run("look", "hi", "--out", str(tmp_path / "no" / "p.html"), expect=2).stderr
    nowhere = run("look", "hi", "--model", str(tmp_path), "--out", str(tmp_path / "p.html"), expect=2)
    assert "cannot be loaded by transformers" in nowhere.stderr
    assert "Traceback" not in nowhere.stderr


def test_doctor_names_every_kernel_and_reason() -> None:
    out = run("doctor").stdout
    for word in ("PyTorch", "tiled", "sdpa", "transformers", "softcap", "sparsemax"):
        assert word in out


def test_bench_measures_and_refuses_wrong_results(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    done = run("bench", "--only", "plain", "--quick", "--json", "--plot", str(plot))
    results = json.loads(done.stdout)
    assert [r["direction"] for r in results] == ["forward", "forward + backward"]
    assert all(r["ratio"] > 0 and r["ours_error"] < 1e-5 for r in results)
    assert plot.stat().st_size > 5000
    assert "no case has 'nonsense' in its name" in run("bench", "--only", "nonsense", expect=2).stderr


def test_demo_tells_where_the_page_is(tmp_path: Path) -> None:
    done = run("demo", "--quick", "--out", str(tmp_path / "demo"))
    for word in ("score", "normalise", "aggregate", "Open the page"):
        assert word in done.stdout
    assert (tmp_path / "demo" / "attention.html").stat().st_size > 20_000


def test_help_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for command in ("look", "bench", "doctor", "demo"):
        assert command in out


def test_missing_packages_are_named() -> None:
    code = "import sys; sys.modules['typer'] = None\nimport regard.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1
    assert "pip install 'regard[look]'" in done.stderr


@pytest.mark.parametrize("package", ["safetensors", "tokenizers", "matplotlib", "sacrebleu"])
def test_packages_that_training_needs_in_the_end_are_missed_before_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, found = tmp_path / "pairs.tsv", importlib.util.find_spec
    data.write_text("a b\tc d\n" * 40, encoding="utf-8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else found(name, *more))
    with pytest.raises(SystemExit) as stop:
        main(["train", "translate", str(data), "--out", str(tmp_path / "out")])
    assert stop.value.code
    assert f"needs the package {package}: pip install 'regard[tasks]'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
