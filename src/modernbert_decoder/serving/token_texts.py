"""Tokens as clients see them: their spelling, their place in the text, their log-probabilities.

This module knows tokenizers and the shape of log-probabilities in answers; it computes none.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping

from modernbert_decoder.engine.outputs import Logprob
from modernbert_decoder.serving.protocol.completions import (
    ChatLogprob,
    ChatLogprobs,
    ChatTopLogprob,
    CompletionLogprobs,
)
from modernbert_decoder.tokenizer import Tokenizer

# What stands for minus infinity, which JSON cannot spell.
_LEAST_LOGPROB = -9999.0

Top = Iterable[tuple[int, float]]


def token_spelling(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text that is different for different tokens.

    That is its text; where it is only a part of a character, its bytes as OpenAI spells them, and where it
    has none, its id.
    """
    data = tokenizer.token_bytes(token_id)
    if not data:
        return f"token_id:{token_id}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def top_of(table: Mapping[int, Logprob], count: int) -> list[tuple[int, float]]:
    """The `count` most likely tokens of an engine's table, and the chosen one, which stands first there."""
    return [
        (token_id, entry.logprob)
        for position, (token_id, entry) in enumerate(table.items())
        if position == 0 or entry.rank <= count
    ]


class CompletionTokens:
    """Log-probabilities of `/v1/completions`, token by token.

    Args:
        tokenizer: of the model.
        skip_special_tokens: whether the text leaves them out.
        offset: characters of the text in front of the first token.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = offset
        self._reset()

    def _reset(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, token_id: int, logprob: float | None, top: Top | None) -> None:
        """Appends a token; the first of a prompt has neither log-probability nor alternatives."""
        spell = self._tokenizer
        self._tokens.append(token_spelling(spell, token_id))
        self._logprobs.append(None if logprob is None else max(logprob, _LEAST_LOGPROB))
        self._tops.append(
            None
            if top is None
            else {token_spelling(spell, each): max(value, _LEAST_LOGPROB) for each, value in top}
        )
        self._offsets.append(self._offset)
        if token_id not in self._skipped:
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def add_tables(self, tables: Iterable[Mapping[int, Logprob]], *, num_top: int) -> None:
        """Appends tokens of a completion."""
        for table in tables:
            token_id, chosen = next(iter(table.items()))
            self.add(token_id, chosen.logprob, top_of(table, num_top))

    def take(self) -> CompletionLogprobs:
        """What was added since the last call."""
        taken = CompletionLogprobs(
            tokens=self._tokens,
            token_logprobs=self._logprobs,
            top_logprobs=self._tops,
            text_offset=self._offsets,
        )
        self._reset()
        return taken


def chat_logprobs(
    tokenizer: Tokenizer, tables: Iterable[Mapping[int, Logprob]], *, num_top: int
) -> ChatLogprobs:
    """Log-probabilities of `/v1/chat/completions`."""

    def entry(token_id: int, logprob: float) -> ChatTopLogprob:
        return ChatTopLogprob(
            token=token_spelling(tokenizer, token_id),
            logprob=max(logprob, _LEAST_LOGPROB),
            bytes=list(tokenizer.token_bytes(token_id)),
        )

    content = []
    for table in tables:
        token_id, chosen = next(iter(table.items()))
        own = entry(token_id, chosen.logprob)
        likeliest = sorted(
            ((each.rank, other, each.logprob) for other, each in table.items() if each.rank <= num_top)
        )
        top = [entry(other, logprob) for _, other, logprob in likeliest]
        content.append(ChatLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
    return ChatLogprobs(content=content)
