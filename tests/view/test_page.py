"""The page in a real browser: it shows the weights of the tensors, makes no requests, and no token becomes markup."""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.browser import Opener
from support.page import HOSTILE, TOKENS, block, figures, read_back
from support.paths import ROOT
from support.records import make_record, random_weights
from torch import Tensor

from regard.view import pack
from regard.view.page import page
from regard.view.record import rows

FULL = [random_weights(2, 5, 12, 12, seed=layer) for layer in range(3)]


# The document


@pytest.mark.parametrize("k", [1, 4, 11, 23])
@pytest.mark.parametrize("causal", [False, True])
def test_encode_rows_round_trip(k: int, causal: bool) -> None:
    weights = random_weights(2, 3, 23, 23, seed=k, causal=causal)
    record = make_record(weights, k=k, causal=causal)
    for head, text in enumerate(pack.encode_rows(rows(record, 1), 23)):
        for i, (complete, row) in enumerate(read_back(text, 23)):
            allowed = i + 1 if causal else 23
            assert complete == (k >= allowed)
            assert len(row) == min(k, allowed)
            for key, weight in row.items():
                assert abs(weight - float(weights[1, head, i, key])) <= 0.5 / 16383 + 1e-6


def test_encode_rows_keeps_largest_weights_within_limit() -> None:
    weights = random_weights(1, 2, 9, 9, seed=5)
    text = pack.encode_rows(rows(make_record(weights), 0), 3)[1]
    for i, (complete, row) in enumerate(read_back(text, 9)):
        assert not complete
        assert set(row) == set(weights[0, 1, i].topk(3).indices.tolist())


def test_page_of_72_heads_and_128_tokens_is_small() -> None:
    records = [make_record(random_weights(1, 12, 128, 128, seed=layer, sharp=1.0), layer) for layer in range(6)]
    assert len(page(records, [f"token{n}" for n in range(128)]).encode()) < 2_500_000


def test_script_matches_its_source(tmp_path: Path) -> None:
    """The committed script is the output of `make page`, names its dependencies, and is small."""
    modules = "frontend/node_modules/.package-lock.json"
    if not (ROOT / modules).exists():
        pytest.skip("the dependencies of the page are not installed: npm ci --prefix frontend")
    built = tmp_path / "page.js"
    subprocess.run(["make", "page", f"PAGE={built}", "-o", modules], cwd=ROOT, check=True, capture_output=True)
    script = built.read_text("utf-8")
    assert script == (ROOT / "regard/view/page.js").read_text("utf-8"), "run `make page`"
    notice = script[: script.index("*/")]
    assert [path.name for path in (ROOT / "frontend/node_modules").glob("d3-*") if path.name not in notice] == []
    assert len(script) < 110_000


def test_tokens_and_titles_cannot_become_markup() -> None:
    document = page(
        [make_record(FULL[0])], TOKENS, title="</title><script>alert(2)</script>{{style}}", subtitle="<b>x</b>"
    )
    assert document.count("<script") == 2
    assert document.count("</script") == 2
    assert "<img" not in document
    assert "<b>x" not in document
    data = block(document)
    assert [token[3] if len(token) > 3 else token[0] for token in data["texts"][0]] == TOKENS
    assert data["title"] == "</title><script>alert(2)</script>{{style}}"
    assert "default-src &#x27;none&#x27;" in document
    assert "unsafe" not in document
    assert not re.search(r"https?://(?!www\.w3\.org/)", document), "an address other than an XML namespace"


def test_page_with_lone_surrogate_can_be_written(tmp_path: Path) -> None:
    document = page([make_record(random_weights(1, 1, 2, 2, seed=0))], ["\ud83d", "b"], title="\udc00")
    (tmp_path / "page.html").write_text(document, encoding="utf-8")


