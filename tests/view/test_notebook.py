"""The notebook widget: its script runs in a real browser with a stand-in for the model of anywidget."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.page import TOKENS
from support.records import make_record, random_weights

from regard.view.notebook import widget
from regard.view.page import page

RECORDS = [make_record(random_weights(1, 3, 12, 12, seed=n), n) for n in range(2)]
HOST = """<!doctype html><body><div id="out"></div><script type="module">
const state = {state}, listeners = {{}};
window.model = {{
  get: (name) => state[name],
  set: (name, value) => (state[name] = value),
  save_changes: () => (window.saved = structuredClone(state.head)),
  on: (topic, act) => (listeners[topic] = act),
  off: (topic) => delete listeners[topic],
  emit: (topic) => listeners[topic](),
  count: () => Object.keys(listeners).length,
}};
const view = await import("data:text/javascript," + encodeURIComponent({esm}));
window.leave = view.default.render({{ model, el: document.getElementById("out") }});
window.ready = true;
</script></body>"""


def test_widget_shows_the_page_and_synchronizes_the_head(browser: Any, tmp_path: Path) -> None:
    view = widget(RECORDS, TOKENS, title="in a notebook", height=700)
    state = {"document": view.document, "height": view.height, "head": []}
    # The text must not end the script that contains it.
    text = HOST.format(state=json.dumps(state).replace("<", "\\u003c"), esm=json.dumps(str(view._esm)))
    (tmp_path / "host.html").write_text(text, encoding="utf-8")
    tab = browser.new_page()
    complaints: list[str] = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))
    tab.goto((tmp_path / "host.html").as_uri())
    tab.wait_for_function("window.ready")
    frame = tab.frame_locator("iframe")
    frame.locator("#grid[data-drawn]").wait_for()
    assert frame.locator("#title").text_content() == "in a notebook"
    with pytest.raises(Exception, match=r"cross-origin|SecurityError|Blocked"):  # the frame is isolated
        tab.evaluate("document.querySelector('iframe').contentWindow.document.title")
    frame.locator(".thumb").nth(3 + 1).click()
    tab.wait_for_function("window.saved && window.saved[0] === 1 && window.saved[1] === 1")
    tab.evaluate("model.set('head', [0, 2]); model.emit('change:head')")
    frame.locator("#head-title", has_text="Layer 0 · Head 2").wait_for()
    frame.locator(".column.query li").nth(4).hover()
    shown = frame.locator(".column.key .figure").all_text_contents()
    weights = random_weights(1, 3, 12, 12, seed=0)[0, 2, 4].tolist()
    assert all(abs(float(a) - b) < 6e-4 for a, b in zip(shown, weights, strict=True))
    tab.evaluate("model.set('height', 500); model.emit('change:height')")
    assert tab.locator("iframe").bounding_box()["height"] == pytest.approx(500, abs=3)
    tab.evaluate("leave()")
    assert tab.evaluate("model.count()") == 0
    assert complaints == []
    tab.close()


def test_widget_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="height: 0; expected an integer of pixels > 0"):
        widget(RECORDS, TOKENS, height=0)
    with pytest.raises(ValueError, match="tokens has 1 entries: expected 12"):
        widget(RECORDS, ["a"])
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(ImportError, match=r"pip install 'regard\[notebook\]'"):
        widget(RECORDS, TOKENS)


def test_widget_has_the_arguments_of_page() -> None:
    names = [name for name in inspect.signature(widget).parameters if name != "height"]
    assert names == list(inspect.signature(page).parameters)
    settings = {"title": "a title", "subtitle": "a subtitle", "key_tokens": TOKENS, "notes": ["a note"]}
    assert widget(RECORDS, TOKENS, **settings).document == page(RECORDS, TOKENS, **settings)
