"""Records as a safetensors file: nothing in it is ever run, and all of it is checked.

Version 1 of the format. The header's metadata holds `format` ("regard.watch"), `version` ("1") and `content`, JSON of

    {"tokens": [...] or null, "key_tokens": [...] or null,
     "records": [{"name", "layer", "call", "kind", "heads", "queries", "keys"}, ...]}

and the file, for the record of number n, the tensors `n.top.weights` and `n.top.keys` (B, H, L, k), `n.max` (B, H, L), and
where they were asked for `n.received` (B, H, S), `n.entropy` (B, H, L) and `n.rows` (B, H, R, S). Keys are int32; all others
float32, or float64 as they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.components.summary import Top
from regard.watch.recording.record import KINDS, Record

FORMAT, VERSION = "regard.watch", "1"
_NUMBERS = {"layer": 0, "call": 0, "heads": 0, "queries": 0, "keys": 0}
_TENSORS = ("top.weights", "top.keys", "max", "received", "entropy", "rows")
_OPTIONAL = ("received", "entropy", "rows")

Tokens = Sequence[str] | None


def write(path: str | Path, records: Sequence[Record], tokens: Tokens = None, key_tokens: Tokens = None) -> None:
    """Write records, and the texts they are of, to a file."""
    safetensors = _library()
    tensors: dict[str, Tensor] = {}
    for n, record in enumerate(records):
        for name in _TENSORS:
            tensor = _of(record, name)
            if tensor is not None:
                tensor = tensor.to(torch.int32) if name == "top.keys" else tensor
                tensors[f"{n}.{name}"] = tensor.detach().cpu().contiguous()
    described = [{key: getattr(record, key) for key in ("name", *_NUMBERS, "kind")} for record in records]
    content = {
        "tokens": None if tokens is None else list(tokens),
        "key_tokens": None if key_tokens is None else list(key_tokens),
        "records": described,
    }
    metadata = {"format": FORMAT, "version": VERSION, "content": json.dumps(content)}
    safetensors.torch.save_file(tensors, str(path), metadata)


def read(path: str | Path) -> tuple[list[Record], list[str] | None, list[str] | None]:
    """Read what `write` wrote: records, tokens and key tokens.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of ours, of another version, or damaged; the message says where.
    """
    safetensors = _library()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected records that Recording.save wrote")
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: holds no records of attention; expected a file that Recording.save wrote")
            if metadata.get("version") != VERSION:
                raise ValueError(f"{path}: is of version {metadata.get('version')!r}; expected {VERSION!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: is no safetensors file, or a damaged one: {error}") from error
    try:
        content = json.loads(metadata.get("content", ""))
    except ValueError as error:
        raise ValueError(f"{path}: its content is no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise ValueError(f"{path}: its content holds no list of records")
    texts = [_text(path, content, name) for name in ("tokens", "key_tokens")]
    records = [_record(f"{path}: record {n}", n, one, tensors) for n, one in enumerate(content["records"])]
    if tensors:
        raise ValueError(f"{path}: {sorted(tensors)[0]!r} belongs to no record")
    return records, texts[0], texts[1]


def _library() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("records are kept in safetensors: pip install 'regard[watch]'") from error
    return safetensors


def _of(record: Record, name: str) -> Tensor | None:
    tensor: Tensor | None = getattr(record.top, name[4:]) if name.startswith("top.") else getattr(record, name)
    return tensor


def _text(path: Path, content: Mapping[str, Any], name: str) -> list[str] | None:
    text = content.get(name)
    if text is not None and not (isinstance(text, list) and all(isinstance(token, str) for token in text)):
        raise ValueError(f"{path}: {name} is {type(text).__name__}; expected a list of texts, or null")
    return text


def _record(where: str, n: int, described: Any, tensors: dict[str, Tensor]) -> Record:
    """One record, of which nothing is believed."""
    if not isinstance(described, dict) or not isinstance(described.get("name"), str):
        raise ValueError(f"{where}: is no description with a name")
    for key, least in _NUMBERS.items():
        number = described.get(key)
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(f"{where}: {key} is {number!r}; expected a whole number >= {least}")
    if described.get("kind") not in KINDS:
        raise ValueError(f"{where}: kind is {described.get('kind')!r}; expected one of {', '.join(KINDS)}")
    found = {name: tensors.pop(f"{n}.{name}", None) for name in _TENSORS}
    H, L, S = (described[key] for key in ("heads", "queries", "keys"))
    for name in _TENSORS:
        if found[name] is None and name not in _OPTIONAL:
            raise ValueError(f"{where}: {name} is missing")
    weights, keys, most = found["top.weights"], found["top.keys"], found["max"]
    assert weights is not None and keys is not None and most is not None
    B = most.shape[0] if most.dim() else 0
    shapes = {
        "top.weights": (B, H, L, None), "top.keys": (B, H, L, None), "max": (B, H, L), "received": (B, H, S),
        "entropy": (B, H, L), "rows": (B, H, None, S),
    }  # fmt: skip
    for name, tensor in found.items():
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if len(shape) != len(shapes[name]) or any(
            b not in (None, a) for a, b in zip(shape, shapes[name], strict=False)
        ):
            raise ValueError(f"{where}: {name} has shape {shape}; expected {shapes[name]}")
        floats = (torch.float32, torch.float64)
        if tensor.dtype not in ((torch.int32,) if name == "top.keys" else floats):
            raise ValueError(f"{where}: {name} has dtype {tensor.dtype}")
        if name != "top.keys" and tensor.numel() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: {name} holds numbers that are not finite")
    if weights.shape != keys.shape:
        raise ValueError(f"{where}: top.weights has shape {tuple(weights.shape)}, top.keys {tuple(keys.shape)}")
    if keys.numel() and not (int(keys.min()) >= -1 and int(keys.max()) < S):
        raise ValueError(f"{where}: top.keys names keys outside of 0..{S - 1}")
    return Record(
        name=described["name"],
        kind=described["kind"],
        **{key: described[key] for key in _NUMBERS},
        top=Top(weights, keys.long()),
        max=most,
        received=found["received"],
        entropy=found["entropy"],
        rows=found["rows"],
    )
