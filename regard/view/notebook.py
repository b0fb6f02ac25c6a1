"""The page in a notebook, by anywidget: the same view in a frame of its own, and the chosen head in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard.view.page import BUDGET, page
from regard.view.record import Record

# The page keeps to its frame: it has no way to the notebook but to say which head is chosen, and to be told.
_ESM = """
function render({ model, el }) {
  const frame = document.createElement("iframe");
  frame.title = "What the heads look at";
  frame.sandbox = "allow-scripts allow-downloads";
  frame.style.cssText = "display: block; width: 100%; border: 1px solid #8884; border-radius: 8px";
  frame.style.height = `${model.get("height")}px`;
  frame.srcdoc = model.get("document");
  const heard = (event) => {
    if (event.source !== frame.contentWindow || !Array.isArray(event.data?.regardHead)) return;
    const [layer, head] = event.data.regardHead.map(Number);
    model.set("head", [layer, head]);
    model.save_changes();
  };
  const told = () => frame.contentWindow?.postMessage({ regardHead: model.get("head") }, "*");
  const resized = () => (frame.style.height = `${model.get("height")}px`);
  addEventListener("message", heard);
  model.on("change:head", told);
  model.on("change:height", resized);
  el.append(frame);
  return () => {
    removeEventListener("message", heard);
    model.off("change:head", told);
    model.off("change:height", resized);
  };
}
export default { render };
"""


def widget(
    records: Sequence[Record],
    tokens: Sequence[str],
    *,
    title: str = "",
    batch: int = 0,
    key_tokens: Sequence[str] | None = None,
    height: int = 760,
    budget: int = BUDGET,
) -> Any:
    """A widget that shows what every head of `records` attends to; the arguments are those of `page`.

    `head` of the widget is the pair (layer, head) that is chosen, as they stand in the overview: read, observe or set it.

    Args:
        height: of the view, in pixels.

    Raises:
        ImportError: anywidget is missing.
        ValueError: as `page` does.

    >>> view = widget(seen, tokens)
    >>> view.head = (5, 11)
    """
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise ImportError("the view in a notebook needs anywidget: pip install 'regard[notebook]'") from error
    if not isinstance(height, int) or height < 1:
        raise ValueError(f"height: {height!r}; expected a whole number of pixels > 0")

    class View(anywidget.AnyWidget):  # type: ignore[misc]
        """The page, and what is chosen in it."""

        _esm = _ESM
        document = traitlets.Unicode().tag(sync=True)
        height = traitlets.Int().tag(sync=True)
        head = traitlets.List(traitlets.Int(), minlen=0, maxlen=2).tag(sync=True)

    return View(
        document=page(records, tokens, title=title, batch=batch, key_tokens=key_tokens, budget=budget), height=height
    )
