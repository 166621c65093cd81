"""The page of the real server: what it shows is what the engine says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")

from page_actions import finished, generate
from playwright.sync_api import Page, expect
from servers import RunningServer, running

from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.serving.settings import ModelSource

OpenPage = Callable[[str], Page]
PROMPT = "Once upon a time there was a king"


def test_the_page_shows_the_text_and_the_tokens_of_the_engine(
    server: RunningServer, storyteller: LLM, open_page: OpenPage
) -> None:
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=40, logprobs=5)
    expected = storyteller.generate(PROMPT, params)[0].outputs[0]
    page = open_page(f"{server.url}/")
    page.locator("select").first.select_option("exact")
    page.get_by_label("Max tokens").fill("40")
    page.get_by_label("Seed").fill("5")
    generate(page, PROMPT)
    expect(page.locator(".status").first).to_contain_text("Finished")
    output = page.locator(".output").first
    assert output.text_content() == expected.text
    assert page.locator('[data-stat="tokens"]').first.inner_text() == str(len(expected.token_ids))
    assert expected.logprobs is not None
    chosen = expected.logprobs[3][expected.token_ids[3]]
    output.locator("span").nth(3).hover()
    row = page.get_by_role("tooltip").locator(".chosen").inner_text()
    assert float(row.split()[1]) == pytest.approx(100 * 2.718281828**chosen.logprob, abs=0.06)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_text_of_broken_characters_is_shown_as_it_is(
    server: RunningServer, alone: LLM, open_page: OpenPage, seed: int
) -> None:
    params = SamplingParams(temperature=0.8, seed=seed, max_tokens=60)
    expected = alone.generate("abc", params)[0].outputs[0]
    page = open_page(f"{server.url}/")
    page.get_by_label("Max tokens").fill("60")
    page.get_by_label("Seed").fill(str(seed))
    page.locator("select").first.select_option("tiny")
    generate(page, "abc")
    expect(page.locator(".status").first).to_contain_text("Finished")
    assert page.locator(".output").first.text_content() == expected.text


def test_the_page_classifies(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(f"{server.url}/")
    page.locator("select").first.select_option("labels")
    page.get_by_label("Prompt").fill("What a day!")
    page.get_by_role("button", name="Classify").click()
    finished(page)
    reply = server.post("/v1/classify", {"model": "labels", "input": "What a day!"}).json()["data"][0]
    best = max(reply["probs"])
    assert page.get_by_role("row").first.inner_text().split() == [reply["label"], f"{100 * best:.1f}", "%"]


def test_models_that_neither_generate_nor_classify_are_not_offered(
    server: RunningServer, open_page: OpenPage
) -> None:
    page = open_page(f"{server.url}/")
    options = page.locator("select").first.locator("option")
    expect(options.filter(has_text="storyteller")).to_have_count(1)
    assert set(server.registry.names) - set(options.all_text_contents()) == {"bare"}


def test_the_servers_objection_is_shown_beside_the_field(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(f"{server.url}/")
    page.locator("select").first.select_option("storyteller")
    page.get_by_label("Max tokens").fill("100000")
    generate(page, PROMPT)
    expect(page.locator(".error").filter(has_text="context")).to_be_visible()
    expect(page.get_by_label("Max tokens")).to_have_attribute("aria-invalid", "true")


def test_the_page_opens_without_a_key_and_asks_for_it(
    sources: tuple[ModelSource, ...], open_page: OpenPage
) -> None:
    storyteller = tuple(source for source in sources if source.name == "storyteller")
    with running(storyteller, api_keys=("a-secret-key",)) as locked:
        page = open_page(f"{locked.url}/")
        key = page.locator("#key")
        expect(key).to_be_focused()
        key.fill("a-secret-key")
        key.press("Tab")
        expect(page.locator("select").first).to_have_value("storyteller")
        page.get_by_label("Max tokens").fill("5")
        generate(page, PROMPT)
        expect(page.locator(".status").first).to_contain_text("Finished")


def test_the_documentation_shows_every_endpoint(server: RunningServer, open_page: OpenPage) -> None:
    page = open_page(f"{server.url}/docs")
    operations = sum(len(each) for each in server.get("/openapi.json").json()["paths"].values())
    expect(page.locator(".opblock")).to_have_count(operations)
    assert operations == 13
    page.locator(".opblock", has_text="/v1/completions").first.click()
    expect(page.get_by_text("Continues one or several prompts")).to_be_visible()
