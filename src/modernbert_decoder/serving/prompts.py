"""Prompts of completions as tokens, and what `echo` shows of them.

This module knows tokenizers and limits; computing is the engine's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.outputs import Score
from modernbert_decoder.serving.errors import ApiError
from modernbert_decoder.serving.protocol.completions import CompletionLogprobs
from modernbert_decoder.serving.token_texts import CompletionTokens
from modernbert_decoder.tokenizer import Tokenizer

# Texts that have fewer characters together are cut into tokens faster than a thread is asked to.
_FEW_CHARACTERS: Final = 4_096


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt.

    Attributes:
        ids: what the model is fed.
        text: what `echo` puts in front of the completion; "" where it is not asked for.
        is_text: whether the client sent text; [CLS], which then stands in front, is not shown.
    """

    ids: Sequence[int]
    text: str
    is_text: bool

    def echoed_tokens(
        self, tokenizer: Tokenizer, score: Score, *, skip_special_tokens: bool
    ) -> CompletionLogprobs:
        """Its tokens with their log-probabilities; the first of given ids has none."""
        tokens = CompletionTokens(tokenizer, skip_special_tokens=skip_special_tokens and not self.is_text)
        if not self.is_text:
            tokens.add(self.ids[0], None, None)
        for place, (token_id, logprob) in enumerate(zip(self.ids[1:], score.logprobs, strict=True)):
            top = {token_id: logprob}
            if score.top_logprobs is not None:
                top.update(score.top_logprobs[place])
            tokens.add(token_id, logprob, top.items())
        return tokens.take()


async def encode_prompts(
    prompt: str | list[str] | list[int] | list[list[int]] | None,
    llm: LLM,
    *,
    max_tokens: int,
    is_limit_given: bool,
    skip_special_tokens: bool,
    is_echoed: bool,
) -> list[EncodedPrompt]:
    """The prompts of a request.

    Args:
        prompt: as the request has it.
        llm: the model.
        max_tokens: that are to follow each.
        is_limit_given: whether the request says how many, or it is the default.
        skip_special_tokens: from the text of token ids.
        is_echoed: whether that text is asked for.

    Raises:
        ApiError: a token id is outside the vocabulary, or a prompt does not fit the context.
    """
    listed = listed_prompts(prompt or "")
    ids = await _ids_of(listed, llm)
    for each in ids:
        limit = "max_tokens" if is_limit_given else None
        check_room(each, llm, max_tokens=max_tokens, prompt_field="prompt", limit_field=limit)

    def text_of(given: str | list[int]) -> str:
        if isinstance(given, str):
            return given
        return llm.tokenizer.decode(given, skip_special_tokens=skip_special_tokens) if is_echoed else ""

    return [
        EncodedPrompt(own, text_of(each), is_text=isinstance(each, str))
        for each, own in zip(listed, ids, strict=True)
    ]


def listed_prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One prompt or several, as a list."""
    if isinstance(prompt, str):
        return [prompt]
    is_one = isinstance(prompt[0], int)
    return cast(list[str | list[int]], [prompt] if is_one else prompt)


async def _ids_of(prompts: Sequence[str | list[int]], llm: LLM) -> list[list[int]]:
    """The token ids of each, all of them texts or all of them ids."""
    texts = [each for each in prompts if isinstance(each, str)]
    if texts:
        return await encode_texts(texts, llm.tokenizer)
    ids = [each for each in prompts if not isinstance(each, str)]
    for each in ids:
        check_token_ids(each, llm, param="prompt")
    return ids


async def encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """`[CLS]` and the tokens of each text; the event loop goes on meanwhile where that takes long."""
    if sum(map(len, texts)) <= _FEW_CHARACTERS:
        return [tokenizer.encode(text) for text in texts]
    return await asyncio.to_thread(tokenizer.encode_batch, texts)


async def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """`encode_texts` for one."""
    (ids,) = await encode_texts([text], tokenizer)
    return ids


def check_token_ids(ids: Sequence[int], llm: LLM, *, param: str) -> None:
    """Checks that a client's ids are in the vocabulary.

    Raises:
        ApiError: one is not.
    """
    size, largest = llm.architecture.vocab_size, max(ids, default=0)
    if largest >= size:
        raise ApiError(
            400,
            f"{param}: token ids of this model are below {size}, got {largest}",
            param=param,
            code="invalid_value",
        )


def check_room(
    ids: Sequence[int], llm: LLM, *, max_tokens: int, prompt_field: str, limit_field: str | None
) -> None:
    """Checks that a prompt and so many tokens fit the context.

    Args:
        ids: of the prompt.
        llm: the model.
        max_tokens: that are to follow.
        prompt_field: the field that holds the prompt, at fault where that leaves no room by itself.
        limit_field: the field that asks for so many tokens; None if none does.

    Raises:
        ApiError: they do not.
    """
    if len(ids) + max_tokens <= llm.max_context:
        return
    message = f"the context of this model holds {llm.max_context} tokens; the prompt has {len(ids)}"
    has_room = len(ids) + min(max_tokens, 1) <= llm.max_context
    if not has_room:
        message += f"; shorten {prompt_field}"
    elif limit_field is None:
        message += f", and {max_tokens} are to follow; shorten {prompt_field}, or ask for fewer"
    else:
        message += f", and {limit_field} asks for {max_tokens} more"
    param = limit_field if has_room and limit_field is not None else prompt_field
    raise ApiError(400, message, param=param, code="context_length_exceeded")
