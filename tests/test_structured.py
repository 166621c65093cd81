"""Structured output: what is generated fits its constraint, whatever else is asked for, and stays exact."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import SEP, tiny_architecture, write_checkpoint
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.engine.speculation import Speculation
from modernbert_decoder.engine.structured import StructuredOutput
from modernbert_decoder.errors import InputError

pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def storyteller() -> Iterator[LLM]:
    with LLM("storyteller", dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """One token per byte, and ids that have no text."""
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"), tiny_architecture(), seed=1)
    with LLM(folder, dtype="float32") as llm:
        yield llm


def texts(llm: LLM, structured: StructuredOutput, **settings: Any) -> list[str]:
    params = SamplingParams(structured=structured, **{"max_tokens": 200, **settings})
    (output,) = llm.generate(["Here it is: "], params)
    assert {completion.finish_reason for completion in output.outputs} == {"stop"}
    return [completion.text for completion in output.outputs]


HOW: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 1, "n": 4},
    {"seed": 2, "top_k": 5},
    {"seed": 3, "top_p": 0.5, "min_p": 0.1, "temperature": 2.0},
    {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 1.0, "logprobs": 3},
]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", ["storyteller", "tiny"])
def test_json_follows_its_schema(request: pytest.FixtureRequest, name: str, how: dict[str, Any]) -> None:
    for text in texts(request.getfixturevalue(name), StructuredOutput(json=SCHEMA), **how):
        value = json.loads(text)
        assert set(value) == {"name", "age", "tags"}
        assert len(value["name"]) <= 8
        assert 0 <= value["age"] <= 120
        assert len(value["tags"]) <= 3
        assert set(value["tags"]) <= {"red", "green"}


@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_regular_expression_matches_the_whole_text(storyteller: LLM, how: dict[str, Any]) -> None:
    for text in texts(storyteller, StructuredOutput(regex=r"[a-f]{3}-\d{2,4}(\.|!)"), **how):
        assert re.fullmatch(r"[a-f]{3}-\d{2,4}(\.|!)", text)


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", ["storyteller", "tiny"])
def test_a_choice_is_one_of_its_texts(request: pytest.FixtureRequest, name: str, how: dict[str, Any]) -> None:
    choices = ["yes", "no", "no, never", 'a "quoted" \\ one\n', "\N{SNOWMAN} \N{GRINNING FACE}"]
    assert set(texts(request.getfixturevalue(name), StructuredOutput(choice=choices), **how)) <= set(choices)


def test_a_grammar_is_followed(storyteller: LLM) -> None:
    grammar = 'start: term ("+" term)*\nterm: /[0-9]/ | "(" start ")"\n'
    for text in texts(storyteller, StructuredOutput(grammar=grammar), seed=1, n=6, logit_bias={SEP: 0}):
        assert re.fullmatch(r"[0-9+()]+", text)
        assert eval(text) >= 0


def test_characters_of_several_bytes_are_put_together(tiny: LLM) -> None:
    (text,) = texts(tiny, StructuredOutput(regex="[\N{SNOWMAN}\N{GRINNING FACE}\u00e9]{5}"), seed=1)
    assert len(text) == 5


def test_names_of_special_tokens_are_written_as_text(tiny: LLM, storyteller: LLM) -> None:
    for llm in (tiny, storyteller):
        (output,) = llm.generate(
            ["The"],
            SamplingParams(
                structured=StructuredOutput(choice=["[CLS][SEP]"]), skip_special_tokens=True, max_tokens=50
            ),
        )
        completion = output.outputs[0]
        assert completion.text == "[CLS][SEP]"
        assert not llm.tokenizer.special_token_ids & set(completion.token_ids[:-1])


def test_streams_and_batches_follow_each_their_own_constraint(storyteller: LLM) -> None:
    wanted = [StructuredOutput(regex=f"[{letter}]{{3,6}}") for letter in "abc"]
    params = [SamplingParams(structured=each, seed=i, max_tokens=50) for i, each in enumerate(wanted)]
    params.append(SamplingParams(seed=9, max_tokens=20))
    together = [output.outputs[0].text for output in storyteller.generate(["The"] * 4, params)]
    alone = [storyteller.generate(["The"], each)[0].outputs[0].text for each in params]
    assert together == alone
    for letter, text in zip("abc", together, strict=False):
        assert re.fullmatch(f"{letter}{{3,6}}", text)
    streamed = "".join(chunk.text for chunk in storyteller.stream("The", params[0]))
    assert streamed == alone[0]


def test_log_probabilities_stay_those_of_the_model(storyteller: LLM) -> None:
    free = storyteller.generate(["The"], SamplingParams(temperature=0, max_tokens=1, logprobs=5))
    bound = storyteller.generate(
        ["The"],
        SamplingParams(temperature=0, max_tokens=1, logprobs=5, structured=StructuredOutput(regex="[0-9]+")),
    )
    (own,), (other,) = free[0].outputs[0].logprobs or (), bound[0].outputs[0].logprobs or ()
    (chosen, entry), *_ = other.items()
    assert chosen not in own
    assert entry.rank > 5
    assert {token: each.logprob for token, each in own.items()} == {
        token: each.logprob for token, each in other.items() if token != chosen
    }


def test_max_tokens_and_stop_strings_cut_it_short(storyteller: LLM) -> None:
    wanted = StructuredOutput(regex="[a-z]{100}")
    (output,) = storyteller.generate(["The"], SamplingParams(structured=wanted, max_tokens=4))
    assert output.outputs[0].finish_reason == "length"
    assert re.fullmatch("[a-z]+", output.outputs[0].text)
    fixed = StructuredOutput(choice=["one two three"])
    (output,) = storyteller.generate(["The"], SamplingParams(structured=fixed, stop=" two", max_tokens=50))
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("one", " two")


def test_a_complete_text_ends_even_before_min_tokens(storyteller: LLM) -> None:
    wanted = StructuredOutput(choice=["ab"])
    assert texts(storyteller, wanted, min_tokens=20) == ["ab"]
    longer = StructuredOutput(regex="[a-z]*")
    params = SamplingParams(structured=longer, min_tokens=20, max_tokens=20, seed=1)
    assert len(storyteller.generate(["The"], params)[0].outputs[0].token_ids) == 20


def test_speculation_changes_nothing(storyteller: LLM) -> None:
    params = SamplingParams(structured=StructuredOutput(json=SCHEMA), temperature=0, max_tokens=200)
    prompt = '{"name":"Anna","age":7,"tags":["red","red"]} {"name":"Anna","age":7,"tags":["red","red"]} '
    speculation = Speculation(adaptive=False, max_draft=4)
    with LLM("storyteller", dtype="float32", speculation=speculation) as guessing:
        for each in (
            params,
            SamplingParams(structured=StructuredOutput(regex='("[a-z]+",){4}'), seed=4, max_tokens=90),
        ):
            plain = storyteller.generate([prompt], each)[0].outputs[0]
            assert guessing.generate([prompt], each)[0].outputs[0].token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"json": {"type": "nothing"}}, "json of structured output cannot be used"),
        ({"regex": "("}, "regex of structured output cannot be used"),
        ({"grammar": "start: missing"}, "grammar of structured output cannot be used"),
        ({"json": {"$ref": "#/nowhere"}}, "json of structured output cannot be used"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_at_once(
    storyteller: LLM, wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        storyteller.stream("The", SamplingParams(structured=StructuredOutput(**wanted)))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, got none"),
        ({"regex": "a", "choice": ["b"]}, "got regex and choice"),
        ({"json": "{"}, "is not JSON"),
        ({"json": "[]"}, "which is an object, got list"),
        ({"json": {"minimum": float("nan")}}, "cannot be written as JSON"),
        ({"regex": ""}, "text that is not empty"),
        ({"grammar": 5}, "text that is not empty"),
        ({"choice": []}, "list of texts"),
        ({"choice": "ab"}, "list of texts"),
        ({"choice": ["a", ""]}, "list of texts"),
    ],
    ids=str,
)
def test_what_is_no_constraint_is_refused(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StructuredOutput(**wanted)


def test_parameters_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InputError, match="ignore_eos must be False"):
        SamplingParams(structured=StructuredOutput(regex="a"), ignore_eos=True)
    with pytest.raises(InputError, match="must be a StructuredOutput"):
        SamplingParams(structured={"regex": "a"})  # type: ignore[arg-type]


def test_biases_that_forbid_all_that_is_allowed_are_an_error(tiny: LLM) -> None:
    params = SamplingParams(structured=StructuredOutput(choice=["a"]), logit_bias={ord("a"): -np.inf})
    with pytest.raises(InputError, match="no token is left to choose from"):
        tiny.generate(["The"], params)


def test_without_the_package_the_error_says_how_to_install_it(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    params = SamplingParams(structured=StructuredOutput(regex="never compiled before"))
    with pytest.raises(InputError, match=r"modernbert-decoder\[serve\]"):
        tiny.generate(["The"], params)


def test_the_package_is_not_imported_where_nothing_is_structured(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from modernbert_decoder import LLM, SamplingParams; "
        "LLM('storyteller').generate(['The'], SamplingParams(max_tokens=1)); "
        "print('llguidance' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "False"


def test_names_of_special_tokens_can_be_encoded_as_text(tiny: LLM, storyteller: LLM) -> None:
    for llm in (tiny, storyteller):
        tokenizer = llm.tokenizer
        for text in ("[CLS]", "a[SEP] [PAD]b", "plain", ""):
            ids = tokenizer.encode_plain(text)
            assert tokenizer.special_token_ids.isdisjoint(ids)
            assert tokenizer.decode(ids) == text
        assert tokenizer.encode("[SEP]")[1:] == [tokenizer.sep_token_id]


def counting(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[StructuredOutput]:
    """What is compiled from now on."""
    compiled = []
    compile_one = llm._constraints._compile

    def noting(structured: StructuredOutput) -> Any:
        compiled.append(structured)
        return compile_one(structured)

    monkeypatch.setattr(llm._constraints, "_compile", noting)
    return compiled


def test_what_is_held_is_not_compiled_again_whatever_else_was(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = counting(tiny, monkeypatch)
    first = StructuredOutput(choice=["held"])
    held = tiny.check_structured(first)
    for number in range(100):
        tiny.check_structured(StructuredOutput(choice=[f"another {number}"]))
    assert texts(tiny, first) == ["held"]
    assert compiled.count(first) == 1
    del held
    tiny.check_structured(StructuredOutput(choice=["the last of them"]))
    for number in range(100):
        tiny.check_structured(StructuredOutput(choice=[f"another {number}"]))
    assert len(tiny._constraints._held) <= 64
    tiny.check_structured(first)
    assert compiled.count(first) == 2


def test_a_slow_constraint_holds_no_other_up(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    is_slow, may_go_on = threading.Event(), threading.Event()
    compile_one = tiny._constraints._compile

    def held_up(structured: StructuredOutput) -> Any:
        if structured.choice == ("slow",):
            is_slow.set()
            assert may_go_on.wait(60)
        return compile_one(structured)

    monkeypatch.setattr(tiny._constraints, "_compile", held_up)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(tiny.check_structured, StructuredOutput(choice=["slow"]))
        assert is_slow.wait(60)
        pool.submit(tiny.check_structured, StructuredOutput(choice=["quick"])).result(60)
        assert not slow.done()
        may_go_on.set()
        slow.result(60)


@pytest.mark.parametrize(
    "wanted",
    [
        {"regex": "(a" * 30_000},
        {"grammar": "start: missing " + "x " * 30_000},
        {"json": {"$ref": "#/" + "a" * 60_000}},
        {"choice": ["a" * 60_000, ""]},
        {"regex": ["a" * 60_000]},
    ],
    ids=lambda wanted: next(iter(wanted)),
)
def test_an_error_is_told_without_the_whole_constraint(tiny: LLM, wanted: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        tiny.check_structured(StructuredOutput(**wanted))
    assert len(str(error.value)) < 1_000
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_an_expression_is_told(tiny: LLM) -> None:
    with pytest.raises(InputError, match="unclosed group"):
        tiny.check_structured(StructuredOutput(regex="(" * 2))


def test_two_that_compile_one_constraint_at_once_share_what_is_kept(
    storyteller: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraints = storyteller._constraints
    wanted = StructuredOutput(regex="never seen before [0-9]")
    compile_one = constraints._compile
    quicker = []

    def compile_while_another_does(structured: StructuredOutput) -> Any:
        matcher = compile_one(structured)
        if not quicker:
            quicker.append(None)
            quicker[0] = constraints.compiled(structured)
        return matcher

    monkeypatch.setattr(constraints, "_compile", compile_while_another_does)
    assert constraints.compiled(wanted) is quicker[0]
