"""The page as a notebook widget (anywidget): the page in a frame, with the selected head available in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard.view.data import PageInput
from regard.view.page import BUDGET, page
from regard.view.picture import Picture
from regard.view.record import RecordLike

# The frame is sandboxed: page and notebook exchange messages about the selected head, and nothing else.
_ESM = """
function render({ model, el }) {
  const frame = document.createElement("iframe");
  frame.title = "Attention heads";
  frame.sandbox = "allow-scripts allow-downloads";
  frame.style.cssText = "display: block; width: 100%; border: 1px solid #8884; border-radius: 8px";
  frame.style.height = `${model.get("height")}px`;
  frame.srcdoc = model.get("document");
  const onMessage = (event) => {
    if (event.source !== frame.contentWindow || !Array.isArray(event.data?.regardHead)) return;
    const [layer, head] = event.data.regardHead.map(Number);
    model.set("head", [layer, head]);
    model.save_changes();
  };
  const sendHead = () => frame.contentWindow?.postMessage({ regardHead: model.get("head") }, "*");
  const resize = () => (frame.style.height = `${model.get("height")}px`);
  addEventListener("message", onMessage);
  model.on("change:head", sendHead);
  model.on("change:height", resize);
  el.append(frame);
  return () => {
    removeEventListener("message", onMessage);
    model.off("change:head", sendHead);
    model.off("change:height", resize);
  };
}
export default { render };
"""


def widget(
    records: Sequence[RecordLike],
    tokens: Sequence[str],
    *,
    title: str = "",
    subtitle: str = "",
    batch: int = 0,
    key_tokens: Sequence[str] | None = None,
    produced: Sequence[str] | None = None,
    budget: int = BUDGET,
    picture: Picture | None = None,
    other: PageInput | None = None,
    notes: Sequence[str] = (),
    height: int = 760,
) -> Any:
    """Return a widget with the page of `records`. Its attribute `head` is the selected (layer, head), as indexed in the
    overview; it can be read, observed and set.

    Args:
        records, tokens, title, subtitle, batch, key_tokens, produced, budget, picture, other, notes: as in `page`.
        height: the height of the widget in pixels.

    Raises:
        ImportError: anywidget is not installed.
        ValueError: the arguments do not match, as in `page`.

    >>> from regard.watch import watch
    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with watch(layer, top=3) as records:
    ...     _ = layer(*torch.rand(3, 1, 3, 8))
    >>> view = widget(records, ["the", "cat", "sat"], height=600)
    >>> view.head = [0, 1]
    >>> view.height, view.head, "cat" in view.document
    (600, [0, 1], True)
    """
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise ImportError("the notebook widget needs anywidget: pip install 'regard[notebook]'") from error
    if not isinstance(height, int) or height < 1:
        raise ValueError(f"height: {height!r}; expected an integer of pixels > 0")

    class View(anywidget.AnyWidget):  # type: ignore[misc]
        """The page and its selected head."""

        _esm = _ESM
        document = traitlets.Unicode().tag(sync=True)
        height = traitlets.Int().tag(sync=True)
        head = traitlets.List(traitlets.Int(), minlen=0, maxlen=2).tag(sync=True)

    document = page(
        records, tokens, title=title, subtitle=subtitle, batch=batch, key_tokens=key_tokens, produced=produced,
        budget=budget, picture=picture, other=other, notes=notes,
    )  # fmt: skip
    return View(document=document, height=height)
