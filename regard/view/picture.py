"""A picture whose patches are tokens, as vision models see it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

_KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
_MOST = 10_000_000  # bytes


@dataclass(frozen=True)
class Picture:
    """A picture in patches, row by row; they are the last `rows` x `columns` tokens of a text.

    Args:
        file: a PNG, JPEG, GIF or WebP file, by its path, or what stands in it.
        rows, columns: how many patches there are, down and across.
    """

    file: str | Path | bytes
    rows: int
    columns: int

    def describe(self, tokens: int) -> dict[str, str | int]:
        """What the page needs of it, beside a text of so many tokens.

        Raises ValueError where there are fewer tokens than patches, or the file is no picture.
        """
        for name in ("rows", "columns"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"picture: {name} is {getattr(self, name)!r}; expected a whole number > 0")
        patches = self.rows * self.columns
        if patches > tokens:
            raise ValueError(
                f"picture: {self.rows} x {self.columns} patches are {patches}; expected at most {tokens}, one for each of "
                "the last tokens"
            )
        content = self.file if isinstance(self.file, bytes) else Path(self.file).read_bytes()
        kind = next((kind for start, kind in _KINDS.items() if content.startswith(start)), None)
        if kind is None or (kind == "webp" and content[8:12] != b"WEBP"):
            raise ValueError("picture: the file is none of PNG, JPEG, GIF and WebP")
        if len(content) > _MOST:
            raise ValueError(
                f"picture: the file has {len(content)} bytes; expected at most {_MOST}: a smaller copy will do"
            )
        return {
            "source": f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}",
            "rows": self.rows,
            "columns": self.columns,
            "first": tokens - patches,
        }
