"""Tokens, models and the server's own state. Shapes of vLLM's server, and OpenAI's for models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from modernbert_decoder.serving.protocol.base import MAX_TOKEN_IDS, Body, Reply, TokenId

OptionalModelName = Annotated[str | None, Field(description="By default the first model.")]
NONE_WHILE_LOADING = "Extension; null while the model is being loaded."


class TokenizeRequest(Body):
    """Text to be cut into tokens."""

    model: OptionalModelName = None
    prompt: str
    add_special_tokens: bool = Field(True, description="Put [CLS] in front, as completions do.")
    return_token_strs: bool = False


class TokenizeReply(Reply):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Tokens to be put together."""

    model: OptionalModelName = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)]


class DetokenizeReply(Reply):
    """The text of tokens, special ones by name."""

    prompt: str


class ModelCard(Reply):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "modernbert-decoder"
    parent: str | None = Field(description="Extension: the model that this one is with an adapter.")
    ready: bool = Field(description="Extension: whether it has been loaded.")
    task: Literal["generate", "classify", "embed"] | None = Field(description=NONE_WHILE_LOADING)
    head: Literal["causal_lm", "sequence_classification", "none"] | None = Field(
        description=NONE_WHILE_LOADING
    )
    dtype: str | None = Field(description=NONE_WHILE_LOADING)
    max_model_len: int | None = Field(description="Extension: most tokens of prompt and completion.")
    vocab_size: int | None = Field(description=NONE_WHILE_LOADING)
    hidden_size: int | None = Field(description=NONE_WHILE_LOADING)
    num_parameters: int | None = Field(description=NONE_WHILE_LOADING)
    labels: list[str] | None = Field(description="Extension: of a classifier, in the order of `probs`.")
    problem_type: str | None = Field(description="Extension: of a classifier.")
    has_chat_template: bool | None = Field(description=NONE_WHILE_LOADING)
    capabilities: list[Literal["completions", "chat", "embeddings", "classify", "score", "rank"]] = Field(
        description="Extension: what it can be asked for; empty while it is being loaded."
    )
    max_logprobs: int = Field(description="Extension: most alternatives per token.")


class ModelList(Reply):
    """All models, those included that are still being loaded."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Reply):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(Reply):
    """Whether requests are taken."""

    status: Literal["ready", "starting", "draining", "failed", "stalled"]
    models: dict[str, bool] = Field(description="Name and whether it has been loaded.")
    reason: str | None = Field(None, description="Of `stalled`: which engine does not come to its end.")
