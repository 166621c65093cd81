"""Streamed tokens on the page: their text, colours and explanations."""

from __future__ import annotations

import json
import math
import random
import threading
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")

from page_actions import finished, generate
from page_server import DONE, PageServer, chunk, usage
from playwright.sync_api import Page, expect

NUM_LEVELS = 7
LN_HALF = math.log(0.5)


def test_tokens_appear_as_they_are_streamed(scripted: PageServer, page: Page) -> None:
    more = threading.Event()
    scripted.complete = lambda body: iter(
        [chunk("One", ("One", -0.1)), more, chunk(" two", (" two", -0.2), finish="stop"), usage(2), DONE]
    )
    generate(page)
    output = page.locator(".output").first
    expect(output).to_have_text("One")
    expect(output).to_have_attribute("aria-busy", "true")
    more.set()
    expect(output).to_have_text("One two")
    finished(page)
    expect(output).to_have_attribute("aria-busy", "false")
    assert page.locator('[data-stat="first"]').first.inner_text().endswith(" ms")
    assert page.locator('[data-stat="tokens"]').first.inner_text() == "2"
    assert page.locator('[data-stat="speed"]').first.inner_text().endswith(" tokens/s")


def test_pointing_at_a_token_shows_its_probability_and_what_else_it_might_have_been(
    scripted: PageServer, page: Page
) -> None:
    alternatives = {" cat": math.log(0.25), " dog": LN_HALF, "\n": math.log(0.125), " cow": math.log(1e-9)}
    scripted.complete = lambda body: iter(
        [chunk("A cat", ("A", -0.001), (" cat", math.log(0.25), alternatives), finish="length"), DONE]
    )
    generate(page)
    finished(page, "Finished: the most tokens allowed.")
    page.locator(".output span").nth(1).hover()
    tooltip = page.get_by_role("tooltip")
    rows = [row.inner_text().split() for row in tooltip.locator(".alternative").all()]
    assert rows == [
        ["␣cat", "25.0", "%"],
        ["␣dog", "50.0", "%"],
        ["↵", "12.5", "%"],
        ["␣cow", "<", "0.01", "%"],
    ]
    tooltip.hover()  # it stays, to be read
    expect(tooltip).to_be_visible()
    page.mouse.move(1, 1)
    expect(tooltip).to_be_hidden()


def test_probability_chooses_the_colour(scripted: PageServer, page: Page) -> None:
    chances = [0.9, 0.6, 0.3, 0.2, 0.05, 0.02, 0.001]
    tokens = [(f" {i}", math.log(chance)) for i, chance in enumerate(chances)]
    scripted.complete = lambda body: iter(
        [chunk("".join(t for t, _ in tokens), *tokens, finish="stop"), DONE]
    )
    generate(page)
    finished(page)
    spans = page.locator(".output span").all()
    assert [span.get_attribute("class") for span in spans] == [f"p{i}" for i in range(NUM_LEVELS)]
    colours = [span.evaluate("node => getComputedStyle(node).backgroundColor") for span in spans]
    assert len(set(colours)) == NUM_LEVELS
    legend = page.locator("#legend li").all()
    assert [item.evaluate("node => getComputedStyle(node).backgroundColor") for item in legend] == colours


def test_tokens_are_reached_and_explained_by_keyboard(scripted: PageServer, page: Page) -> None:
    words = [f"word{i} " for i in range(60)]
    scripted.complete = lambda body: iter(
        [*(chunk(word, (word, -0.5)) for word in words), chunk("", finish="stop"), DONE]
    )
    generate(page)
    finished(page)
    page.locator("select").first.focus()
    page.keyboard.press("Tab")
    focused = page.locator(":focus")
    tooltip = page.get_by_role("tooltip")
    steps = [
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", 59),
        ("ArrowRight", 59),
        ("Home", 0),
        ("ArrowLeft", 0),
    ]
    for key, index in steps:
        page.keyboard.press(key)
        expect(focused).to_have_text(words[index])
        assert focused.get_attribute("aria-describedby") == tooltip.get_attribute("id")
        expect(tooltip).to_contain_text(f"word{index}␣60.7 %", use_inner_text=False)
    before = focused.bounding_box()
    page.keyboard.press("ArrowDown")
    below = focused.bounding_box()
    assert before is not None
    assert below is not None
    assert below["y"] > before["y"]
    assert below["x"] == before["x"]
    page.keyboard.press("ArrowUp")
    expect(focused).to_have_text(words[0])
    page.keyboard.press("Escape")
    expect(tooltip).to_be_hidden()
    assert page.locator('.output [tabindex="0"]').count() == 1  # one stop of Tab, not sixty


