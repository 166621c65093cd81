"""What the page asks of the server, and how it tells what goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")

from page_actions import finished, generate
from page_server import DONE, DROP, END_WITHOUT_DONE, UNTIL_CLIENT_LEAVES, Answer, PageServer, chunk, refusal
from playwright.sync_api import Page, expect

ATTACK = "<img src=x onerror=window.attacked=1><script>window.attacked=1</script>"

# Requests


def test_only_the_settings_filled_in_are_sent(scripted: PageServer, page: Page) -> None:
    generate(page, "Hello")
    finished(page)
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Top-p").fill("0.95")
    page.get_by_label("Top-k").fill("40")
    page.get_by_label("Min-p").fill("0.05")
    page.get_by_label("Max tokens").fill("")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Stop at").fill("END\n\\n\\n\n The")
    generate(page, "Hello")
    finished(page)
    common = {
        "model": "storyteller",
        "prompt": "Hello",
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": 5,
    }
    first, second = scripted.bodies("/v1/completions")
    assert first == {**common, "temperature": 0.8, "max_tokens": 200}
    assert second == {
        **common,
        "temperature": 0,
        "top_p": 0.95,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 7,
        "stop": ["END", "\n\n", " The"],
    }


def test_a_setting_out_of_range_is_not_sent(scripted: PageServer, page: Page) -> None:
    page.get_by_label("Top-p").fill("2")
    generate(page)
    assert page.get_by_label("Top-p").evaluate("node => node.matches(':invalid')")
    assert scripted.bodies("/v1/completions") == []


def test_the_length_of_the_prompt_is_told_in_tokens(scripted: PageServer, page: Page) -> None:
    page.get_by_label("Prompt").fill("Once upon a time")
    expect(page.locator("#prompt-tokens")).to_have_text("4 of 1024 tokens.")
    page.get_by_label("Prompt").fill("")
    expect(page.locator("#prompt-tokens")).to_have_text("")


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stopping_closes_the_connection_and_keeps_the_text(
    scripted: PageServer, page: Page, how: str
) -> None:
    scripted.complete = lambda body: iter([chunk("One", ("One", -0.1)), UNTIL_CLIENT_LEAVES])
    generate(page)
    expect(page.locator(".output").first).to_have_text("One")
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    finished(page, "Stopped.")
    assert scripted.client_left.wait(15)
    expect(page.locator(".output").first).to_have_text("One")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def test_generating_anew_gives_up_the_run_before(scripted: PageServer, page: Page) -> None:
    scripts = iter(
        [
            [chunk("old", ("old", -0.1)), UNTIL_CLIENT_LEAVES],
            [chunk("new", ("new", -0.1), finish="stop"), DONE],
        ]
    )
    scripted.complete = lambda body: iter(next(scripts))
    generate(page)
    expect(page.locator(".output").first).to_have_text("old")
    generate(page)
    finished(page)
    assert scripted.client_left.wait(15)
    expect(page.locator(".output").first).to_have_text("new")


def test_two_models_stream_side_by_side_at_once(scripted: PageServer, page: Page) -> None:
    scripted.models = [{"id": "storyteller", "task": "generate"}, {"id": "exact", "task": "generate"}]
    page.reload()
    started = {"storyteller": threading.Event(), "exact": threading.Event()}
    other = {"storyteller": "exact", "exact": "storyteller"}

    def stream(body: dict[str, Any]) -> Iterator[Any]:
        model = body["model"]
        yield chunk(model, (model, -0.1))
        started[model].set()
        yield started[other[model]]  # neither ends before both have begun
        yield chunk(" done", (" done", -0.1), finish="stop")
        yield DONE

    scripted.complete = stream
    page.get_by_label("Compare two models").check()
    expect(page.locator("select").nth(1)).to_have_value("exact")
    page.get_by_label("Seed").fill("3")
    generate(page, "The same")
    finished(page, column=0)
    finished(page, column=1)
    assert page.locator(".output").all_text_contents() == ["storyteller done", "exact done"]
    bodies = scripted.bodies("/v1/completions")
    assert {body["model"] for body in bodies} == {"storyteller", "exact"}
    assert [(body["prompt"], body["seed"]) for body in bodies] == [("The same", 3)] * 2
    boxes = [output.bounding_box() for output in page.locator(".output").all()]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"]


def test_a_classifier_shows_its_labels_as_bars(scripted: PageServer, page: Page) -> None:
    scripted.models = [{"id": "moods", "task": "classify"}]
    probabilities = {"sad": 0.25, "glad": 0.7, "neither": 0.05}
    scripted.classify = lambda body: Answer(
        {
            "data": [
                {"index": 0, "label": "glad", "labels": [*probabilities], "probs": [*probabilities.values()]}
            ]
        }
    )
    page.reload()
    expect(page.get_by_label("Temperature")).to_be_hidden()
    page.get_by_label("Prompt").fill("What a day!")
    page.get_by_role("button", name="Classify").click()
    finished(page)
    rows = [row.inner_text().split() for row in page.get_by_role("row").all()]
    assert rows == [["glad", "70.0", "%"], ["sad", "25.0", "%"], ["neither", "5.0", "%"]]
    widths = [
        bar.evaluate("node => parseFloat(getComputedStyle(node, '::before').width) / node.clientWidth")
        for bar in page.locator("td .bar").all()
    ]
    assert widths == pytest.approx([0.7, 0.25, 0.05], abs=0.01)
    assert scripted.bodies("/v1/classify") == [{"model": "moods", "input": "What a day!"}]


def test_models_appear_as_soon_as_they_are_loaded(scripted: PageServer, page: Page) -> None:
    loading = {"id": "large", "task": None, "ready": False}
    scripted.models = [loading, {"id": "small", "task": "generate", "ready": True}]
    page.reload()
    expect(page.locator("#notice")).to_have_text("The server is still loading models.")
    expect(page.locator("select").first).to_have_value("small")
    scripted.models = [{**loading, "task": "embed", "ready": True}, scripted.models[1]]
    expect(page.locator("#notice")).to_have_text("")
    assert page.locator("select").first.locator("option").all_text_contents() == ["small"]


# Errors


def test_a_busy_server_says_when_to_try_again(scripted: PageServer, page: Page) -> None:
    scripted.complete = lambda body: refusal(429, "The queue is full", Retry_After="7")
    generate(page)
    expect(page.get_by_role("alert").filter(has_text="queue")).to_have_text(
        "The queue is full (429). Try again in 7 s."
    )
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def test_the_field_that_the_server_objects_to_is_marked_until_the_next_try(
    scripted: PageServer, page: Page
) -> None:
    scripted.complete = lambda body: refusal(400, "top_k must be less", param="top_k")
    generate(page)
    expect(page.get_by_label("Top-k")).to_have_attribute("aria-invalid", "true")
    scripted.complete = lambda body: iter([DONE])
    generate(page)
    finished(page)
    assert page.get_by_label("Top-k").get_attribute("aria-invalid") is None


@pytest.mark.parametrize("how", [DROP, END_WITHOUT_DONE])
def test_a_lost_connection_is_told_and_the_text_so_far_is_kept(
    scripted: PageServer, page: Page, how: object
) -> None:
    is_shown = threading.Event()  # browsers forget what they have not handed on when a connection breaks
    scripted.complete = lambda body: iter([chunk("One", ("One", -0.1)), is_shown, how])
    generate(page)
    expect(page.locator(".output").first).to_have_text("One")
    is_shown.set()
    expect(page.get_by_role("alert").filter(has_text="lost")).to_have_text(
        "The connection was lost before the completion was finished."
    )
    expect(page.locator(".output").first).to_have_text("One")


def test_an_error_within_the_stream_is_told(scripted: PageServer, page: Page) -> None:
    scripted.complete = lambda body: iter(
        [chunk("One", ("One", -0.1)), {"error": {"message": "The engine failed.", "param": None}}]
    )
    generate(page)
    expect(page.get_by_role("alert").filter(has_text="engine")).to_have_text("The engine failed.")
    expect(page.locator(".output").first).to_have_text("One")


def test_a_server_that_is_gone_is_told(scripted: PageServer, page: Page) -> None:
    scripted.stop()
    generate(page)
    expect(page.get_by_role("alert").filter(has_text="reached")).to_have_text(
        "The server cannot be reached. Is it still running?"
    )


def test_an_error_page_of_a_proxy_is_told_by_its_status(scripted: PageServer, page: Page) -> None:
    scripted.complete = lambda body: Answer(b"<h1>Bad gateway</h1>", 502)
    generate(page)
    expect(page.get_by_role("alert").filter(has_text="502")).to_have_text("Bad Gateway (502).")


def test_the_key_is_asked_for_sent_and_kept_for_the_session_only(scripted: PageServer, page: Page) -> None:
    scripted.api_key = "secret-key"
    page.reload()
    field = page.locator("#key")
    expect(field).to_be_focused()
    field.fill("secret-key")
    field.press("Enter")
    page.get_by_label("Prompt").focus()
    expect(page.locator("select").first).to_have_value("storyteller")
    expect(page.locator("#notice")).to_have_text("")
    generate(page)
    finished(page)
    stored = page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie, location.href]")
    assert stored == [{"api-key": "secret-key"}, {}, "", scripted.url]
    page.reload()
    expect(page.locator("select").first).to_have_value("storyteller")
    field.evaluate("node => node.closest('details').open = true")
    field.fill("not a key ☃")
    page.get_by_label("Prompt").focus()
    expect(page.locator("#notice")).to_contain_text("a character that no key can have")


def test_nothing_that_comes_from_outside_becomes_html(scripted: PageServer, page: Page) -> None:
    scripted.models = [{"id": ATTACK, "task": "generate"}, {"id": "classifier", "task": "classify"}]
    scripted.classify = lambda body: Answer(
        {"data": [{"index": 0, "label": ATTACK, "labels": [ATTACK, "b"], "probs": [0.9, 0.1]}]}
    )
    scripted.complete = lambda body: iter(
        [chunk(ATTACK, (ATTACK, -0.5, {ATTACK: -0.5, ATTACK + "2": -1.0}), finish=ATTACK), DONE]
    )
    page.reload()
    page.get_by_label("Compare two models").check()
    generate(page, ATTACK)
    expect(page.locator(".output").nth(0)).to_have_text(ATTACK)
    expect(page.locator(".output").nth(1)).to_contain_text(ATTACK)
    page.locator(".output span").first.hover()
    expect(page.get_by_role("tooltip")).to_contain_text("onerror")
    scripted.complete = lambda body: refusal(400, ATTACK, param=ATTACK)
    generate(page, ATTACK)
    expect(page.locator(".error").filter(has_text="onerror")).to_have_count(1)
    assert page.locator("img").count() == 0
    assert page.evaluate("window.attacked") is None
