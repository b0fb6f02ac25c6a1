"""Gestures on the matrix: the wheel, dragging, keys and touch zoom and pan it about the pointer."""

from __future__ import annotations

from typing import Any

import pytest
from support.browser import Opener
from support.records import make_long_records, make_record, random_weights

from regard.view.page import page

SIZE = 500
NAMES = [f"w{n}" for n in range(SIZE)]


@pytest.fixture(scope="module")
def document() -> str:
    return page(make_long_records(SIZE, 1, 3), NAMES)


class Matrix:
    """The matrix of a page, scrolled into view."""

    def __init__(self, tab: Any, place: str = "#matrix") -> None:
        self.tab, self.place = tab, place
        if not tab.evaluate("document.getElementById('panels').matches('.compared')"):
            tab.get_by_role("radio", name="Matrix").click()
        tab.locator(f"{place} canvas").evaluate("canvas => canvas.scrollIntoView({block: 'center'})")
        box = tab.locator(f"{place} canvas").bounding_box()
        self.left, self.top, self.width, self.height = box["x"], box["y"], box["width"], box["height"]

    def at(self, across: float, down: float) -> tuple[int, int]:
        """Return a pixel of the screen, from fractions of the matrix."""
        return int(self.left + across * self.width), int(self.top + down * self.height)

    @property
    def size(self) -> float:
        """The size of a cell in pixels."""
        size: float = self.tab.locator(f"{self.place} .sheet").evaluate("sheet => sheet.__zoom.k")
        return size

    def tip(self, x: float, y: float) -> str:
        """Move the mouse to a pixel and return the tooltip of the cell there."""
        self.tab.mouse.move(x + 1, y)
        self.tab.mouse.move(x, y)
        text: str = self.tab.locator(f"{self.place} .tip").text_content()
        return text

    def wheel(self, *deltas: float) -> None:
        """Turn the wheel with Ctrl."""
        self.tab.keyboard.down("Control")
        for delta in deltas:
            self.tab.mouse.wheel(0, delta)
        self.tab.keyboard.up("Control")
        self.tab.wait_for_timeout(200)  # d3 ends a wheel gesture after a delay


def test_wheel_zooms_about_the_pointer(opened: Opener, document: str) -> None:
    matrix = Matrix(opened(document))
    x, y = matrix.at(0.37, 0.61)
    whole, tip = matrix.size, matrix.tip(x, y)
    sizes = []
    for deltas in ([-100] * 3, [-200], [-150], [60], [-300] * 3, [40], [200], [-90]):
        matrix.wheel(*deltas)
        sizes.append(matrix.size)
        assert matrix.tip(x, y) == tip, sizes
    assert max(sizes) == 34
    assert sum(size >= 11 for size in sizes) > 2
    assert all(size == int(size) for size in sizes if size >= 11), "labeled cells have an integer size"
    matrix.wheel(*[400] * 6)
    assert matrix.size == whole
    assert matrix.tip(x, y) == tip


def test_small_wheel_steps_accumulate(opened: Opener, document: str) -> None:
    """A trackpad sends steps that are too small to make a cell one pixel larger."""
    matrix = Matrix(opened(document))
    matrix.tip(*matrix.at(0.5, 0.5))
    while matrix.size < 11:
        matrix.wheel(-100)
    before = matrix.size
    matrix.wheel(*[-4] * 30)
    assert before * 1.5 < matrix.size < before * 2.1


def test_drag_pans_without_pinning(opened: Opener, document: str) -> None:
    tab = opened(document)
    matrix = Matrix(tab)
    x, y = matrix.at(0.5, 0.5)
    matrix.tip(x, y)
    matrix.wheel(*[-200] * 6)
    tip = matrix.tip(x, y)
    tab.mouse.down()
    tab.mouse.move(x + 81, y - 47, steps=5)
    tab.mouse.up()
    assert matrix.tip(x + 81, y - 47) == tip, "the dragged cell stays under the pointer"
    tab.mouse.move(2, 2)
    assert tab.locator("#matrix .tip").is_hidden(), "nothing was pinned"
    tab.mouse.click(x, y)
    tab.mouse.move(2, 2)
    assert tab.locator("#matrix .tip").is_visible()


def test_wheel_events_are_passed_to_the_browser_only_without_ctrl(opened: Opener, document: str) -> None:
    """A matrix that fits does not stop scrolling, and at its limits of zoom the browser does not zoom the page."""
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
    assert tab.evaluate(script, [x, y, False, 30]), "a zoomed matrix pans by the wheel"
    tip = matrix.tip(x, y)
    assert tab.evaluate(script, [x, y, False, 34])
    assert int(matrix.tip(x, y)[1:4]) == int(tip[1:4]) + 1
    assert tab.evaluate(script, [x, y, False, 90000])
    assert not tab.evaluate(script, [x, y, False, 30]), "at its end the page scrolls"


def test_keys_and_double_click_zoom(opened: Opener, document: str) -> None:
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
    tip = matrix.tip(x, y)
    tab.mouse.dblclick(x, y)
    assert matrix.size == pytest.approx(2 * whole)
    assert matrix.tip(x, y) == tip


