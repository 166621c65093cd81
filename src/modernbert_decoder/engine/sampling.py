"""From a row of logits to a token: one `RequestSampler` per completion, with its history and random stream.

It knows one completion only: not the batch, not the scheduler, not the text. What to do is decided when a
sampler is constructed, so that a step does no more than its request asked for.

Order, as in vLLM: [raw log-probabilities are taken], mask of structured output, logit bias, ban of end tokens
before `min_tokens`, penalties, temperature, min-p, top-k, top-p, one uniform draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.engine.selection import (
    Row,
    Workspace,
    draw,
    exponential_weights,
    keep_nucleus,
    log_sum_exp,
    nucleus_size,
    rank_of,
    top_k_ids,
)
from modernbert_decoder.engine.structured import Matcher
from modernbert_decoder.errors import CheckpointError, InputError

__all__ = ["RequestSampler", "SampledToken", "SamplingParams", "TokenCounts", "Workspace", "penalize"]

# A nucleus is first looked for among so many most likely tokens: usually enough, and cheap to order.
_FIRST_NUCLEUS = 64


class SampledToken(NamedTuple):
    """A chosen token; what follows the id is None unless `SamplingParams.logprobs` asked for it.

    Attributes:
        token_id: The token.
        logprob: Its log-probability in the raw model distribution.
        rank: Its place in that distribution, 1 for the most likely; ties count by ascending id.
        top: The (token id, log-probability) of the most likely tokens in that order, `logprobs` of them.
    """

    token_id: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] | None = None


class TokenCounts:
    """The distinct tokens seen so far and how often each was output, as two parallel growing arrays.

    >>> counts = TokenCounts([7, 7, 3])
    >>> counts.add(7); counts.add(9)
    >>> counts.ids.tolist(), counts.output_counts.tolist()
    ([3, 7, 9], [0.0, 1.0, 1.0])
    """

    __slots__ = ("_counts", "_ids", "_places")

    def __init__(self, prompt_ids: Iterable[int] = ()) -> None:
        ids = sorted(set(prompt_ids))
        self._places = {token_id: place for place, token_id in enumerate(ids)}
        capacity = len(ids) + 64
        self._ids = np.zeros(capacity, np.intp)
        self._ids[: len(ids)] = ids
        self._counts = np.zeros(capacity, np.float32)

    @property
    def ids(self) -> NDArray[np.intp]:
        """The distinct tokens, in the order of their first appearance after those of the prompt."""
        return self._ids[: len(self._places)]

    @property
    def output_counts(self) -> NDArray[np.float32]:
        """How often each of `ids` was output; 0 for those of the prompt alone."""
        return self._counts[: len(self._places)]

    def add(self, token_id: int) -> None:
        """Counts one output token."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token_id
        self._counts[place] += 1


def penalize(row: Row, counts: TokenCounts, *, repetition: float, presence: float, frequency: float) -> None:
    """Applies the three penalties to `row` in place: repetition to all tokens seen, the others to output."""
    ids = counts.ids
    values = row[ids]
    if repetition != 1.0:
        values = np.where(values > 0, values / np.float32(repetition), values * np.float32(repetition))
    if presence != 0.0 or frequency != 0.0:
        output_counts = counts.output_counts
        values -= np.float32(frequency) * output_counts
        values -= np.float32(presence) * (output_counts > 0)
    row[ids] = values


