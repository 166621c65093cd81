"""The fields that completions and chat completions share, and how they become `SamplingParams`."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import Field, model_validator

from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.engine.structured import StructuredOutput
from modernbert_decoder.errors import InputError
from modernbert_decoder.serving.errors import ApiError
from modernbert_decoder.serving.protocol.base import (
    MAX_COMPLETIONS,
    MAX_NAMED_TOKENS,
    MAX_STOPS,
    Body,
    ModelName,
    TokenId,
    UserName,
    at_most,
    described_as,
)

# Characters of a schema, expression or grammar, and of all choices; compiling more would take seconds.
MAX_CONSTRAINT: Final = 1 << 16
MAX_CHOICES: Final = 1_000
Value = TypeVar("Value")

Stop = Annotated[
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS, fail_fast=True)]
    | None,
    described_as(f"text or a list of at most {MAX_STOPS} texts, none of them empty"),
]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Body):
    """Only together with `stream`.

    Attributes:
        include_usage: send a last chunk without choices that counts the tokens.
        include_obfuscation: must not be true: chunks are as long as their text, and nothing pads them.
    """

    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Body):
    """A schema with a name, as OpenAI wants it.

    Attributes:
        name: not used.
        description: not used.
        schema_: the schema.
        strict: must not be false: the schema is always followed.
    """

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: Literal[True] | None = None


class ResponseFormat(Body):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's way to ask for structured output: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = Field(None, max_length=MAX_CONSTRAINT)
    choice: list[str] | None = Field(None, max_length=MAX_CHOICES, fail_fast=True)
    grammar: str | None = Field(None, max_length=MAX_CONSTRAINT)


class SamplingFields(Body):
    """How tokens are chosen. From `top_k` on these are extensions, with vLLM's names and meanings."""

    model: ModelName
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Bias] | None, at_most(MAX_NAMED_TOKENS)] = Field(
        None,
        max_length=MAX_NAMED_TOKENS,
        description="Token ids, written as text, and what is added to their logits.",
    )
    n: int | None = Field(1, ge=1, le=MAX_COMPLETIONS)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    response_format: ResponseFormat | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stop: Stop = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    user: UserName = None
    top_k: int | None = Field(0, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=100)
    min_tokens: int | None = Field(0, ge=0, le=2**31 - 1)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_NAMED_TOKENS, fail_fast=True)
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options: only together with stream", param="stream_options", code="invalid_value"
            )
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """What the engine is asked for.

        Args:
            max_tokens: None fills the context.
            logprobs: as in `SamplingParams`.

        Raises:
            InputError: values that do not go together.
            ApiError: likewise, with the field named.
        """
        return SamplingParams(
            n=_or(self.n, 1),
            temperature=_or(self.temperature, 1.0),
            top_k=_or(self.top_k, 0),
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            logit_bias=_biases(self.logit_bias),
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=_or(self.ignore_eos, False),
            min_tokens=_or(self.min_tokens, 0),
            max_tokens=max_tokens,
            # OpenAI's seeds may be negative; ours are not.
            seed=None if self.seed is None else self.seed % 2**64,
            logprobs=logprobs,
            include_stop_str_in_output=_or(self.include_stop_str_in_output, False),
            skip_special_tokens=_or(self.skip_special_tokens, True),
            structured=self._structured_output(),
        )

    @property
    def structured_field(self) -> str:
        """The field that asks for structured output."""
        return "structured_outputs" if self.response_format is None else "response_format"

    def _structured_output(self) -> StructuredOutput | None:
        field = self.structured_field
        too_large = f"{field}: at most {MAX_CONSTRAINT:,} characters of {{}} are taken"
        if any(map(_is_large, _schemas(self.response_format, self.structured_outputs))):
            raise ApiError(400, too_large.format("json"), param=field, code="invalid_value")
        try:
            structured = _structured(self.response_format, self.structured_outputs)
        except InputError as error:
            raise ApiError(400, f"{field}: {error}", param=field, code="invalid_value") from None
        if structured is not None and _num_characters(structured) > MAX_CONSTRAINT:
            raise ApiError(400, too_large.format(structured.kind), param=field, code="invalid_value")
        return structured


def _or(value: Value | None, default: Value) -> Value:
    """OpenAI's reference lets most fields be null, which means their default."""
    return default if value is None else value


def _biases(biases: dict[str, float] | None) -> dict[int, float] | None:
    if biases is None:
        return None
    for key in biases:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ApiError(
                400, "logit_bias: keys must be token ids", param="logit_bias", code="invalid_value"
            )
    return {int(key): bias for key, bias in biases.items()}


def _structured(
    response_format: ResponseFormat | None, outputs: StructuredOutputs | None
) -> StructuredOutput | None:
    wanted = None if response_format is None else _of_response_format(response_format)
    if outputs is None:
        return wanted
    if wanted is not None:
        raise ApiError(
            400,
            "structured_outputs: not together with response_format",
            param="structured_outputs",
            code="invalid_value",
        )
    given = {
        "json": {"type": "object"} if outputs.json_object and outputs.json_ is None else outputs.json_,
        "regex": outputs.regex,
        "choice": outputs.choice,
        "grammar": outputs.grammar,
    }
    is_twice = outputs.json_object and outputs.json_ is not None
    if is_twice or sum(value is not None for value in given.values()) != 1:
        raise ApiError(
            400,
            "structured_outputs: give exactly one of json, json_object, regex, choice and grammar",
            param="structured_outputs",
            code="invalid_value",
        )
    return StructuredOutput(**given)  # type: ignore[arg-type]


def _schemas(response_format: ResponseFormat | None, outputs: StructuredOutputs | None) -> tuple[Any, ...]:
    """What would be written as JSON."""
    wanted = None if response_format is None else response_format.json_schema
    return (None if wanted is None else wanted.schema_, None if outputs is None else outputs.json_)


def _is_large(schema: Any) -> bool:
    """Whether a schema, a text or a value, has certainly more characters than are taken.

    Looks at no more of it than at what would be taken: writing all of it would hold the event loop.
    """
    if isinstance(schema, str):
        return len(schema) > MAX_CONSTRAINT
    size, parts = 0, [schema]
    while parts and size <= MAX_CONSTRAINT:
        part = parts.pop()
        if isinstance(part, dict | list):
            size += 2 * max(1, len(part))  # brackets, and what stands between parts
            if size <= MAX_CONSTRAINT:
                parts += (*part, *part.values()) if isinstance(part, dict) else part
        else:
            size += len(part) if isinstance(part, str) else 1
    return size > MAX_CONSTRAINT


def _num_characters(structured: StructuredOutput) -> int:
    """Of what has to be compiled."""
    stated = structured.json or structured.regex or structured.grammar or ""
    return len(stated) + sum(map(len, structured.choice or ()))


def _of_response_format(wanted: ResponseFormat) -> StructuredOutput | None:
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        raise ApiError(
            400,
            "response_format: json_schema goes with the type json_schema, and only with it",
            param="response_format",
            code="invalid_value",
        )
    if wanted.json_schema is not None:
        return StructuredOutput(json=wanted.json_schema.schema_)
    return StructuredOutput(json={"type": "object"}) if wanted.type == "json_object" else None