def test_matrices_of_equal_shape_move_together(opened: Opener, document: str) -> None:
    tab = opened(document)
    tab.get_by_role("button", name="Compare").click()
    tab.locator(".thumb").nth(2).click()
    left, right = Matrix(tab, "#beside"), Matrix(tab)

    def assert_together(x: float, y: float) -> None:
        assert left.size == right.size
        assert right.tip(x, y).split(" → ")[0] == left.tab.locator("#beside .tip").text_content().split(" → ")[0]
        places = [
            tab.locator(f"{place} .cursor").evaluate("e => e.style.transform") for place in ("#beside", "#matrix")
        ]
        assert places[0] == places[1], "both mark the same cell at the same position"

    x, y = right.at(0.6, 0.4)
    right.tip(x, y)
    right.wheel(*[-150] * 5)
    assert right.size > 11
    assert_together(x, y)
    over = left.at(0.5, 0.5)
    left.tip(*over)
    tab.mouse.down()
    tab.mouse.move(over[0] + 50, over[1] + 70, steps=3)
    tab.mouse.up()
    assert_together(x, y)


def test_matrix_of_another_shape_does_not_move(opened: Opener) -> None:
    records = [
        make_record(random_weights(1, 2, 40, 40, seed=0), 0),
        make_record(random_weights(1, 2, 40, 30, seed=1), 1, kind="cross"),
    ]
    tab = opened(page(records, NAMES[:40], key_tokens=[f"k{n}" for n in range(30)]), at="#0.0")
    tab.get_by_role("button", name="Compare").click()
    tab.locator(".thumb").nth(2).click()
    left, right = Matrix(tab, "#beside"), Matrix(tab)
    before = left.size
    right.tip(*right.at(0.5, 0.5))
    right.wheel(-200, -200)
    assert right.size > before
    assert left.size == before


def test_matrix_fits_at_any_width(opened: Opener) -> None:
    """Labels that do not fit beside the cells are omitted."""
    tab = opened(page([make_record(random_weights(1, 2, 40, 40, seed=0))], NAMES[:40]))
    tab.get_by_role("radio", name="Matrix").click()
    sheet, sizes = tab.locator("#matrix .sheet"), set()
    for width in range(420, 700, 10):
        tab.set_viewport_size({"width": width, "height": 1200})
        tab.wait_for_timeout(50)
        size = sheet.evaluate("sheet => sheet.__zoom.k")
        sizes.add(size)
        assert sheet.evaluate("sheet => sheet.style.touchAction") == "pan-x pan-y", "nothing to pan to"
        assert size < 11 or size == int(size)
    assert min(sizes) < 11 < max(sizes)


# Touch


class Fingers:
    """Fingers on a touch screen."""

    def __init__(self, tab: Any) -> None:
        self.tab, self.session = tab, tab.context.new_cdp_session(tab)

    def send(self, kind: str, *points: tuple[float, float]) -> None:
        touches = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(points)]
        self.session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": touches})

    def go(self, *paths: tuple[tuple[float, float], tuple[float, float]], steps: int = 10) -> None:
        """Move each finger along its path."""
        for n in range(1, len(paths) + 1):  # fingers touch the screen one after another
            self.send("Start", *[start for start, _ in paths[:n]])
        for step in range(1, steps + 1):
            part = step / steps
            self.send("Move", *[(a[0] + part * (b[0] - a[0]), a[1] + part * (b[1] - a[1])) for a, b in paths])
            self.tab.wait_for_timeout(16)
        self.send("End")
        self.tab.wait_for_timeout(100)


@pytest.fixture
def phone(opened: Opener, document: str) -> tuple[Any, Matrix, Fingers]:
    tab = opened(document, width=420, has_touch=True, is_mobile=True)
    return tab, Matrix(tab), Fingers(tab)


def tapped(tab: Any, x: float, y: float) -> str:
    """Tap a pixel and return the tooltip of the pinned cell; a second tap unpins it."""
    tab.touchscreen.tap(x, y)
    tip: str = tab.locator("#matrix .tip").text_content()
    assert tab.locator("#matrix .tip").is_visible()
    tab.wait_for_timeout(600)  # two taps at once are a double tap
    tab.touchscreen.tap(x, y)
    tab.wait_for_timeout(600)
    return tip


def test_tap_pins_a_cell(phone: tuple[Any, Matrix, Fingers]) -> None:
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


def test_pinch_zooms_about_its_center(phone: tuple[Any, Matrix, Fingers]) -> None:
    tab, matrix, fingers = phone
    whole = matrix.size
    x, y = matrix.at(0.5, 0.5)
    tip = tapped(tab, x, y)
    scrolled = tab.evaluate("scrollY")
    fingers.go(((x - 20, y - 20), (x - 100, y - 100)), ((x + 20, y + 20), (x + 100, y + 100)))
    assert matrix.size == pytest.approx(5 * whole, rel=0.02)
    for _ in range(2):
        fingers.go(((x - 20, y - 20), (x - 80, y - 80)), ((x + 20, y + 20), (x + 80, y + 80)))
    assert matrix.size > 11
    assert matrix.size == int(matrix.size)
    there = tapped(tab, x, y)
    queries = [int(text.split(" ")[0][1:]) for text in (tip, there)]
    assert abs(queries[0] - queries[1]) <= 2 / whole, "within two pixels of the whole matrix"
    for _ in range(3):
        fingers.go(((x - 100, y - 100), (x - 15, y - 15)), ((x + 100, y + 100), (x + 15, y + 15)))
    assert matrix.size == whole
    assert tab.evaluate("scrollY") == scrolled, "the page did not scroll"
    assert tab.evaluate("visualViewport.scale") == 1


def test_one_finger_pans_a_zoomed_matrix_or_scrolls_the_page(phone: tuple[Any, Matrix, Fingers]) -> None:
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
    tip = tapped(tab, x, y)
    before = tab.evaluate("scrollY")
    fingers.go(((x, y), (x + 60, y + 80)))
    assert tab.evaluate("scrollY") == before
    assert tab.locator("#matrix .tip").text_content() == tip, "a drag pins nothing"
    assert tapped(tab, x + 60, y + 80) == tip
