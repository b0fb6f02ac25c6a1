"""The command line."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from support.command_line import run, run_process
from support.page import block
from support.paths import ROOT

from regard.apps.look import look, look_at_record
from regard.cli import main
from regard.cli.look import free_path
from regard.cli.train import DEFAULTS
from regard.tasks.presets import PRESETS
from regard.version import __version__
from regard.watch import Recording


@pytest.fixture(scope="module")
def causal_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved small Llama model with its tokenizer."""
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


def test_look_with_default_model(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run("look", "The animal didn't cross the street because it was too tired.", "--out", str(page))
    assert "6 layers" in done.stdout
    assert "previous token" in done.stdout
    document = page.read_text(encoding="utf-8")
    assert "all-MiniLM-L6-v2" in document
    assert "http://" not in document.replace("http://www.w3.org/", "")


def test_look_records_attention_weights() -> None:
    result = look("A cat, a mat.")
    assert result.tokens == ["[CLS]", "a", "cat", ",", "a", "mat", ".", "[SEP]"]
    assert len(result.recording) == 6
    for record in result.recording:
        assert record.top.weights.shape == (1, 12, 8, 8)
        assert not record.causal
        assert torch.allclose(record.top.weights.sum(-1), torch.ones(1, 12, 8), atol=1e-5)


def test_look_truncates_text_for_causal_model(causal_model: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = "the cat sat on the mat . the cat sat on the mat ."
    done = run("look", "-", "--model", causal_model, "--out", str(page), stdin=text)
    assert "The last 2 tokens exceed the model's maximum length" in done.stdout
    result = look(text, causal_model)
    assert result.truncated == 2
    assert [record.causal for record in result.recording] == [True, True]
    assert int(result.recording[0].top.keys[0, 0, 0, 1:].max()) == -1


def test_look_loads_saved_recording(causal_model: str, tmp_path: Path) -> None:
    saved, first, again = (tmp_path / name for name in ("recording.safetensors", "first.html", "again.html"))
    run("look", "the cat sat", "--model", causal_model, "--save", str(saved), "--out", str(first))
    run("look", str(saved), "--out", str(again))
    data = [block(page.read_text(encoding="utf-8")) for page in (first, again)]
    assert [token[0] for token in data[1]["texts"][0]] == ["the", "cat", "sat"]
    assert data[0]["layers"] == data[1]["layers"]
    recording = Recording.load(saved)
    recording.tokens = None
    recording.save(saved)
    assert look_at_record(saved).tokens == ["0", "1", "2"], "positions are shown instead of missing tokens"
    saved.write_bytes(b"nothing" * 9)
    with pytest.raises(ValueError, match="not a safetensors file"):
        look_at_record(saved)


def test_look_reports_invalid_arguments(tmp_path: Path) -> None:
    assert "text: is empty" in run("look", "  ", "--out", str(tmp_path / "p.html"), expect=2).stderr
    assert "does not exist" in run("look", "hi", "--out", str(tmp_path / "no" / "p.html"), expect=2).stderr
    nowhere = run("look", "hi", "--model", str(tmp_path), "--out", str(tmp_path / "p.html"), expect=2)
    assert "has no config.json; expected a directory of transformers" in nowhere.stderr
    assert "Traceback" not in nowhere.stderr


def test_doctor_lists_backends_and_reasons() -> None:
    out = run("doctor").stdout
    for expected in ("PyTorch", "tiled", "sdpa", "transformers", "softcap", "sparsemax"):
        assert expected in out


def test_bench_writes_json_and_plot(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    done = run("bench", "--only", "plain", "--quick", "--json", "--plot", str(plot))
    results = json.loads(done.stdout)
    assert [r["direction"] for r in results] == ["forward", "forward + backward"]
    assert all(r["ratio"] > 0 and r["ours_error"] < 1e-5 for r in results)
    assert plot.stat().st_size > 5000
    assert "no case name contains 'nonsense'" in run("bench", "--only", "nonsense", expect=2).stderr


def test_demo_writes_page(tmp_path: Path) -> None:
    done = run("demo", "--quick", "--out", str(tmp_path / "demo"))
    for expected in ("score", "normali", "aggregate", "Open the page"):
        assert expected in done.stdout
    assert (tmp_path / "demo" / "attention.html").stat().st_size > 20_000


def test_help_lists_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for command in ("look", "bench", "doctor", "demo"):
        assert command in out


@pytest.mark.skipif(sys.platform == "win32", reason="measures the CPU time of a child process")
def test_help_takes_little_cpu_time() -> None:
    """Help does not import torch, which takes seconds. Measured: 0.17 s of CPU time."""
    import resource

    def cpu_time() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        before = cpu_time()
        run_process("--help")
        times.append(cpu_time() - before)
    assert min(times) < 0.3, times


@pytest.mark.parametrize("program", [["-m", "regard.cli"], ["-u", "-m", "regard.cli"]])
def test_help_does_not_import_torch(program: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *program, "train", "--help"],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=True,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "regard.cli.train" in imported and "torch" not in imported
    assert "--nproc" in done.stdout and "--workers" not in done.stdout


def test_import_loads_the_library_in_other_programs() -> None:
    """Only the command line imports `regard` without its contents."""
    code = (
        "import sys; sys.argv[0] = 'program'; import regard; print(regard.attention.__name__, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert done.stdout.split() == ["attention", "True"]


def test_train_help_shows_presets() -> None:
    def default(option: str) -> str:
        """Return the preset of each task, and of its other models where it differs."""
        defaults = {}
        for task, preset in PRESETS.items():
            options = {name: vars(preset.settings[name]) | vars(preset.training[name]) for name in preset.settings}
            first, *_ = values = {name: values.get(option) for name, values in options.items()}
            if values[first] is not None:
                others = [f" ({name} {value})" for name, value in values.items() if value != values[first]]
                defaults[task] = "".join([str(values[first]), *others])
        if len({*defaults.values()}) == 1:
            return next(iter(defaults.values()))
        return "; ".join(f"{task} {value}" for task, value in defaults.items())

    assert {option: default("workers" if option == "nproc" else option) for option in DEFAULTS} == DEFAULTS


def test_missing_packages_are_named() -> None:
    code = "import sys; sys.modules['typer'] = None\nimport regard.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1
    assert "pip install 'regard[look]'" in done.stderr


@pytest.mark.parametrize("package", ["safetensors", "tokenizers", "matplotlib", "sacrebleu"])
def test_train_reports_missing_package_before_training(
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


# ---------------------------------------------------------------------------------------------------------------------
# What a new user does.


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["/nonexistent/seen.safetensors"],
            "there is no file /nonexistent/seen.safetensors; expected a text in quotes",
        ),
        (["notes.txt"], "there is no file notes.txt"),
        (["README.md"], "README.md is a file, but no recording; .* regard look - < README.md"),
        (["The", "cat"], "got 2 arguments; expected one text, in quotes: regard look 'The cat'"),
        (["The", "cat's", "hat"], "got 3 arguments; expected one text, in quotes: regard look "),
    ],
)
def test_look_recognizes_paths_and_missing_quotes(arguments: list[str], error: str) -> None:
    done = run("look", *arguments, expect=2)
    assert re.search(error, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_version() -> None:
    assert run("--version").stdout == f"regard {__version__}\n"
    assert run("look", "-h").stdout == run("look", "--help").stdout
    assert "--install-completion" in run("-h").stdout


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["look", "a cat", "--out", "{}/same", "--save", "{}/same"], "--save: .*same is --out, too; expected two different"),
        (["look", "{}/r.safetensors", "--out", "{}/r.safetensors"], "--out: .*r.safetensors is the recording"),
        (["look", "{}/r.safetensors", "--model", "gpt2"], "--model: .*r.safetensors is a recording, to which it does not"),
        (["look", "{}/r.safetensors", "--save", "{}/s"], "--save: .*r.safetensors is a recording"),
        (["look", "--image", "{}/a.png", "--target", "x"], "--target: a picture has none"),
        (["look", "a cat", "--out", "{}"], "--out: .* is a directory; expected the name of a file"),
        (["look", "{}/none", "a text"], "DIR: there is no directory .*none; expected one written by `train`"),
        (["look", "{}"], "TEXT: is missing after the directory"),
        (["look", "caf\udce9"], "TEXT: is not valid UTF-8"),
        (["train", "classify", "{}/x.tsv", "--out", "{}/o", "--minutes", "0"], "--minutes: 0.0; expected a number above 0"),
        (["train", "classify", "{}/x.tsv", "--out", "{}/o", "--minutes", "nan"], "--minutes: nan; expected a number above"),
        (["train", "classify", "{}/x.tsv", "--out", "{}/o", "--seed", "9" * 20], "--seed: 9+; expected an integer of 64"),
        (["train", "classify", "{}/x.tsv", "--out", "{}/o", "--dropout", "2"], "--dropout: 2.0; expected a probability"),
        (["train", "classify", "{}/x.tsv", "--out", "{}/x.tsv/z"], "--out: .*z cannot be created .*; expected the name of"),
    ],
)  # fmt: skip
def test_invalid_options_are_named(arguments: list[str], error: str, tmp_path: Path) -> None:
    (tmp_path / "r.safetensors").write_bytes(b"a recording")
    (tmp_path / "x.tsv").write_text("a good film\t+\na bad film\t-\n" * 20, encoding="utf-8")
    done = run(*[argument.format(tmp_path) for argument in arguments], expect=2)
    assert re.search(error, " ".join(done.stderr.split())), done.stderr
    assert (tmp_path / "r.safetensors").read_bytes() == b"a recording"
    assert not (tmp_path / "o").exists()


