"""Records in a safetensors file. Loading one executes nothing and validates everything.

Version 1 of the format. The header's metadata holds `format` ("regard.watch"), `version` ("1") and `content`, JSON of

    {"tokens": [...] or null, "key_tokens": [...] or null, "produced": [...] or null, "notes": [...],
     "records": [{"name", "layer", "call", "kind", "heads", "queries", "keys"}, ...]}

and the file holds, for record n, the tensors `n.top.weights` and `n.top.keys` (B, H, L, k), `n.max` (B, H, L) and,
where recorded, `n.received` (B, H, S), `n.entropy` (B, H, L) and `n.rows` (B, H, R, S). Keys are int32; all others are
float32 or float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.components.summary import Top
from regard.files import write_atomically
from regard.watch.recording.record import KINDS, Record

FORMAT, VERSION = "regard.watch", "1"
_INTEGERS = ("layer", "call", "heads", "queries", "keys")
_TENSORS = ("top.weights", "top.keys", "max", "received", "entropy", "rows")
_OPTIONAL = ("received", "entropy", "rows")
# The texts of a recording; see `Recording`.
TEXTS = ("tokens", "key_tokens", "produced")
Tokens = Sequence[str] | None


def named_texts(*texts: Tokens) -> dict[str, list[str] | None]:
    """Return the texts of a recording by name, as JSON."""
    return {name: None if text is None else list(text) for name, text in zip(TEXTS, texts, strict=True)}


def write(
    path: str | Path,
    records: Sequence[Record],
    tokens: Tokens = None,
    key_tokens: Tokens = None,
    produced: Tokens = None,
    notes: Sequence[str] = (),
) -> None:
    """Write records and their tokens to a file."""
    safetensors = _import_safetensors()
    tensors: dict[str, Tensor] = {}
    for n, record in enumerate(records):
        for name in _TENSORS:
            tensor = _get(record, name)
            if tensor is not None:
                tensor = tensor.to(torch.int32) if name == "top.keys" else tensor
                tensors[f"{n}.{name}"] = tensor.detach().cpu().contiguous()
    entries = [{key: getattr(record, key) for key in ("name", *_INTEGERS, "kind")} for record in records]
    content = {**named_texts(tokens, key_tokens, produced), "notes": list(notes), "records": entries}
    metadata = {"format": FORMAT, "version": VERSION, "content": json.dumps(content)}
    write_atomically(Path(path), lambda part: safetensors.torch.save_file(tensors, str(part), metadata))


def read(path: str | Path) -> tuple[list[Record], list[str] | None, list[str] | None, list[str] | None, list[str]]:
    """Read a file that `write` wrote: records, tokens, key tokens, produced tokens and notes.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a recording, has another version, or is damaged; the message says where.
    """
    safetensors = _import_safetensors()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a recording that Recording.save wrote")
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: not a recording; expected a file that Recording.save wrote")
            if metadata.get("version") != VERSION:
                raise ValueError(f"{path}: version is {metadata.get('version')!r}; expected {VERSION!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged: {error}") from error
    try:
        content = json.loads(metadata.get("content", ""))
    except ValueError as error:
        raise ValueError(f"{path}: content is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise ValueError(f"{path}: content has no list of records")
    tokens, key_tokens, produced = (_parse_tokens(path, content, name) for name in TEXTS)
    records = [_parse_record(f"{path}: record {n}", n, entry, tensors) for n, entry in enumerate(content["records"])]
    if tensors:
        raise ValueError(f"{path}: {sorted(tensors)[0]!r} belongs to no record")
    notes = _parse_tokens(path, content, "notes") or []  # missing in files of 0.1
    return records, tokens, key_tokens, produced, notes


def _import_safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("recordings are saved with safetensors: pip install 'regard[watch]'") from error
    return safetensors


def _get(record: Record, name: str) -> Tensor | None:
    tensor: Tensor | None = getattr(record.top, name[4:]) if name.startswith("top.") else getattr(record, name)
    return tensor


def _parse_tokens(path: Path, content: Mapping[str, Any], name: str) -> list[str] | None:
    tokens = content.get(name)
    if tokens is not None and not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
        raise ValueError(f"{path}: {name} is {type(tokens).__name__}; expected a list of strings, or null")
    return tokens


def _parse_record(where: str, n: int, entry: Any, tensors: dict[str, Tensor]) -> Record:
    """Validate an untrusted record, and remove its tensors from `tensors`."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError(f"{where}: not an object with a name")
    for key in _INTEGERS:
        number = entry.get(key)
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ValueError(f"{where}: {key} is {number!r}; expected an integer >= 0")
    if entry.get("kind") not in KINDS:
        raise ValueError(f"{where}: kind is {entry.get('kind')!r}; expected one of {', '.join(KINDS)}")
    values = {name: tensors.pop(f"{n}.{name}", None) for name in _TENSORS}
    H, L, S = (entry[key] for key in ("heads", "queries", "keys"))
    for name in _TENSORS:
        if values[name] is None and name not in _OPTIONAL:
            raise ValueError(f"{where}: {name} is missing")
    weights, keys, maximum = values["top.weights"], values["top.keys"], values["max"]
    assert weights is not None and keys is not None and maximum is not None
    B = maximum.shape[0] if maximum.dim() else 0
    shapes = {
        "top.weights": (B, H, L, None), "top.keys": (B, H, L, None), "max": (B, H, L), "received": (B, H, S),
        "entropy": (B, H, L), "rows": (B, H, None, S),
    }  # fmt: skip
    for name, tensor in values.items():
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if len(shape) != len(shapes[name]) or any(
            size not in (None, given) for given, size in zip(shape, shapes[name], strict=False)
        ):
            raise ValueError(f"{where}: {name} has shape {shape}; expected {shapes[name]}")
        floats = (torch.float32, torch.float64)
        if tensor.dtype not in ((torch.int32,) if name == "top.keys" else floats):
            raise ValueError(f"{where}: {name} has dtype {tensor.dtype}")
        if name != "top.keys" and tensor.numel() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: {name} has nonfinite elements")
    if weights.shape != keys.shape:
        raise ValueError(f"{where}: top.weights has shape {tuple(weights.shape)}, top.keys {tuple(keys.shape)}")
    if keys.numel() and not (int(keys.min()) >= -1 and int(keys.max()) < S):
        raise ValueError(f"{where}: top.keys has keys outside of 0..{S - 1}")
    return Record(
        name=entry["name"],
        kind=entry["kind"],
        **{key: entry[key] for key in _INTEGERS},
        top=Top(weights, keys.long()),
        max=maximum,
        received=values["received"],
        entropy=values["entropy"],
        rows=values["rows"],
    )
