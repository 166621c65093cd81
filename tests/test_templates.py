"""What a tokenizer puts around texts, whatever its post-processor is called, and how texts are shortened."""

from __future__ import annotations

import pickle

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from checkpoints import CLS, SEP, byte_tokenizer
from modernbert_decoder.errors import ArgumentError, CheckpointError, InputError
from modernbert_decoder.templates import Template, TextTooLongError
from modernbert_decoder.text_pieces import FirstTokens

NAMES = (("[SEP]", SEP), ("[CLS]", CLS))
SPECIAL = [("[CLS]", CLS), ("[SEP]", SEP)]
PROCESSORS = {
    "the documented one": processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=SPECIAL
    ),
    "nothing": processors.ByteLevel(),
    "BERT's": processors.BertProcessing(*NAMES),
    "RoBERTa's": processors.RobertaProcessing(*NAMES),
    "a chain": processors.Sequence(
        [
            processors.ByteLevel(),
            processors.TemplateProcessing(single="$A [SEP]", pair="$A $B:1", special_tokens=SPECIAL),
        ]
    ),
}


def library_with(processor: object) -> tokenizers.Tokenizer:
    library = byte_tokenizer()
    library.post_processor = processor
    return library


def tokens(text: str) -> FirstTokens:
    return FirstTokens(list(text.encode()), len(text.encode()))


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("batch", [("",), ("a",), ("some text",), ("", ""), ("a", "b c"), ("b c", "a")])
def test_texts_are_joined_as_the_library_joins_them(name: str, batch: tuple[str, ...]) -> None:
    library = library_with(PROCESSORS[name])
    template = Template(library, num_texts=len(batch))
    joined = template.joined([tokens(text) for text in batch], max_length=None, truncation=None)
    assert joined == library.encode(*batch).ids


@settings(max_examples=150, deadline=None)
@given(
    first=st.integers(0, 40),
    second=st.none() | st.integers(0, 40),
    room=st.integers(0, 50),
    kept=st.booleans(),
)
def test_the_longest_is_shortened_first_as_the_library_does(
    first: int, second: int | None, room: int, kept: bool
) -> None:
    library = library_with(PROCESSORS["the documented one"])
    texts = ["a" * first, *([] if second is None else ["b" * second])]
    template = Template(library, num_texts=len(texts))
    max_length = template.num_own_tokens + room
    library.enable_truncation(max_length, strategy="longest_first")
    halves = [tokens(text) for text in texts]
    if kept:  # of a long text no more ids are there than can be kept
        halves = [FirstTokens(half.ids[:max_length], half.num_tokens) for half in halves]
    joined = template.joined(halves, max_length=max_length, truncation="longest_first")
    assert joined == library.encode(*texts).ids


@pytest.mark.parametrize("pair", ["$A $B $A", "$B $A"])
def test_a_template_that_does_more_is_refused(pair: str) -> None:
    library = library_with(processors.TemplateProcessing(single="$A", pair=pair, special_tokens=SPECIAL))
    Template(library, num_texts=1)
    with pytest.raises(CheckpointError, match="repeats a text or turns two round"):
        Template(library, num_texts=2)


def test_errors_say_the_numbers_and_survive_a_trip_to_another_process() -> None:
    template = Template(library_with(PROCESSORS["the documented one"]), num_texts=1)
    with pytest.raises(TextTooLongError, match="has 5 tokens and at most 4 are taken") as caught:
        template.joined([tokens("abc")], max_length=4, truncation=None)
    with pytest.raises(ArgumentError, match="max_length is 1, but the template alone needs 2") as other:
        template.joined([tokens("abc")], max_length=1, truncation="longest_first")
    for error in (caught.value, other.value):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy)) == (type(error), str(error))
        assert isinstance(copy, InputError)
    assert other.value.on_command_line() == "--max-length is 1, but the template alone needs 2 tokens"
