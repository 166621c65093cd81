"""Takes the pictures of the page in docs/serving.md: `python docs/images/screenshots.py [URL]`.

The server at URL must serve two models, the same in two formats, say:
`mbd serve storyteller=storyteller:float32 storyteller-int4=storyteller:int4`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright

FOLDER = Path(__file__).parent
PROMPT = "Once upon a time there was a king who had three daughters, and the youngest"


def take(browser: Browser, url: str, theme: str) -> None:
    """Two completions beside each other, one token explained."""
    page = browser.new_page(
        color_scheme=theme, viewport={"width": 1120, "height": 860}, device_scale_factor=1.5
    )
    page.goto(url)
    page.get_by_label("Compare two models").check()
    page.get_by_label("Seed").fill("4")
    page.get_by_label("Max tokens").fill("120")
    page.get_by_label("Prompt").fill(PROMPT)
    page.keyboard.press("Control+Enter")
    for status in page.locator(".status").all():
        expect(status).to_contain_text("Finished", timeout=60_000)
    page.locator(".output").first.locator(".p3").nth(2).hover()
    page.screenshot(path=FOLDER / f"page-{theme}.png")
    page.close()


def main() -> None:
    """Light, then dark."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/"
    found = shutil.which("chromium") or shutil.which("chromium-headless-shell")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for theme in ("light", "dark"):
            take(browser, url, theme)
        browser.close()


if __name__ == "__main__":
    main()
