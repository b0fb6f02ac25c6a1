"""Pages of two inputs: two models on one text, one model on two texts."""

from __future__ import annotations

from support.browser import Opener
from support.page import block, figures
from support.records import make_record, make_tokens, random_weights

from regard.view.data import PageInput
from regard.view.page import page


def test_two_models_share_one_text(opened: Opener) -> None:
    first, second = ([make_record(random_weights(1, 2, 9, 9, seed=10 * m + n), n) for n in range(2)] for m in (1, 2))
    document = page(first, make_tokens(9), title="base", other=PageInput("tuned", second, make_tokens(9)))
    assert len(block(document)["texts"]) == 1, "both share one text"
    tab = opened(document, at="#1.1")
    assert tab.locator("#grid h3").all_text_contents() == ["base", "tuned"]
    assert tab.locator("#head-title").text_content() == "Base: layer 1 · Head 1"
    tab.get_by_role("button", name="Compare").click()
    tab.locator(".thumb").nth(4 + 3).click()
    box = tab.locator("#matrix canvas").bounding_box()
    tab.mouse.move(box["x"] + box["width"] - 4, box["y"] + box["height"] - 4)
    for place, seed in (("#beside", 11), ("#matrix", 21)):
        weight = float(random_weights(1, 2, 9, 9, seed=seed)[0, 1, 8, 8])
        assert tab.locator(f"{place} .tip").text_content().endswith(f"{weight:.3f}")
    names = tab.locator(".matrix .name").all_text_contents()
    assert [name.split(",")[0] for name in names] == ["base: layer 1", "tuned: layer 1"]


def test_one_model_has_two_texts(opened: Opener) -> None:
    other = PageInput("with a comma", [make_record(random_weights(1, 2, 7, 7, seed=5))], [f"b{n}" for n in range(7)])
    tab = opened(
        page([make_record(random_weights(1, 2, 9, 9, seed=4))], make_tokens(9), title="plain", other=other), at="#1.1"
    )
    assert tab.locator(".flow-name").all_text_contents() == ["plain", "with a comma"]
    assert tab.locator(".column.query .token").all_text_contents() == [f"b{n}" for n in range(7)]
    tab.locator(".column.query li").nth(3).hover()
    shown = figures(tab, "key")
    assert all(
        abs(float(a) - b) < 6e-4
        for a, b in zip(shown, random_weights(1, 2, 7, 7, seed=5)[0, 1, 3].tolist(), strict=True)
    )
    assert "Not used by" in tab.locator(".flow-note").first.text_content()
