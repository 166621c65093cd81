"""A headless Chromium with the page open in it.

Tests are skipped where there is none, unless MBD_REQUIRE_CHROMIUM is set: then they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from page_server import PageServer

if os.environ.get("MBD_REQUIRE_CHROMIUM"):
    import playwright.sync_api  # noqa: F401 - missing, it fails here instead of being skipped
if TYPE_CHECKING:  # where it is not installed, the test modules are skipped
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Of module scope: Playwright keeps an event loop in this thread, in which other tests could run none.
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-headless-shell", "google-chrome", "chrome")
    found = os.environ.get("MBD_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        if not found and not Path(own).is_file():
            reason = "the page's tests need Chromium: `apt-get install chromium`, or set MBD_CHROMIUM"
            if os.environ.get("MBD_REQUIRE_CHROMIUM"):
                pytest.fail(reason)
            pytest.skip(reason)
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def scripted() -> Iterator[PageServer]:
    with PageServer() as started:
        yield started


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[[str], Page]]:
    """Opens the page of a server; it may leave no error in its console, and ask no other server."""
    context = browser.new_context(color_scheme="light", viewport={"width": 1000, "height": 800})
    context.set_default_timeout(15_000)
    errors: list[str] = []
    requested: list[str] = []
    allowed: list[str] = []

    def opened(url: str) -> Page:
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requested.append(request.url))
        allowed.append("/".join(url.split("/")[:3]) + "/")
        page.goto(url)
        return page

    yield opened
    context.close()
    refused = "Failed to load resource"  # the browser's own note of an answer that is an error
    assert [error for error in errors if not error.startswith(refused)] == []
    assert [url for url in requested if not url.startswith(tuple(allowed))] == []


@pytest.fixture
def page(open_page: Callable[[str], Page], scripted: PageServer) -> Page:
    """The page of the scripted server."""
    from playwright.sync_api import expect

    page = open_page(scripted.url)
    expect(page.locator("select").first).to_have_value("storyteller")
    return page