def test_page_accepts_rows_that_do_not_sum_to_one() -> None:
    weights = torch.rand(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    assert block(page([make_record(weights), make_record(weights / 9, 1)], list("abcde")))
    nothing = replace(make_record(torch.zeros(1, 1, 3, 3), causal=True), received=None)
    assert block(page([nothing], list("abc")))["layers"][0]["heads"][0]["words"] == "attends to nothing"


def test_invalid_arguments_are_named() -> None:
    record = make_record(FULL[0])
    with pytest.raises(ValueError, match="records is empty"):
        page([], TOKENS)
    with pytest.raises(ValueError, match="tokens has 2 entries: expected 12"):
        page([record], ["a", "b"])
    with pytest.raises(ValueError, match="batch is 2: expected 0 <= batch < 2"):
        page([record], TOKENS, batch=2)
    cross = make_record(random_weights(1, 2, 5, 3, seed=0), kind="cross")
    with pytest.raises(ValueError, match="key_tokens has 2 entries: expected 3"):
        page([cross], list("abcde"), key_tokens=["x", "y"])
    with pytest.raises(ValueError, match="tokens has 4 entries: expected 5"):
        page([cross], list("abcd"), key_tokens=list("xyz"))
    for tokens in ({"produced": list("abcd"), "key_tokens": list("xyz")}, {"produced": list("abcde")}):
        with pytest.raises(ValueError, match=r"produced has . entries: expected 5, as many as tokens, and key_tokens"):
            page([cross], list("abcde"), **tokens)


# In the browser


def assert_shows(texts: list[str], weights: Tensor) -> None:
    assert len(texts) == len(weights)
    for text, weight in zip(texts, weights.tolist(), strict=True):
        assert re.fullmatch(r"[01]\.\d{3}", text)
        assert abs(float(text) - weight) < 0.0006


def test_hover_on_token_shows_its_weights(opened: Opener) -> None:
    tab = opened(page([make_record(weights, n) for n, weights in enumerate(FULL)], TOKENS, batch=1), at="#2.3")
    assert tab.locator("#head-title").text_content() == "Layer 2 · Head 3"
    row = FULL[2][1, 3]
    tab.locator(".column.query li").nth(4).hover()
    assert_shows(figures(tab, "key"), row[4])
    assert f"{float(row[4].max()):.3f}" in tab.locator("#reading").text_content()
    tab.locator(".column.key li").nth(7).hover()
    assert_shows(figures(tab, "query"), row[:, 7])
    tab.locator(".word").nth(2).hover()
    assert_shows(figures(tab, "key"), row[2])
    tab.mouse.move(700, 2)
    received = [float(text) for text in figures(tab, "key")]
    assert received == pytest.approx(row.sum(0).tolist(), abs=0.006)


def test_click_pins_a_token_and_escape_releases_it(opened: Opener) -> None:
    tab = opened(page([make_record(FULL[0])], TOKENS), at="#0.1")
    tab.locator(".column.query li").nth(5).click()
    tab.mouse.move(700, 2)
    assert_shows(figures(tab, "key"), FULL[0][0, 1, 5])
    tab.keyboard.press("Escape")
    assert tab.locator("#lines.focused").count() == 0


def test_head_selection_by_mouse_and_keys(opened: Opener) -> None:
    tab = opened(page([make_record(weights, n) for n, weights in enumerate(FULL)], TOKENS), at="#0.0")
    tab.locator(".thumb").nth(5 + 2).click()
    assert tab.locator("#head-title").text_content() == "Layer 1 · Head 2"
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#head-title").text_content() == "Layer 2 · Head 3"
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')").startswith("layer 2, head 3: ")
    assert tab.locator('.thumb[aria-selected="true"]').count() == 1
    tab.locator(".column.query li").nth(6).hover()
    assert_shows(figures(tab, "key"), FULL[2][0, 3, 6])
    assert tab.evaluate("location.hash") == "#2.3"
    tab.get_by_role("button", name="Next head").click()
    assert tab.locator("#head-title").text_content() == "Layer 2 · Head 4"


def test_arrow_keys_move_over_tokens_and_cells(opened: Opener) -> None:
    tab = opened(page([make_record(FULL[0])], TOKENS), at="#0.2")
    tab.locator("#markers").focus()
    tab.keyboard.press("Tab")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown"):
        tab.keyboard.press(key)
    assert_shows(figures(tab, "key"), FULL[0][0, 2, 3])
    tab.keyboard.press("ArrowRight")
    assert_shows(figures(tab, "query"), FULL[0][0, 2, :, 3])
    tab.locator("#matrix .sheet").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        tab.keyboard.press(key)
    assert tab.locator("#matrix .tip").text_content().endswith(f"{float(FULL[0][0, 2, 1, 1]):.3f}")


def test_hover_on_matrix_shows_the_weight_of_the_cell(opened: Opener) -> None:
    tab = opened(page([make_record(FULL[1])], TOKENS), at="#0.4")
    box = tab.locator("#matrix .sheet canvas").bounding_box()
    tab.mouse.move(box["x"] + box["width"] - 4, box["y"] + box["height"] - 4)
    assert tab.locator("#matrix .tip").text_content() == f"[SEP] → [SEP] {float(FULL[1][0, 4, 11, 11]):.3f}"


def test_token_with_markup_is_shown_as_text(opened: Opener) -> None:
    tab = opened(page([make_record(FULL[0])], TOKENS, title=HOSTILE, subtitle=HOSTILE))
    assert tab.locator("#title").text_content() == HOSTILE
    assert tab.locator(".word").nth(3).text_content() == HOSTILE
    tab.locator(".word").nth(3).hover()
    assert HOSTILE in tab.locator("#reading").text_content()
    assert tab.locator("img").count() == 0
    assert tab.locator(".column.query .token").nth(5).text_content() == "like"
    assert tab.locator(".column.query li").nth(5).get_attribute("title").startswith("##like ")


def test_page_states_unrecorded_weights(opened: Opener) -> None:
    weights = random_weights(1, 2, 29, 29, seed=3)
    record = replace(make_record(weights, k=6), received=None, entropy=None)
    tab = opened(page([record], [f"w{n}" for n in range(29)]), at="#0.1")
    rest = 1 - weights[0, 1].topk(6).values.sum(-1)
    assert f"{float(rest.mean()):.3f} of a row" in tab.locator("#facts").text_content()
    tab.locator(".column.query li").nth(8).hover()
    assert f"{float(rest[8]):.3f} in 23 other keys, not recorded" in tab.locator("#reading").text_content()
    least = float(weights[0, 1, 8].topk(6).values[-1])
    known = weights[0, 1, 8].topk(6).indices.tolist()
    for key, text in enumerate(figures(tab, "key")):
        expected = f"{float(weights[0, 1, 8, key]):.3f}" if key in known else f"≤{least:.3f}"
        assert text == expected
    assert tab.locator(".column.key li.unknown").count() == 23
    assert "not recorded" in tab.locator("#legend").text_content()
    assert figures(tab, "query") == [""] * 29
    assert "not recorded" in tab.locator("#facts div").first.text_content()
    tab.mouse.move(700, 2)
    assert all(text.startswith("≥") for text in figures(tab, "key"))


def test_page_marks_masked_weights(opened: Opener) -> None:
    weights = random_weights(1, 2, 11, 11, seed=4, causal=True)
    tab = opened(page([make_record(weights, k=11, causal=True)], [f"w{n}" for n in range(11)]), at="#0.0")
    tab.locator(".column.query li").nth(3).hover()
    shown = figures(tab, "key")
    assert_shows(shown[:4], weights[0, 0, 3, :4])
    assert shown[4:] == ["–"] * 7
    assert "masked" in tab.locator("#legend").text_content()
    assert "not recorded" not in tab.locator("#legend").text_content()


def test_cross_attention_and_cached_steps_use_their_texts(opened: Opener) -> None:
    own, cross = random_weights(1, 2, 3, 5, seed=6, causal=True), random_weights(1, 2, 5, 7, seed=7)
    source = [f"s{n}" for n in range(7)]
    tab = opened(
        page([make_record(own, causal=True), make_record(cross, kind="cross")], list("abcde"), key_tokens=source),
        at="#1.1",
    )
    assert tab.locator("#head-title").text_content() == "Cross layer 0 · Head 1"
    tab.locator(".column.query li").nth(4).hover()
    assert_shows(figures(tab, "key"), cross[0, 1, 4])
    assert tab.locator(".column.key .token").all_text_contents() == source
    tab.locator(".thumb").nth(0).click()
    assert tab.locator(".column.query .token").all_text_contents() == list("cde")
    tab.locator(".column.query li").nth(1).hover()
    assert_shows(figures(tab, "key")[:4], own[0, 0, 1, :4])


def test_rows_of_cross_attention_are_named_by_produced_tokens(opened: Opener) -> None:
    own, cross = random_weights(1, 2, 5, 5, seed=6, causal=True), random_weights(1, 2, 5, 7, seed=7)
    document = page(
        [make_record(own, causal=True), make_record(cross, kind="cross")], list("^abcd"),
        key_tokens=[f"s{n}" for n in range(7)], produced=list("abcd$"),
    )  # fmt: skip
    tab = opened(document, at="#1.0")
    assert tab.locator(".column.query .token").all_text_contents() == list("abcd$")
    tab.locator(".column.query li").nth(2).hover()
    assert_shows(figures(tab, "key"), cross[0, 0, 2])
    notes = " ".join(tab.locator("#texts").all_text_contents() or tab.locator("body").all_text_contents())
    assert "Shaded by the weights of “c” in Cross layer 0, head 0, produced after “b”." in notes.replace(
        "cross layer", "Cross layer"
    )
    box = tab.locator("#matrix canvas").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.7)
    assert "produced after" in tab.locator("#matrix .tip").text_content()
    tab.locator(".thumb").nth(0).click()
    assert tab.locator(".column.query .token").all_text_contents() == list("^abcd")


