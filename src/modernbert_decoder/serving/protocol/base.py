"""What all bodies have in common: no unknown fields, no conversions, errors with one clear sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from modernbert_decoder.serving.errors import TOO_MANY_FIELDS

MAX_PROMPTS: Final = 128
MAX_COMPLETIONS: Final = 128
# Of all prompts of a request.
MAX_COMPLETIONS_TOGETHER: Final = 1024
MAX_LOGPROBS: Final = 20
MAX_STOPS: Final = 16
MAX_MESSAGES: Final = 1024
MAX_PARTS: Final = 64
# Of all messages of a conversation.
MAX_PARTS_TOGETHER: Final = 4096
MAX_NAMED_TOKENS: Final = 4096
# Of one text; more than any context, as some endpoints cut texts or read them in windows.
MAX_TOKEN_IDS: Final = 1 << 17
# No object of a request has as many fields. Each one that is not known is an error of its own, and many would
# take seconds.
_MAX_FIELDS: Final = 128
_MAX_TOKEN_ID: Final = 2**31 - 1


class Body(BaseModel):
    """A request: unknown fields are errors, and `"1"` is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=False)

    @model_validator(mode="before")
    @classmethod
    def _check_number_of_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise PydanticCustomError(
                TOO_MANY_FIELDS,
                "there are {count} fields; no object of a request has more than {most}",
                {"count": len(value), "most": _MAX_FIELDS},
            )
        return value


class Reply(BaseModel):
    """An answer: it has exactly these fields."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Reply):
    """What went wrong.

    Attributes:
        message: for people.
        type: the kind of error.
        param: the field of the request that is at fault.
        code: for programs.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """Every answer that is not the one wished for."""

    error: ErrorDetail


class Usage(Reply):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int = 0) -> Usage:
        """The two and their sum."""
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


def described_as(wanted: str) -> WrapValidator:
    """Replaces whatever pydantic says of the alternatives of a union by one sentence."""

    def check(value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("wrong_kind", "must be {wanted}", {"wanted": wanted}) from None

    return WrapValidator(check)


def at_most(count: int) -> BeforeValidator:
    """Refuses longer objects before anybody looks at what they hold."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise PydanticCustomError(
                "too_long",
                "there are {length} entries; at most {count} are taken",
                {"length": len(value), "count": count},
            )
        return value

    return BeforeValidator(check)


TokenId = Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]
# The first wrong element is told, not every one: there may be hundreds of thousands.
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS, fail_fast=True)]
Prompts = Annotated[
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
    described_as(
        f"text, a list of texts, a list of token ids or a list of such lists; at most {MAX_PROMPTS} of them, "
        "no list empty"
    ),
]
ModelName = Annotated[str, Field(description="A name that GET /v1/models lists.")]
UserName = Annotated[
    str | None,
    Field(max_length=256, description="Who asks; without API keys, users take turns in the queue."),
]
