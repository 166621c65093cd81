"""Prompts of completions as tokens, and what `echo` shows of them.

This module knows tokenizers and limits; computing is the engine's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.outputs import Score
from modernbert_decoder.serving.errors import ApiError
from modernbert_decoder.serving.protocol.completions import CompletionLogprobs
from modernbert_decoder.serving.token_texts import CompletionTokens
from modernbert_decoder.tokenizer import Tokenizer

# Shorter texts are cut into tokens faster than a thread is asked to.
_SHORT_TEXT: Final = 4_096


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt.

    Attributes:
        ids: what the model is fed.
        text: what `echo` puts in front of the completion.
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
    prompt: str | list[str] | list[int] | list[list[int]] | None, llm: LLM, *, skip_special_tokens: bool
) -> list[EncodedPrompt]:
    """The prompts of a request.

    Raises:
        ApiError: a token id is outside the vocabulary.
    """
    tokenizer = llm.tokenizer
    listed: Sequence[str | list[int]]
    if prompt is None or isinstance(prompt, str):
        listed = [prompt or ""]
    else:
        listed = [prompt] if isinstance(prompt[0], int) else prompt
    encoded = []
    for each in listed:
        if isinstance(each, str):
            encoded.append(EncodedPrompt(await encode_text(each, tokenizer), each, is_text=True))
        else:
            check_token_ids(each, llm, param="prompt")
            text = tokenizer.decode(each, skip_special_tokens=skip_special_tokens)
            encoded.append(EncodedPrompt(each, text, is_text=False))
    return encoded


async def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """`[CLS]` and the tokens of a text; the event loop goes on meanwhile where that takes long."""
    if len(text) <= _SHORT_TEXT:
        return tokenizer.encode(text)
    return await asyncio.to_thread(tokenizer.encode, text)


def check_token_ids(ids: Sequence[int], llm: LLM, *, param: str) -> None:
    """Checks that a client's ids are in the vocabulary.

    Raises:
        ApiError: one is not.
    """
    size = llm.architecture.vocab_size
    too_large = next((token_id for token_id in ids if token_id >= size), None)
    if too_large is not None:
        raise ApiError(
            400,
            f"{param}: token ids of this model are below {size}, got {too_large}",
            param=param,
            code="invalid_value",
        )


def check_room(ids: Sequence[int], llm: LLM, *, max_tokens: int, param: str) -> None:
    """Checks that a prompt and so many tokens fit the context.

    Raises:
        ApiError: they do not.
    """
    if len(ids) + max_tokens > llm.max_context:
        raise ApiError(
            400,
            f"the context of this model holds {llm.max_context} tokens; the prompt has {len(ids)}, and "
            f"{param} asks for {max_tokens} more",
            param=param,
            code="context_length_exceeded",
        )
