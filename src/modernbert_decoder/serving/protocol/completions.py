"""`/v1/completions` and `/v1/chat/completions`: requests, answers and chunks of streams."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from modernbert_decoder.serving.protocol.base import (
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_PARTS_TOGETHER,
    Body,
    Prompts,
    Reply,
    Usage,
    described_as,
)
from modernbert_decoder.serving.protocol.sampling import SamplingFields

FinishReason = Annotated[
    Literal["stop", "length", "aborted", "timeout"] | None,
    Field(
        description="`stop`: end of text, stop string or stop token; `length`: max_tokens or the context. "
        "Extensions: `aborted`: the server shut down; `timeout`: the server's limit of time was reached."
    ),
]
StopReason = Annotated[str | int | None, Field(description="Extension: the stop string or stop token id.")]


class CompletionRequest(SamplingFields):
    """A prompt to be continued, or several."""

    prompt: Prompts | None = Field(
        description='Text gets [CLS] in front; "" and null are [CLS] alone. Token ids are used as they are.'
    )
    best_of: int | None = Field(
        None, ge=1, description="Only as large as `n`: all that is computed is returned."
    )
    echo: bool | None = Field(False, description="Put the prompt in front of the completion.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="OpenAI's limit is 5; more is an extension."
    )
    max_tokens: int | None = Field(16, ge=0, le=2**31 - 1)
    suffix: None = Field(None, description="Not supported.")


class CompletionLogprobs(Reply):
    r"""Log-probabilities per token, of the model before any sampling parameter is applied.

    A token that is only a part of a character is spelled like `bytes:\xe2\x80`, one without text like
    `token_id:123`. `text_offset` is where a token starts, in characters of the text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """One completion, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason = None


class CompletionReply(Reply):
    """All completions of all prompts: those of the first prompt come first."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message of a conversation; which roles there are is the template's business.

    An answer's message may be sent back as OpenAI's client holds it: its fields from `refusal` on are null.
    """

    role: str = Field(min_length=1)
    content: Annotated[
        str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)],
        described_as(f"text, or a list of at most {MAX_PARTS} parts of the type text"),
    ]
    name: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def plain(self) -> dict[str, str]:
        """As templates see it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        message = {"role": self.role, "content": text}
        return message if self.name is None else {**message, "name": self.name}


def _check_number_of_parts(messages: Any) -> Any:
    """Refuses messages of very many parts before anybody looks at these."""
    if isinstance(messages, list) and len(messages) <= MAX_MESSAGES:
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        count = sum(len(content) for content in contents if isinstance(content, list))
        if count > MAX_PARTS_TOGETHER:
            raise PydanticCustomError(
                "too_long",
                "there are {length} parts of messages; at most {count} are taken",
                {"length": count, "count": MAX_PARTS_TOGETHER},
            )
    return messages


class ChatRequest(SamplingFields):
    """A conversation to be continued; only for models with a chat template."""

    messages: Annotated[list[ChatMessage], BeforeValidator(_check_number_of_parts)] = Field(
        min_length=1, max_length=MAX_MESSAGES, fail_fast=True
    )
    logprobs: bool | None = False
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Only together with `logprobs`."
    )
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="The older name of the next field.")
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Null fills the context.")


class ChatTopLogprob(Reply):
    """A token that might have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(ChatTopLogprob):
    """A token that was chosen."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(Reply):
    """Of all tokens of a message."""

    content: list[ChatLogprob]


class AssistantMessage(Reply):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason = None


class ChatReply(Reply):
    """All answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
