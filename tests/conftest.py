"""What all tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The kernels of the GPU run on the CPU: Triton asks when it is imported, which whatever is compiled does, too.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from regard.backends.cpu import extension

Opener = Callable[..., Any]  # opens a document in a browser, and gives its tab

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# The problems are small: threads that wait for one another cost more than they do, above all where tests run side by side.
torch.set_num_threads(1)


@pytest.fixture
def several_threads() -> Iterator[None]:
    """Let operators run in several threads, for tests of just that."""
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=extension.instructions())
def instructions(request: Any) -> Iterator[str]:
    """Each instruction set of this machine, in turn."""
    extension.ops.use(request.param)
    assert extension.instructions()[0] == request.param
    yield request.param
    extension.ops.use("")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not path:
        if os.environ.get("REGARD_NO_BROWSER") == "1":
            pytest.skip("REGARD_NO_BROWSER=1: the page is not tried in a browser")
        pytest.fail("no chromium on the path: install it, name it in CHROMIUM, or set REGARD_NO_BROWSER=1 to skip")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Opener]:
    """Opens a document as a file; by the end nothing may have complained, asked for anything or raised a dialog."""
    complaints: list[str] = []
    contexts = []

    def refused(dialog: Any) -> None:
        complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def asked(url: str, own: str) -> None:
        if url != own and not url.startswith(("data:", "blob:")):
            complaints.append(f"request: {url}")

    def open_page(document: str, width: int = 1400, scheme: str = "light", at: str = "", **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(8000)
        path = tmp_path / f"{len(contexts)}.html"
        path.write_text(document, encoding="utf-8")
        address = path.as_uri()
        tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        tab.on("dialog", refused)
        tab.on("request", lambda request: asked(request.url.split("#")[0], address))
        tab.goto(address + at)
        tab.wait_for_selector("#grid[data-drawn]")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
