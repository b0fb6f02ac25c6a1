"""Pictures whose patches are tokens."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from support.browser import Opener
from support.page import figures
from support.records import make_record, random_weights

from regard.view.page import page
from regard.view.picture import Picture


def drawn(rows: int, columns: int) -> bytes:
    """Return a PNG with distinct patches."""
    from matplotlib.image import imsave

    shades = torch.arange(rows * columns).view(rows, columns).repeat_interleave(16, 0).repeat_interleave(16, 1)
    out = io.BytesIO()
    imsave(out, shades.numpy(), format="png")
    return out.getvalue()


def test_patches_show_weights_and_can_be_pinned(opened: Opener, tmp_path: Path) -> None:
    """Patches are the last tokens, and can be hovered like words."""
    weights = random_weights(1, 2, 13, 13, seed=3)
    names = ["[CLS]", *(f"{n // 4},{n % 4}" for n in range(12))]
    (tmp_path / "a.png").write_bytes(drawn(3, 4))
    tab = opened(page([make_record(weights)], names, picture=Picture(tmp_path / "a.png", 3, 4)), at="#0.1")
    patches = tab.locator(".patch")
    assert patches.count() == 12
    assert tab.evaluate("document.querySelector('.picture img').naturalWidth") == 64
    assert tab.locator(".word:visible").all_text_contents() == ["[CLS]"]
    patches.nth(5).hover()
    shown = figures(tab, "key")
    assert all(abs(float(a) - b) < 6e-4 for a, b in zip(shown, weights[0, 1, 6].tolist(), strict=True))
    veils = [float(v) for v in patches.evaluate_all("all => all.map((one) => one.style.getPropertyValue('--veil'))")]
    brightest = min(range(12), key=veils.__getitem__)
    assert brightest == int(weights[0, 1, 6, 1:].argmax())
    patches.nth(5).click()
    assert tab.locator(".patch.focused-query").count() == 1


def test_invalid_pictures_are_rejected() -> None:
    record, names = make_record(random_weights(1, 1, 5, 5)), list("abcde")
    for picture, message in (
        (Picture(drawn(2, 3), 2, 3), r"picture: 2 x 3 patches are 6; expected at most 5"),
        (Picture(drawn(2, 2), 0, 2), "picture: rows is 0; expected an integer > 0"),
        (Picture(b"<svg onload=alert(1)>", 2, 2), "none of PNG, JPEG, GIF and WebP"),
        (Picture(b"RIFFxxxxWAVE", 2, 2), "none of PNG, JPEG, GIF and WebP"),
        (Picture(b"\xff\xd8\xff" + bytes(10_000_001), 2, 2), "expected at most 10000000"),
    ):
        with pytest.raises(ValueError, match=message):
            page([record], names, picture=picture)
