"""The commands train, evaluate, predict and look, on small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import command_line
from support.examples import pairs, reviews, sentences

from regard.apps.look import look, look_at_record
from regard.view.data import Data, PageInput
from regard.watch import Recording

SMALL = ["--width", "32", "--layers", "1", "--batch", "64", "--rate", "0.01", "--dropout", "0"]


def run(*arguments: str, expect: int = 0, stdin: str = "") -> str:
    """Return the output of a command, or its error."""
    done = command_line.run(*arguments, expect=expect, stdin=stdin)
    assert "Traceback" not in done.stderr
    return done.stderr if expect else done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def translator(folder: Path) -> str:
    """A model trained on two files, with two files of dev examples."""
    examples = [(p.source[:2], p.source) for p in pairs(80)]
    for part, some in (("train", examples[:60]), ("dev", examples[60:])):
        for side, ending in ((0, "en"), (1, "de")):
            (folder / f"{part}.{ending}").write_text("".join(f"{pair[side]}\n" for pair in some))
    names = [str(folder / name) for name in ("train.en", "train.de", "dev.en", "dev.de")]
    options = ["--dev", names[2], "--dev", names[3], "--vocabulary", "40", "--heads", "2", "--epochs", "2"]
    out = str(folder / "translator")
    done = run("train", "translate", *names[:2], *options, *SMALL, "--out", out)
    assert "60 training examples, 20 dev examples; transformer model" in done
    assert "epoch   2/2" in done
    assert "BLEU" in done
    return out


def test_translate_evaluates_and_predicts(translator: str, folder: Path) -> None:
    metrics = json.loads(
        run("evaluate", translator, str(folder / "dev.en"), str(folder / "dev.de"), "--json", "--beams", "2")
    )
    assert metrics.keys() == {"examples", "BLEU", "chrF"}
    assert metrics["examples"] == 20
    texts = folder / "texts"
    texts.write_text("ab\n\ncd\n")
    lines = run("predict", translator, str(texts)).splitlines()
    assert len(lines) == 3
    assert run("predict", translator, stdin="ab\n\ncd\n").splitlines() == lines
    prediction = json.loads(run("predict", translator, "ab", "--json"))
    assert prediction["text"] == lines[0]
    assert len(prediction["weights"]) == len(prediction["target"]) + 1
    assert run("predict", translator, "ab") == f"{lines[0]}\n"


def test_look_names_rows_of_cross_attention_by_produced_tokens(translator: str, tmp_path: Path) -> None:
    """The rows of `look` are those of `predict`: the token that a step produces, not the one that it reads."""
    prediction = json.loads(run("predict", translator, "abc", "--json"))
    result = look("abc", translator)
    assert result.produced == [*prediction["target"], "</s>"] and result.tokens == ["<s>", *prediction["target"]]
    for record in result.recording:
        if record.kind == "cross":
            assert record.queries == len(result.produced)
    result.recording.save(tmp_path / "recording.safetensors")
    loaded = look_at_record(tmp_path / "recording.safetensors")
    assert (
        loaded.produced == result.produced
        and Recording.load(tmp_path / "recording.safetensors").produced == result.produced
    )
    rows = result.recording.frame()
    first = rows[(rows["kind"] == "cross") & (rows["query"] == 0)]
    assert set(first["query_token"]) == {prediction["target"][0]}
    assert "</s>" in json.loads(result.recording.json())["produced"]
    data = Data([PageInput("", result.recording, result.tokens, result.source, result.produced)]).to_json(10**6)
    [cross, *_] = [layer for layer in data["layers"] if layer["kind"] == "cross"]
    assert data["names"] == ["Output so far", "Source", "Output"]
    assert [token[3] if len(token) > 3 else token[0] for token in data["texts"][cross["queryText"]]][:-1] == prediction[
        "target"
    ]
    assert data["texts"][cross["inputText"]][0][0] == "<s>"


def test_look_at_translation(translator: str, folder: Path) -> None:
    page = folder / "page.html"
    out = run("look", translator, "abc", "--out", str(page))
    for expected in ("encoder", "cross"):
        assert expected in out
    assert "translator" in page.read_text(encoding="utf-8")
    assert "expected one text, in quotes" in run("look", translator, "a", "b", "--out", str(page), expect=2)


@pytest.mark.parametrize("model", ["recurrent", "transformer"])
def test_tag_trains_and_predicts(model: str, folder: Path) -> None:
    path, out = folder / "tags.conllu", str(folder / f"tagger-{model}")
    rows = ["".join(f"{i}\t{w}\t_\t{t}\t_\t_\t_\t_\t_\t_\n" for i, (w, t) in enumerate(zip(s.words, s.tags, strict=True), 1))
            for s in sentences(60)]  # fmt: skip
    path.write_text("\n".join(rows))
    done = run("train", "tag", str(path), *SMALL, "--epochs", "1", "--model", model, "--out", out)
    assert "48 training examples, 12 dev examples" in done
    assert "accuracy" in run("evaluate", out, str(path))
    tagged = run("predict", out, "zu bdfes klgung").split()
    assert [token.split("/")[0] for token in tagged] == ["zu", "bdfes", "klgung"]
    if model == "recurrent":
        assert "shows no attention between words" in run("look", out, "zu", "--out", str(folder / "p"), expect=2)
    else:
        assert "layer 1" in run("look", out, "zu bdfes klgung", "--out", str(folder / "p"))


def test_classify_trains_and_predicts(folder: Path) -> None:
    path, out = folder / "reviews.tsv", str(folder / "classifier")
    path.write_text("text\tlabel\n" + "".join(f"{review.text}\t{review.label}\n" for review in reviews(60)))
    run("train", "classify", str(path), *SMALL, "--epochs", "1", "--model", "conv", "--out", out)
    label, probability = run("predict", out, "good but bad").split("\t")
    assert label in ("+", "-")
    assert 0.5 <= float(probability) <= 1
    (folder / "new.tsv").write_text("fine\t?\n")
    wrong = run("evaluate", out, str(folder / "new.tsv"), expect=2)
    assert "new.tsv, line 1: label is '?'; expected one of those in the training data: " in wrong


@pytest.mark.parametrize("option", ["--nproc", "--workers"])
def test_train_with_several_processes(option: str, folder: Path) -> None:
    """The file metrics.json names the setting as in version 0.1, whose option `--workers` is accepted."""
    path, out = folder / f"reviews{option}.tsv", folder / f"classifier{option}"
    path.write_text("".join(f"{review.text}\t{review.label}\n" for review in reviews(40)))
    run("train", "classify", str(path), *SMALL, "--epochs", "1", "--model", "conv", option, "2", "--out", str(out))
    assert json.loads((out / "metrics.json").read_text())["training"]["workers"] == 2


def test_train_reports_invalid_arguments(folder: Path) -> None:
    def error(*arguments: str) -> str:
        return run(*arguments, "--out", str(folder / "never"), expect=2)

    assert "DATA: is missing; expected at least one file of examples for tag" in error("train", "tag")
    assert "expected --nproc alone" in error("train", "tag", "x", "--nproc", "2", "--workers", "2")
    assert "--model: 'conv'; expected one of transformer, recurrent, for translate" in error(
        "train", "translate", "x", "--model", "conv"
    )
    assert "--hidden: the conv model of tag has no such setting" in error(
        "train", "tag", "x", "--model", "conv", "--hidden", "3"
    )
    assert "absent.tsv: cannot be read" in error("train", "classify", str(folder / "absent.tsv"))
    assert not (folder / "never").exists()
    gone = run("predict", str(folder / "never"), "x", expect=2)
    assert "is not a directory of a trained model" in gone


def test_predictions_line_up_with_the_lines_of_the_input(translator: str, tmp_path: Path) -> None:
    """From a file and from the standard input: other separators of Unicode are within a line."""
    lines = "a b\n\n\x0ca\u2028b\n"
    (tmp_path / "lines.txt").write_text(lines, encoding="utf-8", newline="")
    from_file = run("predict", translator, str(tmp_path / "lines.txt"))
    assert from_file.count("\n") == 3
    assert run("predict", translator, stdin=lines) == from_file
    assert run("predict", translator, stdin="") == ""


def test_predict_names_files_that_do_not_exist_and_text_that_is_not_utf8(translator: str) -> None:
    for text, error in (("missing.txt", "there is no file missing.txt"), ("caf\udce9", "is not valid UTF-8")):
        assert f"TEXT: {error}" in run("predict", translator, text, expect=2)


def test_json_keeps_characters_that_the_output_lacks(translator: str) -> None:
    environment = {"PYTHONIOENCODING": "cp1252"}
    done = command_line.run_process("predict", translator, "ab", "--json", environment=environment)
    assert json.loads(done.stdout)["source"][0].startswith("▁")
