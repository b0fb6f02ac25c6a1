"""The gestures of the matrix: the wheel, a drag, keys and fingers move it, and what is pointed at stays where it is."""

from __future__ import annotations

from typing import Any

import pytest
from support.browser import Opener
from support.records import long, random, seen

from regard.view.page import page

SIZE = 500
NAMES = [f"w{n}" for n in range(SIZE)]


@pytest.fixture(scope="module")
def document() -> str:
    return page(long(SIZE, 1, 3), NAMES)


class Matrix:
    """The matrix of a page, alone and whole on the screen."""

    def __init__(self, tab: Any, place: str = "#matrix") -> None:
        self.tab, self.place = tab, place
        if not tab.evaluate("document.getElementById('panels').matches('.compared')"):
            tab.get_by_role("radio", name="Matrix").click()
        tab.locator(f"{place} canvas").evaluate("canvas => canvas.scrollIntoView({block: 'center'})")
        box = tab.locator(f"{place} canvas").bounding_box()
        self.left, self.top, self.wide, self.high = box["x"], box["y"], box["width"], box["height"]

    def at(self, across: float, down: float) -> tuple[int, int]:
        """A pixel of the screen, from parts of the whole."""
        return int(self.left + across * self.wide), int(self.top + down * self.high)

    @property
    def size(self) -> float:
        """The pixels of a cell."""
        size: float = self.tab.locator(f"{self.place} .sheet").evaluate("sheet => sheet.__zoom.k")
        return size

    def told(self, x: float, y: float) -> str:
        """The cell under a pixel, as it is told to a mouse that comes there."""
        self.tab.mouse.move(x + 1, y)
        self.tab.mouse.move(x, y)
        tip: str = self.tab.locator(f"{self.place} .tip").text_content()
        return tip

    def turn(self, *turns: float) -> None:
        """Turns of the wheel with Ctrl."""
        self.tab.keyboard.down("Control")
        for by in turns:
            self.tab.mouse.wheel(0, by)
        self.tab.keyboard.up("Control")
        self.tab.wait_for_timeout(200)  # until d3 takes the turns as over


def test_the_wheel_zooms_about_the_pointer(opened: Opener, document: str) -> None:
    matrix = Matrix(opened(document))
    x, y = matrix.at(0.37, 0.61)
    whole, told = matrix.size, matrix.told(x, y)
    sizes = []
    for turns in ([-100] * 3, [-200], [-150], [60], [-300] * 3, [40], [200], [-90]):
        matrix.turn(*turns)
        sizes.append(matrix.size)
        assert matrix.told(x, y) == told, sizes
    assert max(sizes) == 34
    assert sum(size >= 11 for size in sizes) > 2
    assert all(size == int(size) for size in sizes if size >= 11), "cells with labels are whole pixels"
    matrix.turn(*[400] * 6)
    assert matrix.size == whole
    assert matrix.told(x, y) == told


def test_fine_turns_add_up_to_a_pixel(opened: Opener, document: str) -> None:
    """As of a trackpad, where each is less than would make a cell a pixel wider."""
    matrix = Matrix(opened(document))
    matrix.told(*matrix.at(0.5, 0.5))
    while matrix.size < 11:
        matrix.turn(-100)
    before = matrix.size
    matrix.turn(*[-4] * 30)
    assert before * 1.5 < matrix.size < before * 2.1


def test_a_drag_moves_and_does_not_pin(opened: Opener, document: str) -> None:
    tab = opened(document)
    matrix = Matrix(tab)
    x, y = matrix.at(0.5, 0.5)
    matrix.told(x, y)
    matrix.turn(*[-200] * 6)
    told = matrix.told(x, y)
    tab.mouse.down()
    tab.mouse.move(x + 81, y - 47, steps=5)
    tab.mouse.up()
    assert matrix.told(x + 81, y - 47) == told, "what was taken stays under the pointer"
    tab.mouse.move(2, 2)
    assert tab.locator("#matrix .tip").is_hidden(), "nothing was pinned"
    tab.mouse.click(x, y)
    tab.mouse.move(2, 2)
    assert tab.locator("#matrix .tip").is_visible()