@pytest.mark.parametrize(
    "tokens",  # what each is alone, and the text that comes with it
    [
        [("\ufffd", ""), ("\ufffd", "😀")],
        [(r"bytes:\xf0\x9f", ""), (r"bytes:\x98", ""), (r"bytes:\x80", "😀")],
        [
            ("\ufffd", ""),
            ("\ufffd", "👩"),
            ("\u200d", "\u200d"),
            ("👩", "👩"),
            ("\u200d", "\u200d"),
            ("👧", "👧"),
        ],
        [("e", "e"), ("\u0301", "\u0301")],
        [("🇮", "🇮"), ("🇸", "🇸")],
        [("👍", "👍"), ("🏽", "🏽")],
    ],
)
def test_a_character_made_of_several_tokens_is_one_piece(
    scripted: PageServer, page: Page, tokens: list[tuple[str, str]]
) -> None:
    scripted.complete = lambda body: iter(
        [
            *(chunk(text, (token, LN_HALF)) for token, text in tokens),
            chunk(" end", (" end", -0.1), finish="stop"),
            DONE,
        ]
    )
    generate(page)
    finished(page)
    spans = page.locator(".output span")
    assert spans.all_text_contents() == ["".join(text for _, text in tokens), " end"]
    spans.first.hover()
    expect(page.get_by_role("tooltip")).to_contain_text(f"{len(tokens)} tokens make up this piece")


def test_halves_of_a_surrogate_pair_in_two_chunks_become_one_character(
    scripted: PageServer, page: Page
) -> None:
    scripted.complete = lambda body: iter([chunk("\ud83d"), chunk("\ude00"), DONE])
    generate(page)
    finished(page)
    assert page.locator(".output").first.text_content() == "😀"


def test_text_and_tokens_are_laid_along_each_other_however_they_are_cut(page: Page) -> None:
    source = random.Random(6)
    alphabet = ["a", "the", " ", "\n", "é", "ß", "日本", "😀", "🇮🇸", "e\u0301", "👩\u200d👧", "<b>"]
    cases = []
    for _ in range(150):
        data = "".join(source.choices(alphabet, k=source.randint(1, 12))).encode()
        cases.append({"text": data.decode(), "chunks": chunks_of(data, source)})
    results = page.evaluate(
        """async (cases) => {
          const { TokenView } = await import("/page/tokens.js");
          return cases.map(({ chunks }) => {
            const shown = [];
            const tooltip = { show: (_, tokens) => shown.push(...tokens), hide() {}, contains: () => false };
            const element = document.createElement("div");
            const view = new TokenView(element, tooltip);
            for (const { text, tokens } of chunks) view.push(text, tokens);
            view.finish();
            for (const piece of element.querySelectorAll("span"))
              piece.dispatchEvent(new Event("pointerover", { bubbles: true }));
            return { text: element.textContent, tokens: shown.map(({ id }) => id) };
          });
        }""",
        cases,
    )
    for case, result in zip(cases, results, strict=True):
        tokens = [token["id"] for part in case["chunks"] for token in part["tokens"]]
        assert result == {"text": case["text"], "tokens": tokens}, json.dumps(case)


def chunks_of(data: bytes, source: random.Random) -> list[dict[str, Any]]:
    """Cuts text into tokens anywhere, and sends them some at a time, with text held back at random."""
    cuts = (
        sorted(source.sample(range(1, len(data)), source.randint(0, len(data) - 1))) if len(data) > 1 else []
    )
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    chunks: list[dict[str, Any]] = []
    start = shown = 0
    done = b""
    while start < len(pieces):
        stop = min(len(pieces), start + source.randint(1, 3))
        done += b"".join(pieces[start:stop])
        complete = len(done.decode("utf-8", "ignore"))
        held = 0 if stop == len(pieces) else source.choice([0, 0, 0, 1, 2])  # a stop string may be open
        until = max(shown, complete - held)
        tokens = [
            {"text": spelling(piece), "logprob": -1.0, "id": start + i}
            for i, piece in enumerate(pieces[start:stop])
        ]
        chunks.append({"text": data.decode()[shown:until], "tokens": tokens})
        start, shown = stop, until
    return chunks


