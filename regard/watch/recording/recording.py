"""What a watch saw: all its records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from regard.watch.recording import export, store
from regard.watch.recording.join import join
from regard.watch.recording.record import Record


@dataclass
class Recording(Sequence[Record]):
    """The records of a watch, in the order of the calls.

    `tokens` and `key_tokens` are the texts that they are of, where somebody has put them there: those of the queries, and
    those that cross attention looks at. They are saved and exported with the records.
    """

    records: list[Record] = field(default_factory=list)
    tokens: list[str] | None = None
    key_tokens: list[str] | None = None

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def joined(self) -> Recording:
        """The same with one record for all steps of a layer that continue one another: a text that was generated token by
        token, as if it had been read at once. `rows` of single steps are left out.
        """
        return Recording(join(self.records), self.tokens, self.key_tokens)

    def text(self, n: int) -> Recording:
        """The same of text n of the batch alone, as long as it is by itself: without what was filled up to the longest and
        attends to nothing.
        """
        return Recording([record.text(n) for record in self.records], self.tokens, self.key_tokens)

    def save(self, path: str | Path) -> None:
        """Write all of it to a safetensors file, in the format that `regard.watch.recording.store` documents."""
        store.write(path, self.records, self.tokens, self.key_tokens)

    @staticmethod
    def load(path: str | Path) -> Recording:
        """Read what `save` wrote. A file from elsewhere gives a ValueError, never code.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it is none of ours, or damaged.
        """
        return Recording(*store.read(path))

    def numpy(self) -> list[dict[str, Any]]:
        """The tensors of each record as NumPy arrays."""
        return [export.to_numpy(record) for record in self.records]

    def frame(self) -> Any:
        """A pandas data frame with a row for each weight that was kept: call, layer, name, kind, batch, head, query, key,
        weight, and the tokens of query and key where they are known.
        """
        return export.to_pandas(self.records, self.tokens, self.key_tokens)

    def json(self) -> str:
        """Everything as JSON."""
        return export.to_json(self.records, self.tokens, self.key_tokens)

    def __repr__(self) -> str:
        if not self.records:
            return "Recording(no attention seen)"
        layers = {record.layer for record in self.records}
        last = self.records[-1]
        shape = f"{last.heads} heads, {last.queries} queries x {last.keys} keys at last"
        return f"Recording({len(self.records)} calls in {len(layers)} layers; {shape})"
