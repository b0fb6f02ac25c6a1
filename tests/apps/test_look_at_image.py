"""Recording the attention of vision transformers."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from support.browser import Opener
from support.page import block
from support.records import dense_weights

from regard.apps.look import look
from regard.apps.look_at_image import look_at_image
from regard.cli import main
from regard.view.page import page
from regard.watch import Recording

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GRID = {"image_size": 32, "patch_size": 8}
NAMES = [f"{row},{column}" for row in range(4) for column in range(4)]
EPS = torch.finfo(torch.float32).eps


def saved(folder: Path, config: transformers.PreTrainedConfig, processor: str = "ViTImageProcessorPil") -> str:
    """Save a model of random weights with its image processor, and return its path."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    options = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    options = options if "ViT" not in processor else {"size": {"height": 32, "width": 32}}
    getattr(transformers, processor)(**options).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("vit"), transformers.ViTConfig(**SMALL, **GRID))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=9)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of a house, wider than tall."""
    house = Image.new("RGB", (90, 60), "#87b5e8")
    draw = ImageDraw.Draw(house)
    draw.polygon([(20, 30), (40, 8), (60, 30)], fill="#a4493d")
    draw.rectangle((24, 30, 56, 56), fill="#e8dcc2")
    path = tmp_path_factory.mktemp("drawn") / "house.png"
    house.save(path)
    return path


def shown(document: str) -> Image.Image:
    """Return the picture of a page."""
    kind, content = block(document)["picture"]["source"].split(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_weights_match_eager_attention(vit: str, picture: Path) -> None:
    result = look_at_image(picture, vit)
    assert result.tokens == ["[CLS]", *NAMES] == result.recording.tokens
    assert (result.text, result.note) == ("house.png", "")
    processor = transformers.ViTImageProcessorPil.from_pretrained(vit)
    eager = transformers.AutoModel.from_pretrained(vit, attn_implementation="eager").eval()
    with torch.no_grad():
        inputs = processor(Image.open(picture), return_tensors="pt")
        reference = eager(**inputs, output_attentions=True).attentions
    assert len(result.recording) == len(reference) == 2
    for record, weights in zip(result.recording, reference, strict=True):
        assert (dense_weights(record) - weights).abs().max() <= 32 * EPS


def test_page_shows_the_processed_picture(vit: str, picture: Path, opened: Opener) -> None:
    result = look_at_image(picture, vit)
    document = page(result.recording, result.tokens, title=result.model, picture=result.picture)
    expected = Image.open(picture).resize((32, 32), Image.Resampling.BILINEAR)
    assert shown(document).tobytes() == expected.tobytes()
    tab = opened(document, at="#0.0")
    assert tab.locator(".patch").count() == 16
    assert tab.evaluate("document.querySelector('.picture img').naturalWidth") == 32


FAMILIES = {
    "deit": (transformers.DeiTConfig(**SMALL, **GRID), ["[CLS]", "<|distilled|>"]),
    "dinov2": (transformers.Dinov2Config(**SMALL, **GRID), ["[CLS]"]),
    "registers": (
        transformers.Dinov2WithRegistersConfig(**SMALL, **GRID, num_register_tokens=2),
        ["[CLS]", "<|reg 0|>", "<|reg 1|>"],
    ),
    "ijepa": (transformers.IJepaConfig(**SMALL, **GRID), []),
    "siglip": (transformers.SiglipVisionConfig(**SMALL, **GRID), []),  # pools with a query of its own
    "clip": (transformers.CLIPConfig(text_config=SMALL, vision_config={**SMALL, **GRID}), ["[CLS]"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_before_the_patches(family: str, picture: Path, tmp_path: Path) -> None:
    """Each family has its own extra tokens; the processor crops the center of the picture."""
    config, own = FAMILIES[family]
    result = look_at_image(picture, saved(tmp_path, config, "BitImageProcessorPil"))
    assert result.tokens == [*own, *NAMES]
    assert {(record.queries, record.keys) for record in result.recording} == {(len(own) + 16,) * 2}
    document = page(result.recording, result.tokens, picture=result.picture)
    assert block(document)["picture"]["first"] == len(own)
    middle = Image.open(picture).resize((54, 36), Image.Resampling.BICUBIC).crop((11, 2, 43, 34))
    assert shown(document).tobytes() == middle.tobytes()


def test_picture_is_cropped_to_whole_patches(picture: Path, tmp_path: Path) -> None:
    """A model that takes any size ignores what is beyond the last whole patch, and so does the page."""
    model = saved(tmp_path, transformers.Dinov2Config(**SMALL, image_size=36, patch_size=12))
    result = look_at_image(picture, model, top=3)
    assert result.tokens == ["[CLS]", "0,0", "0,1", "1,0", "1,1"]
    assert result.recording[0].top.weights.shape[-1] == 3
    assert shown(page(result.recording, result.tokens, picture=result.picture)).size == (24, 24)


def test_missing_processor_config_uses_defaults_and_says_so(vit: str, picture: Path, tmp_path: Path) -> None:
    """The defaults are those of the image processor of ViT."""
    for file in Path(vit).iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    result, prepared = look_at_image(picture, str(tmp_path)), look_at_image(picture, vit)
    assert "The model has no preprocessor_config.json: the picture was resized to 32 x 32" in result.note
    for a, b in zip(result.recording, prepared.recording, strict=True):
        assert (dense_weights(a) - dense_weights(b)).abs().max() <= 32 * EPS


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["look", *arguments])
    assert not stop.value.code, "the command failed"


def test_look_command_with_image(vit: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, saved_recording = tmp_path / "page.html", tmp_path / "recording.safetensors"
    run("--image", str(picture), "--model", vit, "--out", str(out), "--save", str(saved_recording))
    output = capsys.readouterr().out
    assert "2 layers × 4 heads over 17 tokens" in output
    assert "[CLS]" in output
    assert "3,3" in output
    document = out.read_text(encoding="utf-8")
    assert shown(document).size == (32, 32)
    assert block(document)["subtitle"] == "house.png"
    assert Recording.load(saved_recording).tokens == ["[CLS]", *NAMES]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["a text", "--image", "PICTURE", "--model", "VIT"],
            "--image: TEXT is given too; expected a picture or a text",
        ),
        (["--image", "PICTURE"], "model: is not given; expected a vision transformer, such as ViT, DeiT or DINOv2"),
        (["--image", "PICTURE", "--model", "READER"], "reads texts; expected a vision transformer"),
        (["--image", "nowhere.png", "--model", "VIT"], "image: nowhere.png cannot be read; expected a picture"),
        (["a text", "--model", "VIT"], "reads pictures; expected a model that reads texts, or --image PICTURE"),
        ([], "TEXT: got 0 arguments; expected one text, in quotes, or --image PICTURE"),
    ],
)
def test_look_command_errors(
    arguments: list[str], message: str, vit: str, reader: str, picture: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    names = {"PICTURE": str(picture), "VIT": vit, "READER": reader}
    with pytest.raises(SystemExit) as stop:
        main(["look", *(names.get(argument, argument) for argument in arguments), "--out", str(tmp_path / "p.html")])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def damaged(picture: Path, kind: str) -> bytes:
    whole, out = picture.read_bytes(), io.BytesIO()
    if kind == "empty":
        return b""
    if kind == "cut":
        return whole[: len(whole) // 2]
    if kind == "postscript":
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    if kind == "huge":  # 10,000 x 10,000 pixels in a few kilobytes: Pillow would only warn
        Image.new("1", (10_000, 10_000)).save(out, "PNG")
    if kind == "broken":
        return whole[:40] + bytes(9) + whole[49:]
    return out.getvalue()


@pytest.mark.parametrize("kind", ["empty", "cut", "postscript", "huge", "broken"])
def test_damaged_pictures_are_rejected(kind: str, vit: str, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(damaged(picture, kind))
    with pytest.raises(ValueError, match=r"^image: .*a\.png cannot be read; expected a picture \(PNG, JPEG"):
        look_at_image(tmp_path / "a.png", vit)


def test_pictures_of_other_modes_and_formats(vit: str, tmp_path: Path) -> None:
    """Gray, palette, transparent, rotated and 1 x 1 pictures are converted to RGB."""
    house = Image.new("RGB", (40, 20), "#204060")
    rotation = Image.Exif()
    rotation[0x0112] = 6
    house.save(tmp_path / "rotated.jpg", exif=rotation)
    for mode, name in (("L", "a.gif"), ("P", "b.png"), ("RGBA", "c.webp"), ("1", "d.tif"), ("CMYK", "e.jpg")):
        house.convert(mode).save(tmp_path / name)
    house.resize((1, 1)).save(tmp_path / "f.bmp")
    for path in sorted(tmp_path.iterdir()):
        assert look_at_image(path, vit).tokens[-1] == "3,3"


def unsupported_models(folder: Path) -> dict[str, tuple[str, str]]:
    """Return models and the error message for each."""
    hidden = transformers.ViTMAEConfig(**SMALL, **GRID)
    windows = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, **GRID | {"patch_size": 4}
    )
    bare = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    other = transformers.ViTConfig(**SMALL, image_size=64, patch_size=8)
    return {
        "hidden": (saved(folder / "hidden", hidden), "see 5 tokens; expected 4 x 4 patches in all of them"),
        "windows": (
            saved(folder / "windows", windows),
            r"4 tokens in 16 windows.*; expected 8 x 8 patches in all of them",
        ),
        "bare": (saved(folder / "bare", bare), "bare has no patches; expected a vision transformer"),
        "other": (saved(folder / "other", other), "does not accept pictures of 32 x 32 pixels: Input image size"),
    }


@pytest.mark.parametrize("kind", ["hidden", "windows", "bare", "other"])
def test_unsupported_models_are_rejected(kind: str, picture: Path, tmp_path: Path) -> None:
    model, message = unsupported_models(tmp_path)[kind]
    with pytest.raises(ValueError, match=rf"^model: .*{message}"):
        look_at_image(picture, model)


def test_damaged_processor_config_is_rejected(vit: str, picture: Path, tmp_path: Path) -> None:
    for file in Path(vit).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded by transformers"):
        look_at_image(picture, str(tmp_path))


def test_look_rejects_vision_models(vit: str) -> None:
    with pytest.raises(ValueError, match=r"^text: .* reads pictures; expected a model that reads texts"):
        look("a cat", vit)
