"""Record what a vision transformer attends to in a picture."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.apps.look import LookResult
from regard.apps.pretrained import default_top, load_pretrained, record_attention, resolve_model
from regard.error_text import first_line
from regard.tasks.open import is_task
from regard.view.picture import Picture

# Accepted formats. PostScript and similar formats are programs, and are not accepted.
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
# The files that configure the image processor of a model.
_PROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json")
_EXPECTED = "expected a vision transformer, such as ViT, DeiT or DINOv2"


def look_at_image(image: str | Path, model: str | None = None, *, top: int | None = None) -> LookResult:
    """Run a picture through a vision transformer, and record what every head attends to.

    The patches are the last tokens, named by row and column: "0,0", "0,1". They follow [CLS] and other tokens of the
    model, such as registers.

    Args:
        image: the path of a PNG, JPEG, GIF (its first frame), WebP, BMP or TIFF file.
        model: a transformers model, as a local path or a name on the hub: ViT, DeiT, DINOv2 and others whose layers all
            attend over one grid of patches; of CLIP and similar models, the vision encoder is used.
        top: the number of largest weights to record per token; by default as many as fit on a page.

    Raises:
        ValueError: the picture cannot be read, or the model is not a supported vision transformer.
        ImportError: a required package is not installed.
    """
    if model is None:
        raise ValueError(f"model: is not given; {_EXPECTED}: a path, or a name on the hub (facebook/dinov2-small)")
    picture = _read(Path(image))
    name, path = resolve_model(model)
    network: Any = None if is_task(Path(path)) else load_pretrained(path, "AutoModel")
    network = getattr(network, "vision_model", network)
    if getattr(network, "main_input_name", None) != "pixel_values":
        raise ValueError(f"model: {name} reads texts; {_EXPECTED}")
    height, width = _pair(getattr(network.config, "patch_size", None))
    if not height or not width:
        raise ValueError(f"model: {name} has no patches; {_EXPECTED}")
    values, pixels, note = _preprocess(picture, name, path, network.config)
    rows, columns = pixels.shape[1] // height, pixels.shape[2] // width
    extra = _extra_tokens(network.config)
    size = len(extra) + rows * columns
    try:
        inputs = {"pixel_values": values.to(network.dtype)}
        recording = record_attention(network, inputs, top or default_top(network.config, size))
    except ValueError as error:
        shape = f"{pixels.shape[1]} x {pixels.shape[2]}"
        raise ValueError(f"model: {name} does not accept pictures of {shape} pixels: {first_line(error)}") from error
    # Attention pooling has a query of its own, which is not one of the tokens.
    recording.records = [record for record in recording if record.kind != "cross"]
    shapes = sorted({(record.max.shape[0], record.queries, record.keys) for record in recording})
    counts = {n + rows * columns: n for n in (0, 1, len(extra)) if rows and columns}
    if len(shapes) != 1 or shapes[0][0] != 1 or shapes[0][2] not in counts:
        found = ", ".join(f"{keys} tokens" + f" in {batch} windows" * (batch > 1) for batch, _, keys in shapes)
        raise ValueError(
            f"model: the layers of {name} see {found or 'nothing'}; expected {rows} x {columns} patches in all of them, "
            f"and at most {len(extra)} tokens before them: {_EXPECTED}"
        )
    tokens = extra[: counts[shapes[0][2]]] + [f"{row},{column}" for row in range(rows) for column in range(columns)]
    recording.tokens = tokens
    processed = Picture(_as_png(pixels[:, : rows * height, : columns * width]), rows, columns)
    return LookResult(name, Path(image).name, tokens, recording, picture=processed, note=note)


def _read(path: Path) -> Any:
    """Read an untrusted picture file, rotated upright and converted to RGB."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("pictures need the package pillow: pip install 'regard[look]'") from error
    try:
        with warnings.catch_warnings():
            # Decompression bombs: Pillow would only warn, and exhaust the memory.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as opened:
                return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # the exceptions for damaged files depend on the format
        raise ValueError(
            f"image: {path} cannot be read; expected a picture ({', '.join(_FORMATS)}): {first_line(error)}"
        ) from error


def _preprocess(picture: Any, name: str, path: str, config: Any) -> tuple[Tensor, Tensor, str]:
    """Return the input of the model (1, 3, H, W), its pixels (3, H, W) from 0 to 255, and a note for the user."""
    folder = Path(path)
    if folder.is_dir() and not any((folder / file).is_file() for file in _PROCESSOR_CONFIGS):
        height, width = _pair(getattr(config, "image_size", None))
        if not height or not width:
            raise ValueError(f"model: {name} has no image_size and no {_PROCESSOR_CONFIGS[0]}; expected one of them")
        from PIL import Image

        # The defaults of the image processor of ViT.
        pixels = _to_pixels(picture.resize((width, height), Image.Resampling.BILINEAR))
        done = f"resized to {width} x {height} and scaled to [-1, 1]"
        note = f"The model has no {_PROCESSOR_CONFIGS[0]}: the picture was {done}."
        return pixels[None] / 127.5 - 1, pixels, note
    processor = load_pretrained(path, "AutoImageProcessor", backend="pil")
    values = processor(images=picture, return_tensors="pt").get("pixel_values")
    if not isinstance(values, Tensor) or values.dim() != 4 or values.shape[:2] != (1, 3):
        raise ValueError(f"model: {name} splits a picture into several; {_EXPECTED}")
    pixels = values[0].float()
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    if getattr(processor, "do_rescale", False):
        pixels = pixels / processor.rescale_factor
    return values, pixels, ""


def _extra_tokens(config: Any) -> list[str]:
    """Return the tokens that a model may insert before the patches, written as markers."""
    registers = [f"<|reg {n}|>" for n in range(getattr(config, "num_register_tokens", None) or 0)]
    return ["[CLS]", *(["<|distilled|>"] if config.model_type == "deit" else registers)]


def _pair(size: Any) -> tuple[int, int]:
    """Return a height and a width from a config, which may have one number for both; zeros if it has none."""
    both = size if isinstance(size, list | tuple) else (size, size)
    return (both[0], both[1]) if len(both) == 2 and all(isinstance(one, int) for one in both) else (0, 0)


def _to_pixels(picture: Any) -> Tensor:
    """Return the pixels (3, H, W) of a picture, from 0 to 255."""
    width, height = picture.size
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(height, width, 3).permute(2, 0, 1).float()


def _as_png(pixels: Tensor) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    image = pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    Image.fromarray(image.numpy()).save(out, "PNG")
    return out.getvalue()