def test_what_the_wheel_leaves_to_the_browser(opened: Opener, document: str) -> None:
    """A whole matrix does not hold up the page; and the browser never zooms the page where the matrix cannot."""
    tab = opened(document)
    matrix = Matrix(tab)
    x, y = matrix.at(0.5, 0.5)
    script = """([x, y, ctrlKey, deltaY]) => {
      const event = new WheelEvent("wheel", {ctrlKey, deltaY, clientX: x, clientY: y, bubbles: true, cancelable: true});
      return !document.querySelector("#matrix .sheet").dispatchEvent(event);
    }"""
    assert not tab.evaluate(script, [x, y, False, 30])
    assert tab.evaluate(script, [x, y, True, 30])
    for _ in range(9):
        assert tab.evaluate(script, [x, y, True, -200])
    assert matrix.size == 34
    assert tab.evaluate(script, [x, y, False, 30]), "zoomed, the wheel moves it"
    told = matrix.told(x, y)
    assert tab.evaluate(script, [x, y, False, 34])
    assert int(matrix.told(x, y)[1:4]) == int(told[1:4]) + 1
    assert tab.evaluate(script, [x, y, False, 90000])
    assert not tab.evaluate(script, [x, y, False, 30]), "at the end the page goes on"


def test_keys_and_a_double_click_zoom(opened: Opener, document: str) -> None:
    tab = opened(document)
    matrix = Matrix(tab)
    whole = matrix.size
    tab.locator("#matrix .sheet").focus()
    tab.keyboard.press("+")
    assert matrix.size == pytest.approx(1.6 * whole)
    tab.keyboard.press("-")
    assert matrix.size == pytest.approx(whole)
    for _ in range(9):
        tab.keyboard.press("+")
    assert matrix.size == 34
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#matrix .tip").is_visible()
    tab.keyboard.press("0")
    assert matrix.size == whole
    x, y = matrix.at(0.4, 0.7)
    told = matrix.told(x, y)
    tab.mouse.dblclick(x, y)
    assert matrix.size == pytest.approx(2 * whole)
    assert matrix.told(x, y) == told


def test_two_of_one_shape_move_together(opened: Opener, document: str) -> None:
    tab = opened(document)
    tab.get_by_role("button", name="Compare").click()
    tab.locator(".thumb").nth(2).click()
    left, right = Matrix(tab, "#beside"), Matrix(tab)

    def assert_together(x: float, y: float) -> None:
        assert left.size == right.size
        assert right.told(x, y).split(" → ")[0] == left.tab.locator("#beside .tip").text_content().split(" → ")[0]
        places = [
            tab.locator(f"{place} .cursor").evaluate("e => e.style.transform") for place in ("#beside", "#matrix")
        ]
        assert places[0] == places[1], "the same cell, at the same place of each"

    x, y = right.at(0.6, 0.4)
    right.told(x, y)
    right.turn(*[-150] * 5)
    assert right.size > 11
    assert_together(x, y)
    over = left.at(0.5, 0.5)
    left.told(*over)
    tab.mouse.down()
    tab.mouse.move(over[0] + 50, over[1] + 70, steps=3)
    tab.mouse.up()
    assert_together(x, y)


def test_one_of_another_shape_stays(opened: Opener) -> None:
    records = [seen(random(1, 2, 40, 40, seed=0), 0), seen(random(1, 2, 40, 30, seed=1), 1, kind="cross")]
    tab = opened(page(records, NAMES[:40], key_tokens=[f"k{n}" for n in range(30)]), at="#0.0")
    tab.get_by_role("button", name="Compare").click()
    tab.locator(".thumb").nth(2).click()
    left, right = Matrix(tab, "#beside"), Matrix(tab)
    before = left.size
    right.told(*right.at(0.5, 0.5))
    right.turn(-200, -200)
    assert right.size > before
    assert left.size == before


def test_what_is_whole_is_all_in_sight(opened: Opener) -> None:
    """However much room there is: labels that do not fit beside the cells are left out."""
    tab = opened(page([seen(random(1, 2, 40, 40, seed=0))], NAMES[:40]))
    tab.get_by_role("radio", name="Matrix").click()
    sheet, sizes = tab.locator("#matrix .sheet"), set()
    for width in range(420, 700, 10):
        tab.set_viewport_size({"width": width, "height": 1200})
        tab.wait_for_timeout(50)
        size = sheet.evaluate("sheet => sheet.__zoom.k")
        sizes.add(size)
        assert sheet.evaluate("sheet => sheet.style.touchAction") == "pan-x pan-y", "it has nowhere to move"
        assert size < 11 or size == int(size)
    assert min(sizes) < 11 < max(sizes)


# Fingers