def test_thumbnails_patterns_views_and_theme(opened: Opener) -> None:
    tab = opened(page([make_record(weights, n) for n, weights in enumerate(FULL)], TOKENS), scheme="dark")
    picture = "document.querySelector('.thumb canvas').toDataURL()"
    pictures = {tab.evaluate(picture)}
    for name in ("Received", "Spread"):
        tab.get_by_role("radio", name=name).click()
        tab.wait_for_selector(f"#grid[data-drawn={'received' if name == 'Received' else 'entropy'}]")
        pictures.add(tab.evaluate(picture))
    assert len(pictures) == 3
    chip = tab.locator(".chip").first
    chip.click()
    assert chip.get_attribute("aria-pressed") == "true"
    background = "getComputedStyle(document.body).backgroundColor"
    dark = tab.evaluate(background)
    tab.locator("#theme").click()
    assert tab.evaluate(background) != dark
    for name, hidden in (("Lines", "#matrix"), ("Matrix", "#lines")):
        tab.get_by_role("radio", name=name).click()
        assert not tab.locator(hidden).is_visible()
    assert tab.locator("#matrix .sheet canvas").bounding_box()["width"] > 100


def test_page_fits_a_phone(opened: Opener) -> None:
    records = [make_record(random_weights(1, 12, 12, 12, seed=9), n) for n in range(2)]
    tab = opened(page(records, TOKENS), width=390, has_touch=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.locator(".column.query li").nth(2).tap()
    assert tab.locator(".column.query li.chosen").count() == 1
    assert "attends to" in tab.locator("#reading").text_content()


def test_interactive_elements_have_accessible_names(opened: Opener) -> None:
    tab = opened(page([make_record(FULL[0])], TOKENS))
    script = """[...document.querySelectorAll('button, [role], [tabindex="0"]')]
        .filter((e) => !['presentation', 'row', 'status'].includes(e.getAttribute('role')) && e.id !== 'detail')
        .filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim())).map((e) => e.outerHTML)"""
    assert tab.evaluate(script) == []


def test_saved_svg_is_self_contained(opened: Opener, tmp_path: Path) -> None:
    tab = opened(page([make_record(FULL[0])], TOKENS, title="a <model>"))
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save picture", exact=True).click()
    download.value.save_as(tmp_path / "picture.svg")
    root = ET.parse(tmp_path / "picture.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert HOSTILE in texts
    assert any(text and text.startswith("a <model> · ") for text in texts)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 3
