"""The records of a watch."""

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

    Args:
        records: the records.
        tokens: the tokens of the queries, if known.
        key_tokens: the tokens of the keys of cross-attention, if known.
        produced: for a decoder that generates text, the token that is produced at the position of each of `tokens`. Queries
            of cross-attention are named by it. All three are saved and exported with the records.
        notes: sentences that a reader must know, such as that the end of the text was cut off; saved with the records.

    >>> model = nn.MultiheadAttention(16, 4, batch_first=True)
    >>> with regard.watch(model, top=2) as recording:
    ...     for length in (3, 5):
    ...         _ = model(x := torch.randn(1, length, 16), x, x)
    >>> [(record.call, record.layer, record.queries) for record in recording]
    [(0, 0, 3), (1, 0, 5)]
    >>> recording.numpy()[1]["keys"].shape
    (1, 4, 5, 2)
    """

    records: list[Record] = field(default_factory=list)
    tokens: list[str] | None = None
    key_tokens: list[str] | None = None
    produced: list[str] | None = None
    notes: list[str] = field(default_factory=list)

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
        """Return a recording with one record per layer and generated text.

        The steps of generation with a key/value cache become one record, as if the text had been read in a single call.
        Joined records have no `rows`.
        """
        return Recording(join(self.records), *self._texts, self.notes)

    def text(self, n: int) -> Recording:
        """Return the recording of sequence n of the batch, cut to its own length (see `Record.text`)."""
        return Recording([record.text(n) for record in self.records], *self._texts, self.notes)

    def save(self, path: str | Path) -> None:
        """Write the recording to a safetensors file, in the format documented in `regard.watch.recording.store`."""
        store.write(path, self.records, *self._texts, self.notes)

    @staticmethod
    def load(path: str | Path) -> Recording:
        """Read a file that `save` wrote. Files from untrusted sources are safe to load: nothing in them is executed.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a recording, or is damaged.
        """
        return Recording(*store.read(path))

    def numpy(self) -> list[dict[str, Any]]:
        """Return the tensors of each record as NumPy arrays."""
        return [export.to_numpy(record) for record in self.records]

    def frame(self) -> Any:
        """Return a pandas data frame with one row per recorded weight.

        Its columns are call, layer, name, kind, batch, head, query, key, weight, and query_token and key_token where
        the tokens are known.
        """
        return export.to_pandas(self.records, *self._texts)

    def json(self) -> str:
        """Return the recording as JSON."""
        return export.to_json(self.records, *self._texts)

    @property
    def _texts(self) -> tuple[list[str] | None, list[str] | None, list[str] | None]:
        return self.tokens, self.key_tokens, self.produced

    def __repr__(self) -> str:
        if not self.records:
            return "Recording(no attention recorded)"
        layers = {record.layer for record in self.records}
        last = self.records[-1]
        shape = f"{last.heads} heads, {last.queries} queries x {last.keys} keys in the last call"
        return f"Recording({len(self.records)} calls in {len(layers)} layers; {shape})"