class Fingers:
    """Fingers on a screen that feels them."""

    def __init__(self, tab: Any) -> None:
        self.tab, self.session = tab, tab.context.new_cdp_session(tab)

    def send(self, kind: str, *points: tuple[float, float]) -> None:
        touches = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(points)]
        self.session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": touches})

    def go(self, *ways: tuple[tuple[float, float], tuple[float, float]], steps: int = 10) -> None:
        """Each finger from where it is put down to where it is lifted."""
        for n in range(1, len(ways) + 1):  # no two touch the glass at once
            self.send("Start", *[start for start, _ in ways[:n]])
        for step in range(1, steps + 1):
            part = step / steps
            self.send("Move", *[(a[0] + part * (b[0] - a[0]), a[1] + part * (b[1] - a[1])) for a, b in ways])
            self.tab.wait_for_timeout(16)
        self.send("End")
        self.tab.wait_for_timeout(100)


@pytest.fixture
def phone(opened: Opener, document: str) -> tuple[Any, Matrix, Fingers]:
    tab = opened(document, width=420, has_touch=True, is_mobile=True)
    return tab, Matrix(tab), Fingers(tab)


def tapped(tab: Any, x: float, y: float) -> str:
    """The cell that a tap pins, as it is told; a second tap unpins it."""
    tab.touchscreen.tap(x, y)
    tip: str = tab.locator("#matrix .tip").text_content()
    assert tab.locator("#matrix .tip").is_visible()
    tab.wait_for_timeout(600)  # two at once would be a double tap
    tab.touchscreen.tap(x, y)
    tab.wait_for_timeout(600)
    return tip


def test_a_tap_pins_a_cell(phone: tuple[Any, Matrix, Fingers]) -> None:
    tab, matrix, _ = phone
    before = matrix.size
    x, y = matrix.at(0.4, 0.7)
    tab.touchscreen.tap(x, y)
    assert " → " in tab.locator("#matrix .tip").text_content()
    pinned = tab.locator("#matrix .tip").text_content()
    tab.wait_for_timeout(600)
    tab.touchscreen.tap(*matrix.at(0.2, 0.9))
    assert tab.locator("#matrix .tip").text_content() != pinned
    assert tab.locator("#matrix .tip").is_visible()
    assert matrix.size == before


def test_two_fingers_zoom_about_their_middle(phone: tuple[Any, Matrix, Fingers]) -> None:
    tab, matrix, fingers = phone
    whole = matrix.size
    x, y = matrix.at(0.5, 0.5)
    told = tapped(tab, x, y)
    scrolled = tab.evaluate("scrollY")
    fingers.go(((x - 20, y - 20), (x - 100, y - 100)), ((x + 20, y + 20), (x + 100, y + 100)))
    assert matrix.size == pytest.approx(5 * whole, rel=0.02)
    for _ in range(2):
        fingers.go(((x - 20, y - 20), (x - 80, y - 80)), ((x + 20, y + 20), (x + 80, y + 80)))
    assert matrix.size > 11
    assert matrix.size == int(matrix.size)
    there = tapped(tab, x, y)
    queries = [int(text.split(" ")[0][1:]) for text in (told, there)]
    assert abs(queries[0] - queries[1]) <= 2 / whole, "within two pixels of the whole"
    for _ in range(3):
        fingers.go(((x - 100, y - 100), (x - 15, y - 15)), ((x + 100, y + 100), (x + 15, y + 15)))
    assert matrix.size == whole
    assert tab.evaluate("scrollY") == scrolled, "the page stayed"
    assert tab.evaluate("visualViewport.scale") == 1


def test_one_finger_moves_what_is_zoomed_and_else_the_page(phone: tuple[Any, Matrix, Fingers]) -> None:
    tab, matrix, fingers = phone
    x, y = matrix.at(0.5, 0.5)
    before = tab.evaluate("scrollY")
    fingers.go(((x, y), (x, y + 90)))
    tab.wait_for_timeout(300)
    assert tab.evaluate("scrollY") < before, "the page scrolls"
    matrix = Matrix(tab)
    x, y = matrix.at(0.5, 0.5)
    tab.locator("#matrix .zoom").get_by_role("button", name="Zoom in").evaluate(
        "e => {for (let n = 0; n < 9; n++) e.click()}"
    )
    told = tapped(tab, x, y)
    before = tab.evaluate("scrollY")
    fingers.go(((x, y), (x + 60, y + 80)))
    assert tab.evaluate("scrollY") == before
    assert tab.locator("#matrix .tip").text_content() == told, "a drag pins nothing"
    assert tapped(tab, x + 60, y + 80) == told