def spelling(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def test_tokens_without_text_are_marks(scripted: PageServer, page: Page) -> None:
    scripted.complete = lambda body: iter(
        [
            chunk("", ("token_id:99", -0.2)),
            chunk("Bye.", ("Bye.", -0.1)),
            chunk("", ("[SEP]", LN_HALF), finish="stop"),
            DONE,
        ]
    )
    generate(page)
    finished(page)
    spans = page.locator(".output span")
    assert spans.all_text_contents() == ["", "Bye.", ""]
    for index, name in ((0, "token_id:99"), (1, "Bye."), (2, "[SEP]")):
        spans.nth(index).hover()
        expect(page.get_by_role("tooltip")).to_contain_text(name)


def test_lines_are_copied_as_they_are(scripted: PageServer, page: Page) -> None:
    lines = ["One", "\n", "two", "\n\n", "\n", "three"]
    scripted.complete = lambda body: iter([*(chunk(each, (each, -1.0)) for each in lines), DONE])
    generate(page)
    finished(page)
    copied = page.evaluate(
        """() => {
          const output = document.querySelector(".output");
          getSelection().selectAllChildren(output);
          const clipboardData = new DataTransfer();
          output.firstChild.dispatchEvent(new ClipboardEvent("copy", { bubbles: true, clipboardData }));
          return clipboardData.getData("text/plain");
        }"""
    )
    assert copied == "".join(lines)
    heights = [box["y"] for span in page.locator(".output span").all() if (box := span.bounding_box())]
    line = heights[2] - heights[0]
    assert heights[5] - heights[0] == 4 * line


def test_a_long_output_is_only_ever_appended_to(scripted: PageServer, page: Page) -> None:
    num_tokens = 5000
    words = [f" {i}" if i % 50 else "\n" for i in range(num_tokens)]
    scripted.complete = lambda body: iter(
        [*(chunk(word, (word, -1.0)) for word in words), chunk("", finish="length"), usage(num_tokens), DONE]
    )
    page.evaluate(
        """() => {
          window.seen = { added: 0, removed: 0, changed: 0 };
          const output = document.querySelector(".output");
          new MutationObserver((records) => {
            for (const { type, addedNodes, removedNodes, target } of records) {
              seen.added += [...addedNodes].filter(({ nodeName }) => nodeName === "SPAN").length;
              seen.removed += removedNodes.length;
              if (type !== "childList" && target !== output) seen.changed += 1;
            }
          }).observe(output, { childList: true, subtree: true, characterData: true, attributes: true,
                               attributeFilter: ["class", "style"] });
        }"""
    )
    generate(page)
    finished(page, "Finished: the most tokens allowed.")
    output = page.locator(".output").first
    assert output.text_content() == "".join(words)
    assert page.evaluate("seen") == {"added": num_tokens, "removed": 0, "changed": 0}
    assert output.locator("div").count() == "".join(words).count("\n") + 1  # laid out line by line
    at_end = output.evaluate("node => node.scrollTop + node.clientHeight >= node.scrollHeight - 1")
    assert at_end  # the newest text is in view


def test_a_reader_who_scrolled_up_is_left_there(scripted: PageServer, page: Page) -> None:
    more = threading.Event()
    lines = [chunk(f"line {i}\n", (f"line {i}\n", -1.0)) for i in range(200)]
    scripted.complete = lambda body: iter([*lines[:100], more, *lines[100:], DONE])
    generate(page)
    output = page.locator(".output").first
    expect(output).to_contain_text("line 99")
    output.hover()
    page.mouse.wheel(0, -300)
    page.wait_for_function(
        "(node => node.scrollTop < node.scrollHeight - node.clientHeight - 200)"
        "(document.querySelector('.output'))"
    )
    top = output.evaluate("node => node.scrollTop")
    more.set()
    finished(page)
    assert output.evaluate("node => node.scrollTop") == top
