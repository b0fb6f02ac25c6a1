"""Pictures whose patches are the tokens of a vision model."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
_MAX_BYTES = 10_000_000


@dataclass(frozen=True)
class Picture:
    """A picture cut into patches. In row-major order, they are the last `rows` x `columns` tokens of a text.

    Args:
        file: the path or the content of a PNG, JPEG, GIF or WebP file.
        rows, columns: the number of patches per column and per row.

    >>> Picture("cat.png", rows=14, columns=14).rows
    14
    """

    file: str | Path | bytes
    rows: int
    columns: int

    def describe(self, tokens: int) -> dict[str, str | int]:
        """Return the picture in the format of the page, for a text of `tokens` tokens.

        Raises:
            ValueError: there are fewer tokens than patches, or the file is not a picture.

        >>> Picture(b"GIF8...", 2, 2).describe(5)["first"]
        1
        """
        for name in ("rows", "columns"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"picture: {name} is {getattr(self, name)!r}; expected an integer > 0")
        patches = self.rows * self.columns
        if patches > tokens:
            raise ValueError(
                f"picture: {self.rows} x {self.columns} patches are {patches}; expected at most {tokens}, the number of "
                "tokens"
            )
        content = self.file if isinstance(self.file, bytes) else Path(self.file).read_bytes()
        kind = next((kind for signature, kind in _SIGNATURES.items() if content.startswith(signature)), None)
        if kind is None or (kind == "webp" and content[8:12] != b"WEBP"):
            raise ValueError("picture: the file is none of PNG, JPEG, GIF and WebP")
        if len(content) > _MAX_BYTES:
            raise ValueError(f"picture: the file has {len(content)} bytes; expected at most {_MAX_BYTES}")
        return {
            "source": f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}",
            "rows": self.rows,
            "columns": self.columns,
            "first": tokens - patches,
        }
