"""The layout of the page in a real browser: directions of texts, narrow windows, many heads, long texts."""

from __future__ import annotations

from typing import Any

import pytest
from support.browser import Opener
from support.records import make_record, random_weights

from regard.view.page import page

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "lay", "in", "the", "sun", "all", "day"]


def page_of(tokens: list[str], **options: Any) -> str:
    return page([make_record(random_weights(1, 2, len(tokens), len(tokens), seed=0))], tokens, **options)


def lefts(tab: Any, selector: str) -> list[float]:
    """The left edges of elements, in pixels."""
    return [box["x"] for box in (element.bounding_box() for element in tab.locator(selector).all())]


def test_text_from_right_to_left_is_in_order(opened: Opener) -> None:
    # Pieces of words, a number and Latin letters, between markers.
    tokens = ["[CLS]", "لم", "تع", "##بر", "القط", "##ة", "12", "ساعة", "[SEP]"]
    tab = opened(page_of(tokens))
    positions = lefts(tab, ".flow .word")
    assert positions == sorted(positions, reverse=True)
    assert tab.evaluate("getComputedStyle(document.querySelector('.flow')).direction") == "rtl"
    assert tab.evaluate("getComputedStyle(document.querySelectorAll('.word')[3]).unicodeBidi") == "normal"
    # The pieces of a word touch, and are not separated by space or padding.
    first, second = (tab.locator(".flow .word").nth(n).bounding_box() for n in (2, 3))
    assert second["x"] + second["width"] == pytest.approx(first["x"], abs=0.6)
    # In a sentence, the query stays on the left of the arrow.
    tab.locator(".flow .word").nth(1).hover()
    quoted = lefts(tab, "#reading b")
    assert quoted == sorted(quoted)


def test_text_from_left_to_right_is_in_order(opened: Opener) -> None:
    tab = opened(page_of(["[CLS]", "the", "un", "##like", "القطة", "cat", "sat", "down", "[SEP]"]))
    positions = lefts(tab, ".flow .word")
    assert positions == sorted(positions)
    assert tab.evaluate("getComputedStyle(document.querySelector('.flow')).direction") == "ltr"


@pytest.mark.parametrize("width", [390, 768, 1024, 1440])
def test_32_heads_per_layer_fit_at_any_width(opened: Opener, width: int) -> None:
    records = [make_record(random_weights(1, 32, 16, 16, seed=n), n) for n in range(4)]
    tab = opened(page(records, [*WORDS, "long"]), width=width)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    overview, detail = (tab.locator(name).bounding_box() for name in ("#overview", "#detail"))
    if width <= 1100:  # one above the other, each as wide as the window
        assert overview["width"] == detail["width"] > 0.9 * width
        assert detail["y"] > overview["y"] + overview["height"]
    else:
        assert detail["x"] > overview["x"] + overview["width"]
    assert tab.locator(".axes").is_visible()


def test_choosing_a_head_on_a_phone_scrolls_to_it(opened: Opener) -> None:
    records = [make_record(random_weights(1, 4, 16, 16, seed=n), n) for n in range(6)]
    tab = opened(page(records, [*WORDS, "long"]), width=390, has_touch=True, is_mobile=True)
    assert tab.evaluate("scrollY") == 0
    tab.locator(".thumb").nth(9).tap()
    assert tab.locator("#head-title").text_content() == "Layer 2 · Head 1"
    assert 0 <= tab.locator("#detail").bounding_box()["y"] <= 20
    assert "Tap a token" in tab.locator("#reading").text_content()


def test_legend_and_axes_are_above_the_drawing(opened: Opener) -> None:
    tab = opened(page_of(WORDS))
    legend, panels = (tab.locator(name).bounding_box() for name in ("#legend", "#panels"))
    assert legend["y"] + legend["height"] <= panels["y"]
    assert "square-root scale" in tab.locator("#legend").text_content()
    assert tab.locator("#matrix .axis").text_content() == "Rows: queries ↓   Columns: keys →"
    assert tab.locator(".names").text_content() == "entropyQuery →→ Keyreceived"
    assert "in nats" in tab.locator("#query-what").get_attribute("title")


def test_long_subtitle_and_text_leave_room_for_the_heads(opened: Opener) -> None:
    tokens = [f"word{n}" for n in range(900)]
    tab = opened(page_of(tokens, title="A model", subtitle=" ".join(tokens), notes=["The end was cut off."]))
    assert tab.locator("#subtitle").bounding_box()["height"] < 60
    assert tab.locator("main").bounding_box()["y"] < 0.55 * 900
    assert tab.locator("#notes li").all_text_contents() == ["The end was cut off."]


def test_compare_marks_the_kept_head_and_names_the_next_step(opened: Opener) -> None:
    records = [make_record(random_weights(1, 4, 16, 16, seed=n), n) for n in range(2)]
    tab = opened(page(records, [*WORDS, "long"]), at="#0.1")
    assert not tab.locator("#compare-hint").is_visible()
    tab.get_by_role("button", name="Compare").click()
    assert tab.locator("#compare-hint").text_content() == "Now choose a second head in the overview."
    tab.locator(".thumb").nth(6).click()
    assert not tab.locator("#compare-hint").is_visible()
    assert tab.locator(".thumb.kept").count() == 1
    assert "layer 0, head 1" in tab.locator(".thumb.kept").get_attribute("aria-label")


def test_address_of_no_head_is_replaced(opened: Opener) -> None:
    tab = opened(page_of(WORDS), at="#99.99")
    assert tab.evaluate("location.hash") in ("#0.0", "#0.1")
    tab.evaluate("location.hash = '#0.7'")
    tab.wait_for_function("['#0.0', '#0.1'].includes(location.hash)")
