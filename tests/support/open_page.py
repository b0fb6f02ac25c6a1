"""Open a page in headless Chromium, and fail on any error, request or empty grid. CI runs it on the page of the demo."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def problems(page_file: Path) -> list[str]:
    """Return the errors that occur when the page is opened."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        return ["chromium is not installed"]
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith(("file:", "data:")) else errors.append(f"request {r.url}")
        )
        page.goto(page_file.resolve().as_uri())
        page.wait_for_timeout(500)
        if not page.locator("canvas").count():
            errors.append("the page has no canvas")
        browser.close()
    return errors


if __name__ == "__main__":
    errors = problems(Path(sys.argv[1]))
    print("\n".join(errors) if errors else f"{sys.argv[1]} opens without errors")
    raise SystemExit(bool(errors))