def test_pages_are_not_overwritten_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_path("attention.html") == Path("attention.html")
    Path("attention.html").touch()
    Path("attention-2.html").touch()
    assert free_path("attention.html") == Path("attention-3.html")


@pytest.mark.parametrize("task", ["classify", "tag", pytest.param("translate", marks=pytest.mark.slow)])
def test_commands_that_training_prints_run(task: str, tmp_path: Path) -> None:
    """Also where the output is no UTF-8, and the directory has a space in its name."""
    lines = {
        "classify": ["a good film\tpos", "an awful film\tneg"],
        "translate": ["a dog\tein Hund", "a cat\teine Katze"],
        "tag": ["1\ta\t_\tDET" + "\t_" * 6, "2\tdog\t_\tNOUN" + "\t_" * 6, ""],
    }[task]
    data, out = tmp_path / "data.txt", tmp_path / "the model"
    data.write_text("\n".join(lines * 30) + "\n", encoding="utf-8")
    options = ["--epochs", "1", "--width", "16", "--heads", "2"]
    encoded = partial(run_process, environment={"PYTHONIOENCODING": "ascii"}) if task == "classify" else run
    done = encoded("train", task, str(data), "--out", str(out), *options)
    assert "at most 1 epochs of" in done.stdout
    commands = [line.strip() for line in done.stdout.splitlines() if line.startswith("  regard ")]
    assert len(commands) == (2 if task == "tag" else 3)
    for command in commands:
        words = shlex.split(command.replace("DATA", shlex.quote(str(data))).replace("TEXT", "'a dog'"))[1:]
        if words[0] == "look":
            words += ["--out", str(tmp_path / "page.html")]
        (encoded if words[0] == "predict" else run)(*words)


def test_closed_standard_input_is_empty() -> None:
    code = "import sys; sys.stdin = None\nfrom regard.cli import main\nmain(['look', '-'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert "text: is empty; expected some words" in done.stderr
