"""The page in light and dark and on small screens."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")

from page_actions import finished, generate
from page_server import DONE, END_WITHOUT_DONE, PageServer, chunk
from playwright.sync_api import Page, expect

READABLE_CONTRAST = 4.5  # WCAG 2, level AA, for text of ordinary size


def test_the_theme_follows_the_system_until_it_is_chosen(page: Page, scripted: PageServer) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    assert light != dark
    page.get_by_role("button", name="Light").click()
    assert page.evaluate(background) == light
    page.reload()
    assert page.evaluate(background) == light
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate(background) == dark


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_stands_out_from_its_background(scripted: PageServer, page: Page, theme: str) -> None:
    tokens = [(f" {i}", math.log(chance)) for i, chance in enumerate([0.9, 0.6, 0.3, 0.2, 0.05, 0.02, 0.001])]
    text = "".join(token for token, _ in tokens)
    scripted.complete = lambda body: iter([chunk(text, *tokens), END_WITHOUT_DONE])
    page.emulate_media(color_scheme=theme)
    generate(page)
    expect(page.locator(".error").filter(has_text="lost")).to_be_visible()
    page.locator(".output span").nth(3).hover()
    found = page.evaluate(
        """() => {
          const opaque = (colour) => !/, 0\\)$/.test(colour);
          const backgroundOf = (node) => {
            for (; node; node = node.parentElement) {
              const { backgroundColor } = getComputedStyle(node);
              if (opaque(backgroundColor)) return backgroundColor;
            }
          };
          const found = [];
          const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          while (walker.nextNode()) {
            const { parentElement, data } = walker.currentNode;
            const text = data.trim();
            if (!text || !parentElement.checkVisibility() || parentElement.matches(":disabled")) continue;
            const { color } = getComputedStyle(parentElement);
            found.push({ text, ink: color, paper: backgroundOf(parentElement) });
          }
          return found;
        }"""
    )
    assert len(found) > 30
    poor = [entry for entry in found if contrast(entry["ink"], entry["paper"]) < READABLE_CONTRAST]
    assert poor == []


def contrast(first: str, second: str) -> float:
    """WCAG 2's contrast ratio of two CSS colours."""
    bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour: str) -> float:
    assert colour.startswith("rgb("), colour
    channels = [int(part) / 255 for part in colour[4:-1].split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_nothing_is_wider_than_a_small_screen(scripted: PageServer, page: Page) -> None:
    word = "x" * 200
    scripted.complete = lambda body: iter(
        [chunk(word + " end", (word, -0.5), (" end", -9.0), finish="stop"), DONE]
    )
    page.set_viewport_size({"width": 360, "height": 640})
    page.get_by_label("Compare two models").check()
    generate(page)
    finished(page, column=0)
    finished(page, column=1)
    page.get_by_text("API key").first.click()
    page.locator(".output span").nth(1).hover()
    expect(page.get_by_role("tooltip")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".output").first.evaluate("node => node.scrollWidth <= node.clientWidth")
    box = page.get_by_role("tooltip").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    tops = [
        output.evaluate("node => node.getBoundingClientRect().left")
        for output in page.locator(".output").all()
    ]
    assert tops[0] == tops[1]  # below each other
