"""Record what an encoder-decoder of transformers attends to: encoder, decoder and cross attention."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.apps.pretrained import max_positions, silent_transformers
from regard.watch import Recording

_MAX_NEW_TOKENS = 64


def decode(
    name: str, network: Any, tokenizer: Any, inputs: dict[str, Tensor], target: str | None
) -> tuple[Tensor, list[str], list[str], int]:
    """Return the input of the decoder (1, L), its tokens, the tokens that are produced at their positions, and the number of
    tokens of the target beyond the maximum length of the decoder.

    Args:
        name: the name of the model, for errors.
        network: the model, with its head.
        tokenizer: its tokenizer.
        inputs: the source text as tensors.
        target: the target text; by default the model generates it, taking the most probable token at each step.

    Raises:
        ValueError: the target is empty, or the model cannot generate or generates nothing.
    """
    # As T5 does, start with the padding token where the configuration names none.
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    numbers = [getattr(network.config, name, None) for name in names]
    start = next((number for number in (*numbers, tokenizer.pad_token_id) if number is not None), 0)
    most = max_positions(network, "decoder") or sys.maxsize
    if target is not None:
        if not target.strip():
            raise ValueError("target: is empty; expected some words")
        labels = tokenizer(text_target=target, return_tensors="pt", verbose=False)["input_ids"]
        whole = torch.cat([labels.new_full((1, 1), start), labels], 1)
    else:
        whole = _generate(name, network, inputs, start, most)
    if whole.shape[1] < 2:
        raise ValueError("target: the model generates nothing for this text; expected a target text (--target)")
    cut = max(whole.shape[1] - 1 - most, 0)
    whole = whole[:, : most + 1]
    tokens = tokens_of(tokenizer, whole)
    return whole[:, :-1], tokens[:-1], tokens[1:], cut


def _generate(name: str, network: Any, inputs: dict[str, Tensor], start: int, most: int) -> Tensor:
    """Return the start token and at most `most` tokens that the model generates, (1, L + 1)."""
    try:
        with silent_transformers(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole: Tensor = network.generate(
                **inputs, max_new_tokens=min(_MAX_NEW_TOKENS, most), do_sample=False, num_beams=1,
                decoder_start_token_id=start,
            )  # fmt: skip
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"model: {name} cannot generate a text; expected a target text (--target)") from error
    return whole


def tokens_of(tokenizer: Any, ids: Tensor) -> list[str]:
    """Return the tokens of the first row of ids (B, L). Those that the tokenizer does not have, as some vocabularies of
    models do, are named by their numbers.
    """
    numbers = ids[0].tolist()
    names = tokenizer.convert_ids_to_tokens(numbers)
    return [f"[{number}]" if name is None else name for number, name in zip(numbers, names, strict=True)]


def without_other_lengths(recording: Recording, tokens: Sequence[str], source: Sequence[str]) -> int:
    """Remove the records of other lengths than those of the texts, such as the streams of ProphetNet. Return how many."""
    lengths = {len(tokens), len(source)}
    before = len(recording.records)
    recording.records[:] = [
        record for record in recording
        if record.keys in lengths and record.queries == (len(tokens) if record.kind == "cross" else record.keys)
    ]  # fmt: skip
    return before - len(recording.records)
