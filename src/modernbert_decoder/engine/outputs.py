"""What the engine gives back: completions, streamed pieces, scores and how long each phase took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


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
        finish_reason: "stop" (end of text, stop string or stop token) or "length".
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
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total_logprob(self) -> float:
        """The log-probability of the whole text."""
        return sum(self.logprobs)
