"""What the engine gives back: completions, streamed pieces, labels, scores, vectors, rankings and timings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.errors import InputError


class Logprob(NamedTuple):
    """A token's natural-log probability in the raw model distribution, its rank (1 is best) and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: which of the request's `n` completions.
        text: without the prompt, the stop string and special tokens.
        token_ids: everything generated, a stop token included.
        cumulative_logprob: sum over `token_ids`; None unless `SamplingParams.logprobs` is set.
        logprobs: per token, token id -> `Logprob`, the chosen one first; None unless asked for.
        finish_reason: "stop" (end of text, stop string or stop token) or "length"; from an `AsyncLLM` also
            "timeout", and "aborted" where the engine was closed.
        stop_reason: the stop string or stop token id; None at the end of text or at "length".
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: str
    stop_reason: str | int | None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of a request's life, and the tokens they went into.

    Attributes:
        queue_seconds: from submission to a slot.
        prefill_seconds: from there to the first token.
        decode_seconds: from the first token of the first completion to the last of all.
        num_prompt_tokens: tokens of the prompt.
        num_output_tokens: tokens of all completions.
        num_completions: how many those are; the first token of each counts as prefill.
    """

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_completions: int

    @property
    def time_to_first_token_seconds(self) -> float:
        """From submission to the first token."""
        return self.queue_seconds + self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after each completion's first, per second of decoding; 0 where there were none."""
        num_decoded = self.num_output_tokens - self.num_completions
        return num_decoded / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its completions, in order of `index`.

    Attributes:
        prompt: the text, or None where token ids were given.
        prompt_token_ids: what the model was fed, `[CLS]` included.
        outputs: `SamplingParams.n` completions.
        timings: of the whole request.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    timings: Timings


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What one step added to one completion; `text` is empty while a character or a stop string is open.

    Attributes:
        index: which completion.
        text: new text, safe to show.
        token_ids: new tokens.
        logprobs: as in `CompletionOutput`, for the new tokens.
        finish_reason: set on the completion's last chunk.
        stop_reason: as in `CompletionOutput`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: str | None
    stop_reason: str | int | None


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probability of every token of a text given those before it.

    Attributes:
        token_ids: `[CLS]` and the text.
        logprobs: natural logarithms, one per token after the first.
        num_bytes: UTF-8 bytes of the text; of token ids, those that the tokens after the first stand for,
            special tokens none.
        top_logprobs: for each of `logprobs`, the (token id, log-probability) of the most likely tokens in
            its place, in order; None unless asked for.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    num_bytes: int
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that have a log-probability."""
        return len(self.logprobs)

    @property
    def total_logprob(self) -> float:
        """The log-probability of the whole text."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-probability; not a number where no token is scored."""
        if not self.logprobs:
            return math.nan
        mean = -self.total_logprob / len(self.logprobs)
        try:
            return math.exp(mean)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Negative log-probability in bits per UTF-8 byte; not a number where there is no byte."""
        return -self.total_logprob / math.log(2) / self.num_bytes if self.num_bytes else math.nan


@dataclass(frozen=True, slots=True)
class ClassificationOutput:
    """What a classifier says of one text.

    Attributes:
        num_tokens: tokens read, those of the template included.
        logits: one per label, in the order of the model's `id2label`.
        probabilities: softmax of the logits for a single label, sigmoid of each for several labels at once;
            for regression the logits themselves.
        label: the one with the greatest logit.
    """

    num_tokens: int
    logits: tuple[float, ...]
    probabilities: tuple[float, ...]
    label: str


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingOutput:
    """One text as a vector.

    Attributes:
        num_tokens: tokens read, those of the template included.
        embedding: (C,).
    """

    num_tokens: int
    embedding: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RankedCandidate:
    """One continuation of a text, and how likely it is.

    Attributes:
        index: its place among the candidates given.
        candidate: as given.
        num_tokens: the tokens it adds to the text.
        total_logprob: log-probability of those tokens given the text.
        score: `total_logprob` under the normalization asked for.
    """

    index: int
    candidate: str
    num_tokens: int
    total_logprob: float
    score: float


@dataclass(frozen=True, slots=True)
class TextError:
    """What stands in the place of a result where one of many texts could not be used.

    Attributes:
        message: what was wrong with it.
        on_command_line: the same with the command line's names of arguments, where they differ.
    """

    message: str
    on_command_line: str | None = None

    @classmethod
    def of(cls, error: InputError) -> TextError:
        """What this error says."""
        message, told = str(error), error.on_command_line()
        return cls(message, None if told == message else told)