class RequestSampler:
    """Chooses the tokens of one completion, in order.

    With a seed, the stream depends on the seed and `index` alone, and every token of a request that is not
    greedy takes exactly one number from it: neighbours in a batch and earlier requests change nothing.

    Args:
        params: Valid for this vocabulary (`SamplingParams.validate_against`).
        prompt_ids: The prompt's token ids, which the repetition penalty looks at.
        eos_token_ids: The model's end-of-text ids, banned before `min_tokens`.
        index: Which of the request's `n` completions this is.
        workspace: Scratch memory, to be shared by the samplers that one thread uses.
        matcher: Says what structured output allows; this sampler's own.
    """

    __slots__ = (
        "_banned_ids",
        "_bias_ids",
        "_bias_values",
        "_counts",
        "_generator",
        "_is_argmax_only",
        "_is_banning",
        "_is_greedy",
        "_is_processing",
        "_matcher",
        "_params",
        "_workspace",
        "num_output_tokens",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        eos_token_ids: Iterable[int],
        workspace: Workspace,
        index: int = 0,
        matcher: Matcher | None = None,
    ) -> None:
        self._params = params
        self._matcher = matcher
        self._workspace = workspace
        self._is_greedy = params.is_greedy
        # A spawn key, not [seed, index]: that would give seed 5 + 7 * 2**32 the stream of index 7 of seed 5.
        self._generator = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence(params.seed, spawn_key=(index,)))
        )
        self.num_output_tokens = 0
        biases = params.logit_bias or {}
        self._bias_ids = np.fromiter(biases.keys(), np.intp)
        self._bias_values = np.fromiter(biases.values(), np.float32)
        self._banned_ids = np.array(sorted({*(params.stop_token_ids or ()), *eos_token_ids}), np.intp)
        self._is_banning = params.min_tokens > 0 and len(self._banned_ids) > 0
        repeats = params.repetition_penalty != 1.0
        self._counts: TokenCounts | None = None
        if repeats or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            self._counts = TokenCounts(prompt_ids if repeats else ())
        self._decide_path()

    def _decide_path(self) -> None:
        is_restricted = self._matcher is not None or self._is_banning
        self._is_processing = is_restricted or self._counts is not None or len(self._bias_ids) > 0
        self._is_argmax_only = self._is_greedy and not self._is_processing and self._params.logprobs is None

    def sample(self, logits: Row) -> SampledToken:
        """Chooses the next token and remembers it.

        Args:
            logits: The model's raw logits, float32 (V,), contiguous; not modified.

        Raises:
            CheckpointError: The logits are not numbers.
            InputError: The request forbids every token.
        """
        if self._is_argmax_only:
            token_id = int(logits.argmax())  # the first NaN, if there is one
            if not math.isfinite(logits[token_id]):
                raise _no_choice(logits)
            self.num_output_tokens += 1
            return SampledToken(token_id)
        row = self._processed(logits) if self._is_processing else logits
        token_id, leading = self._choose(row, logits)
        self._remember(token_id)
        if self._params.logprobs is None:
            return SampledToken(token_id)
        if row is not logits or len(leading) < self._params.logprobs:
            leading = top_k_ids(logits, self._params.logprobs)
        return self._with_logprobs(token_id, logits, leading)

    def _processed(self, logits: Row) -> Row:
        row = self._workspace.processed
        np.copyto(row, logits)
        if self._matcher is not None:
            self._matcher.restrict(row)
        if len(self._bias_ids) > 0:
            row[self._bias_ids] += self._bias_values
        if self._is_banning:
            self._ban(row)
        if self._counts is not None:
            params = self._params
            penalize(
                row,
                self._counts,
                repetition=params.repetition_penalty,
                presence=params.presence_penalty,
                frequency=params.frequency_penalty,
            )
        return row

    def _ban(self, row: Row) -> None:
        """Forbids end tokens, unless structured output is complete and allows nothing else."""
        banned = row[self._banned_ids]
        row[self._banned_ids] = -np.inf
        if self._matcher is not None and row.max() == -np.inf:
            row[self._banned_ids] = banned

    def _remember(self, token_id: int) -> None:
        self.num_output_tokens += 1
        if self._matcher is not None:
            self._matcher.accept(token_id)
        if self._counts is not None:
            self._counts.add(token_id)
        if self._is_banning and self.num_output_tokens >= self._params.min_tokens:
            self._is_banning = False
            self._decide_path()

    def _choose(self, row: Row, logits: Row) -> tuple[int, NDArray[np.intp]]:
        """The token, and as many of the row's most likely ids, in order, as had to be found anyway."""
        if 0 < self._params.top_k < len(row) and not self._is_greedy:
            return self._choose_of_few(row, logits)
        place = row.argmax()
        peak = row[place]
        if not math.isfinite(peak):
            raise _no_choice(logits)
        if self._is_greedy:
            return int(place), np.empty(0, np.intp)
        return self._choose_of_all(row, peak, self._generator.random())

    def _choose_of_few(self, row: Row, logits: Row) -> tuple[int, NDArray[np.intp]]:
        params = self._params
        if not math.isfinite(row.max()):
            raise _no_choice(logits)
        leading = top_k_ids(row, max(params.top_k, params.logprobs or 0))
        uniform = self._generator.random()
        candidates = row[leading[: params.top_k]].astype(np.float64)
        weights = np.exp((candidates - candidates[0]) / params.temperature)
        if params.min_p > 0.0:
            weights = weights[weights >= params.min_p]
        if params.top_p < 1.0:
            cumulative = weights.cumsum()
            weights = weights[: nucleus_size(cumulative, params.top_p * float(cumulative[-1]))]
        return int(leading[draw(weights, uniform)]), leading

    def _choose_of_all(self, row: Row, peak: np.float32, uniform: float) -> tuple[int, NDArray[np.intp]]:
        params = self._params
        weights = exponential_weights(row, peak, params.temperature, out=self._workspace.weights)
        if params.min_p > 0.0:
            np.multiply(weights, weights >= np.float32(params.min_p), out=weights)
        if params.top_p >= 1.0:
            return draw(weights, uniform), np.empty(0, np.intp)
        mass = params.top_p * float(weights.sum())
        leading = top_k_ids(row, max(_FIRST_NUCLEUS, params.logprobs or 0))
        few = weights[leading[:_FIRST_NUCLEUS]]
        cumulative = np.cumsum(few, dtype=np.float64)
        if cumulative[-1] >= mass:
            return int(leading[draw(few[: nucleus_size(cumulative, mass)], uniform)]), leading
        keep_nucleus(self._workspace, mass)
        return draw(weights, uniform), leading

    def _with_logprobs(self, token_id: int, logits: Row, leading: NDArray[np.intp]) -> SampledToken:
        wanted = self._params.logprobs
        assert wanted is not None
        peak = logits[leading[0]] if len(leading) else logits.max()
        if not math.isfinite(peak):
            raise _no_choice(logits)
        total = log_sum_exp(logits, peak, scratch=self._workspace.weights)
        ids: list[int] = leading.tolist()
        rank = ids.index(token_id) + 1 if token_id in ids else rank_of(logits, token_id)
        values: list[float] = logits[leading[:wanted]].tolist()
        top = tuple((top_id, value - total) for top_id, value in zip(ids, values, strict=False))
        return SampledToken(token_id, float(logits[token_id]) - total, rank, top)


def _no_choice(logits: Row) -> CheckpointError | InputError:
    """The reason why no token can be chosen, as an exception to raise."""
    if np.isnan(logits).any():
        return CheckpointError(
            "the model produced NaN logits; its weights are damaged: fetch or convert them again"
        )
    if not np.isfinite(logits.max()):
        return CheckpointError(
            "the model produced infinite logits; its weights are damaged: fetch or convert them again"
        )
    return InputError(
        "no token is left to choose from: logit_bias and min_tokens (which forbids the end-of-text token and "
        "stop_token_ids) together, or logit_bias and structured output, forbid the whole vocabulary; relax "
        "one of them"
    )
