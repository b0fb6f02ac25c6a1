"""Look at what a vision transformer attends to in a picture."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.apps.look import LookResult, first_line, fitting, load, named, seen
from regard.tasks.open import is_task
from regard.view.picture import Picture

# What a picture may be. Not PostScript and its like, which have to be run to be drawn.
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
# Either of these files tells how a model wants its pictures.
_PREPARATIONS = ("preprocessor_config.json", "processor_config.json")
_EXPECTED = "expected a vision transformer, such as ViT, DeiT or DINOv2"


def look_at_image(image: str | Path, model: str | None = None, *, top: int | None = None) -> LookResult:
    """Run a picture through a vision transformer, and record what every head of it attends to.

    The patches are the last tokens, named by row and column: "0,0", "0,1". Before them stand [CLS] and what else the model
    has of its own, such as registers.

    Args:
        image: a file: PNG, JPEG, GIF (its first picture), WebP, BMP or TIFF.
        model: of transformers, a local path or a name on the hub: ViT, DeiT, DINOv2 and others whose layers all see the
            picture as one grid of patches; of CLIP and its like, the half that sees.
        top: how many of the largest weights of each token to keep; by default as many as a page can show.
    """
    if model is None:
        raise ValueError(f"model: is not given; {_EXPECTED}: a path, or a name on the hub (facebook/dinov2-small)")
    picture = _read(Path(image))
    name, path = named(model)
    network: Any = None if is_task(Path(path)) else load(path, "AutoModel")
    network = getattr(network, "vision_model", network)
    if getattr(network, "main_input_name", None) != "pixel_values":
        raise ValueError(f"model: {name} reads texts; {_EXPECTED}")
    high, wide = _pair(getattr(network.config, "patch_size", None))
    if not high or not wide:
        raise ValueError(f"model: {name} cuts no patches; {_EXPECTED}")
    values, points, note = _prepared(picture, name, path, network.config)
    rows, columns = points.shape[1] // high, points.shape[2] // wide
    own = _own(network.config)
    most = len(own) + rows * columns
    try:
        inputs = {"pixel_values": values.to(network.dtype)}
        watched = seen(network, inputs, top or fitting(network.config, most))
    except ValueError as error:
        size = f"{points.shape[1]} x {points.shape[2]}"
        raise ValueError(f"model: {name} does not take pictures prepared as {size}: {first_line(error)}") from error
    # A pooling that looks at the patches with a query of its own has no place among them.
    watched.records = [record for record in watched if record.kind != "cross"]
    shapes = sorted({(record.max.shape[0], record.queries, record.keys) for record in watched})
    counts = {n + rows * columns: n for n in (0, 1, len(own)) if rows and columns}
    if len(shapes) != 1 or shapes[0][0] != 1 or shapes[0][2] not in counts:
        told = ", ".join(f"{keys} tokens" + f" in {batch} windows" * (batch > 1) for batch, _, keys in shapes)
        raise ValueError(
            f"model: the layers of {name} see {told or 'nothing'}; expected {rows} x {columns} patches in all of them, "
            f"and at most {len(own)} tokens before them: {_EXPECTED}"
        )
    tokens = own[: counts[shapes[0][2]]] + [f"{row},{column}" for row in range(rows) for column in range(columns)]
    watched.tokens = tokens
    shown = Picture(_as_png(points[:, : rows * high, : columns * wide]), rows, columns)
    return LookResult(name, Path(image).name, tokens, watched, picture=shown, note=note)


def _read(path: Path) -> Any:
    """The picture in a file that anybody may have made, upright and in colours."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("pictures need the package pillow: pip install 'regard[look]'") from error
    try:
        with warnings.catch_warnings():
            # A small file that says that it is a huge picture: Pillow warns, and would go on to fill the memory.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as opened:
                return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # a damaged file fails in as many ways as there are formats
        raise ValueError(
            f"image: {path} cannot be read; expected a picture ({', '.join(_FORMATS)}): {first_line(error)}"
        ) from error


def _prepared(picture: Any, name: str, path: str, config: Any) -> tuple[Tensor, Tensor, str]:
    """A picture as a model takes it (1, 3, H, W), as the points (3, H, W) that these numbers stand for, and what is to be
    said of it.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / file).is_file() for file in _PREPARATIONS):
        high, wide = _pair(getattr(config, "image_size", None))
        if not high or not wide:
            raise ValueError(
                f"model: {name} has no image_size and no {_PREPARATIONS[0]}; expected one, to prepare pictures"
            )
        from PIL import Image

        points = _points(
            picture.resize((wide, high), Image.Resampling.BILINEAR)
        )  # as ViT has it where nothing else is said
        note = f"There is no {_PREPARATIONS[0]} beside the model: the picture is made {wide} x {high}, from -1 to 1."
        return points[None] / 127.5 - 1, points, note
    processor = load(path, "AutoImageProcessor", backend="pil")
    values = processor(images=picture, return_tensors="pt").get("pixel_values")
    if not isinstance(values, Tensor) or values.dim() != 4 or values.shape[:2] != (1, 3):
        raise ValueError(f"model: {name} cuts a picture into several; {_EXPECTED}")
    points = values[0].float()
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (processor.image_mean, processor.image_std))
        points = points * std + mean
    if getattr(processor, "do_rescale", False):
        points = points / processor.rescale_factor
    return values, points, ""


def _own(config: Any) -> list[str]:
    """What a model of this kind may put before the patches, as views know markers."""
    registers = [f"<|reg {n}|>" for n in range(getattr(config, "num_register_tokens", None) or 0)]
    return ["[CLS]", *(["<|distilled|>"] if config.model_type == "deit" else registers)]


def _pair(size: Any) -> tuple[int, int]:
    """A height and a width, of which configs write one where both are the same; zeros where there are none."""
    both = size if isinstance(size, list | tuple) else (size, size)
    return (both[0], both[1]) if len(both) == 2 and all(isinstance(one, int) for one in both) else (0, 0)


def _points(picture: Any) -> Tensor:
    """The points (3, H, W) of a picture, from 0 to 255."""
    wide, high = picture.size
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(high, wide, 3).permute(2, 0, 1).float()


def _as_png(points: Tensor) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    whole = points.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    Image.fromarray(whole.numpy()).save(out, "PNG")
    return out.getvalue()
