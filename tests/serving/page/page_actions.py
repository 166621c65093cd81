"""What the tests of the page do again and again."""

from __future__ import annotations

from playwright.sync_api import Page, expect


def generate(page: Page, prompt: str = "Once upon a time") -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.keyboard.press("Control+Enter")


def finished(page: Page, status: str = "Finished.", column: int = 0) -> None:
    expect(page.locator(".status").nth(column)).to_have_text(status)
