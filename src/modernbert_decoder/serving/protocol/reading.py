"""Embeddings, as OpenAI has them, and labels, scores and rankings: extensions, close to vLLM's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from modernbert_decoder.serving.protocol.base import (
    MAX_PROMPTS,
    Body,
    ModelName,
    Prompts,
    Reply,
    TokenIds,
    Usage,
    UserName,
    described_as,
)

Normalization = Literal["sum", "token", "byte", "unconditional"]
ListObject = Literal["list"]


class TextPair(Body):
    """Two texts that are read together."""

    text: str
    text_pair: str


Texts = Annotated[
    str
    | TextPair
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[TextPair], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
    described_as(
        'text, a list of texts, a list of token ids, a list of such lists, or {"text", "text_pair"}, one '
        f"or a list of them; at most {MAX_PROMPTS} of them, no list empty"
    ),
]
Truncate = Annotated[bool, Field(description="Extension: cut texts that are too long.")]
MaxLength = Annotated[int | None, Field(ge=1, description="Extension: most tokens of a text.")]


class EmbeddingRequest(Body):
    """Texts to be turned into vectors of length 1."""

    model: ModelName
    input: Prompts
    dimensions: int | None = Field(None, ge=1, description="Only as many as the model has.")
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="`base64`: float32 numbers, the least significant byte first."
    )
    user: UserName = None
    pooling: Literal["last", "mean"] = Field(
        "last", description="Extension: the last token's state, or the mean over all."
    )
    normalize: bool = Field(True, description="Extension: scale vectors to length 1.")
    truncate: Truncate = False
    max_length: MaxLength = None


class Embedding(Reply):
    """One vector."""

    index: int
    object: Literal["embedding"] = "embedding"
    embedding: list[float] | str


class EmbeddingReply(Reply):
    """Vectors in the order of the texts."""

    object: ListObject = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class ClassifyRequest(Body):
    """Texts to be labelled."""

    model: ModelName
    input: Texts
    user: UserName = None
    truncate: Truncate = False
    max_length: MaxLength = None


class Classification(Reply):
    """What a classifier says of one text.

    `probs` are in the order of `labels`: a softmax for one label, sigmoids for several at once, the numbers
    themselves for regression.
    """

    index: int
    label: str
    probs: list[float]
    labels: list[str]
    num_classes: int
    num_tokens: int


class ClassifyReply(Reply):
    """Labels in the order of the texts."""

    id: str
    object: ListObject = "list"
    created: int
    model: str
    data: list[Classification]
    usage: Usage


SomeTexts = Annotated[
    str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)] | None,
    described_as(f"text or a list of at most {MAX_PROMPTS} texts"),
]


class ScoreRequest(Body):
    """How likely texts are.

    Either `input`, whole texts; or `text_1` and `text_2`, the likelihood of the second as continuation of the
    first: lists of the same length, or one text that goes with each of the other's.
    """

    model: ModelName
    input: Prompts | None = None
    text_1: SomeTexts = None
    text_2: SomeTexts = None
    normalization: Normalization = Field("sum", description="Of continuations, as in /v1/rank.")
    stride: int | None = Field(
        None,
        ge=1,
        description="Read texts longer than the context in windows that advance by so many tokens.",
    )
    return_tokens: bool = Field(False, description="With `input`: every token and its log-probability.")
    user: UserName = None


class TokenScore(Reply):
    """A token; the first of a text has no log-probability."""

    token: str
    token_id: int
    logprob: float | None


class Scored(Reply):
    """One text: `score` is the natural logarithm of its probability, normalized as asked for."""

    index: int
    object: Literal["score"] = "score"
    score: float
    logprob: float
    num_tokens: int
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tokens: list[TokenScore] | None = None


class ScoreReply(Reply):
    """Scores in the order of the texts."""

    id: str
    object: ListObject = "list"
    created: int
    model: str
    data: list[Scored]
    usage: Usage


class RankRequest(Body):
    """Continuations of a text to be put in order.

    Attributes:
        normalization: the score is the log-probability of a candidate's tokens (`sum`), that per token or per
            UTF-8 byte, or less the log-probability after `unconditional_text`.
    """

    model: ModelName
    text: str
    candidates: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, max_length=1024, fail_fast=True
    )
    normalization: Normalization = "sum"
    unconditional_text: str = ""
    user: UserName = None


class Ranked(Reply):
    """A candidate; `index` is its place in the request."""

    index: int
    candidate: str
    score: float
    logprob: float
    num_tokens: int


class RankReply(Reply):
    """Candidates, the likeliest first."""

    id: str
    object: ListObject = "list"
    created: int
    model: str
    data: list[Ranked]
