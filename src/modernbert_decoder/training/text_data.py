"""Texts to go on training a language model with: documents, or prompts with the completions they should get.

Responsible for token ids and for which of them are learned. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from modernbert_decoder.errors import InputError
from modernbert_decoder.jobs.inputs import Columns, Inputs, expand_files
from modernbert_decoder.tokenizer import Tokenizer

IGNORED: Final = -100


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Where texts are.

    Attributes:
        files: .txt (one document each), .csv, .tsv, .jsonl or .parquet, or patterns.
        text: column of the documents, or of the prompts where there are completions.
        completion: column of what each prompt is to be continued with; None: whole documents are learned.
    """

    files: tuple[str, ...]
    text: str = "text"
    completion: str | None = None


@dataclass(frozen=True)
class Example:
    """A sequence of tokens.

    Attributes:
        ids: `[CLS]` and the rest.
        labels: the ids that are learned, -100 at the others; the first is never learned.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def num_targets(self) -> int:
        """Tokens that are learned."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class ReadTexts:
    """What files gave.

    Attributes:
        examples: in the order of the files.
        num_cut: pairs that lost tokens, because they were longer than allowed.
    """

    examples: list[Example]
    num_cut: int


def read_texts(source: TextFiles, tokenizer: Tokenizer, *, max_length: int) -> ReadTexts:
    """All texts as examples no longer than `max_length`.

    A document is `[CLS] text [SEP]`; a longer one goes on in further examples, each with `[CLS]` in front.
    A pair is `[CLS] prompt completion [SEP]`, of which the completion and `[SEP]` are learned; spaces at the
    prompt's end go to the completion, as words are tokenized with the space before them. A pair that is too
    long loses tokens after the prompt's `[CLS]`, and then at the completion's end.

    Raises:
        InputError: a file cannot be read, a row lacks a text, or there is nothing to learn.
    """
    sep_token_id = tokenizer.sep_token_id
    if sep_token_id is None:
        raise InputError("the tokenizer names no token that ends a text ([SEP]); add it to its configuration")
    names = expand_files(source.files)
    has_texts = any(name.lower().endswith(".txt") for name in names)
    columns = Columns(text=source.text, pair=source.completion)
    inputs = Inputs(files=names, columns=columns, whole_files=has_texts)
    inputs.check()
    examples: list[Example] = []
    num_cut = 0
    with closing(inputs.records()) as records:
        for record in records:
            if record.error is not None:
                raise InputError(f"{record.where}: {record.error}")
            if record.pair is None:
                examples += _documents(record.text, tokenizer, sep_token_id, max_length=max_length)
            else:
                example, is_cut = _pair(
                    record.text, record.pair, tokenizer, sep_token_id, max_length=max_length
                )
                examples.append(example)
                num_cut += is_cut
    if not any(example.num_targets for example in examples):
        raise InputError(f"there is nothing to learn in {', '.join(names)}")
    return ReadTexts([example for example in examples if example.num_targets], num_cut)


def _documents(text: str, tokenizer: Tokenizer, sep_token_id: int, *, max_length: int) -> Iterator[Example]:
    if not text.strip():
        return
    cls_token_id, *body = [*tokenizer.encode(text), sep_token_id]
    for begin in range(0, len(body), max_length - 1):
        piece = body[begin : begin + max_length - 1]
        yield Example((cls_token_id, *piece), (IGNORED, *piece))


def _pair(
    prompt: str, completion: str, tokenizer: Tokenizer, sep_token_id: int, *, max_length: int
) -> tuple[Example, bool]:
    stripped = prompt.rstrip()
    cls_token_id, *front = tokenizer.encode(stripped) if stripped else [tokenizer.cls_token_id]
    back = [*tokenizer.encode(prompt[len(stripped) :] + completion)[1:], sep_token_id]
    is_cut = 1 + len(front) + len(back) > max_length
    room = max(max_length - 1 - len(back), 0)
    front = front[max(len(front) - room, 0) :]
    back = back[: max_length - 1]
    ids = (cls_token_id, *front, *back)
    return Example(ids, (*[IGNORED] * (1 + len(front)), *back)), is_cut
