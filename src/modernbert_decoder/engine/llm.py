"""`LLM`: a checkpoint ready to generate, stream, score, rank, classify and embed, without PyTorch.

It puts together checkpoint, tokenizer, runtime, scheduler and reader, says which jobs a checkpoint's head
can do, and shapes what callers get back. One `LLM` may be used from several threads and by several open
streams and jobs at once: they take turns, and whoever waits for a result drives the scheduler.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.architecture import Head
from modernbert_decoder.checkpoint import find_checkpoint
from modernbert_decoder.engine.completing import Completions, one_for_each
from modernbert_decoder.engine.driver import Driver
from modernbert_decoder.engine.kv_cache import KVCache
from modernbert_decoder.engine.likelihoods import Continued, Likelihood, Likelihoods
from modernbert_decoder.engine.loading import (
    check_sizes,
    context_of,
    open_checkpoint,
    open_runtime,
    require_head,
)
from modernbert_decoder.engine.outputs import (
    ClassificationOutput,
    CompletionOutput,
    EmbeddingOutput,
    Logprob,
    RankedCandidate,
    RequestOutput,
    Score,
    StreamChunk,
    TextError,
    Timings,
)
from modernbert_decoder.engine.prefix_cache import PrefixCache
from modernbert_decoder.engine.progress import progress_bar
from modernbert_decoder.engine.prompts import Prompt, Text, as_list, checked_integer
from modernbert_decoder.engine.ranking import Ranking
from modernbert_decoder.engine.reading import Reader
from modernbert_decoder.engine.reading_jobs import Classification, Embedding, HiddenStates, TemplateEncoder
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.engine.scheduler import Scheduler
from modernbert_decoder.engine.scoring import Scoring
from modernbert_decoder.engine.speculation import Speculation, open_speculator
from modernbert_decoder.engine.structured import Constraints, StructuredOutput
from modernbert_decoder.engine.weights import resolve_scheme
from modernbert_decoder.errors import InputError
from modernbert_decoder.machine import usable_threads
from modernbert_decoder.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "ClassificationOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "Logprob",
    "RankedCandidate",
    "RequestOutput",
    "Score",
    "StreamChunk",
    "TextError",
    "Timings",
]

DEFAULT_MAX_SLOTS: Final = 32
DEFAULT_CHUNK_SIZE: Final = 256

Result = TypeVar("Result")


class LLM:
    """A ModernBERT decoder on ONNX Runtime: a language model, a classifier or the bare model.

    Language models generate, score and rank; classifiers classify; all of them embed.

    Args:
        model: `"storyteller"` (bundled), a folder, or a Hub id such as `"jhu-clsp/ettin-decoder-17m"`.
        dtype: "float32", "int8", "int4" or "w8a8"; by default int8, or what a packed folder holds. "w8a8",
            products of 8-bit integers, reads texts fastest (docs/design.md).
        vocabulary_dtype: another format for the embedding and vocabulary matrix; "int4" there is the pure
            4-bit model, smaller and faster than the default of int4, and less exact (docs/benchmarks.md).
        prefill_dtype: of the layers, as `dtype`, while prompts of completions are read; by default the same.
            "w8a8" reads faster than int8 and int4, which decode faster; the model is then in memory twice.
            Texts that are scored, ranked, classified or embedded are read in `dtype`.
        adapter: a folder with a LoRA adapter in PEFT's format, merged in before weights are rounded.
        revision: branch, tag or commit on the Hub.
        cache_dir: where Hub downloads are kept.
        threads: for the kernels; by default the processors this process may use.
        max_slots: most completions computed at a time; further ones wait.
        max_context: most tokens of prompt and completion together; by default the model's own limit.
        chunk_size: prompt tokens per step: smaller ones delay running streams less, larger ones are faster.
        max_batch_tokens: most tokens of a batch of texts that are classified, embedded, scored or ranked,
            padding included; by default 512, and 256 for classifiers and bare models of the smallest sizes,
            whose batches are each read by one thread where there are enough of them. More is not faster on
            processors: the batch then leaves their caches.
        prefix_cache_bytes: memory for the beginnings of earlier texts: prompts that share one do not compute
            it again. 0 keeps none.
        speculation: guess several tokens ahead and verify them in one step. What is generated does not
            depend on the guesses, but for rounding (see `Speculation`).
        batch_invariant: complete a prompt alike, to the last bit, whatever is computed beside it, however it
            is cut into chunks, and whether or not the prefix cache knows its beginning. Otherwise int8 and
            int4 sum the odd token of a step in another order, which rounding makes up to a few hundredths of
            a log-probability, so that texts part at close choices. It costs a token more in steps of an odd
            number (a stream that is alone computes two), the prefix cache keeps prompts only, no
            completions, and with `speculation` weights are packed twice. Not covered are other machines, and
            texts that are only read, beside others of the same call.
        providers: ONNX Runtime execution providers, in order of preference.
        show_progress: draw progress bars while downloading, if standard error is a terminal.

    Raises:
        ModelNotFoundError, ConfigurationError, CheckpointError: the model cannot be used as it is.
        InputError: an argument out of its range.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str | None = None,
        vocabulary_dtype: str | None = None,
        prefill_dtype: str | None = None,
        adapter: str | Path | None = None,
        revision: str | None = None,
        cache_dir: Path | None = None,
        threads: int | None = None,
        max_slots: int = DEFAULT_MAX_SLOTS,
        max_context: int | None = None,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        max_batch_tokens: int | None = None,
        prefix_cache_bytes: int = 0,
        speculation: Speculation | None = None,
        batch_invariant: bool = False,
        providers: Sequence[str] | None = None,
        show_progress: bool = True,
    ) -> None:
        check_sizes(
            threads=threads,
            providers=providers,
            max_slots=max_slots,
            chunk_size=chunk_size,
            **({} if max_batch_tokens is None else {"max_batch_tokens": max_batch_tokens}),
        )
        checked_integer("prefix_cache_bytes", prefix_cache_bytes, 0)
        folder = find_checkpoint(model, revision=revision, cache_dir=cache_dir, show_progress=show_progress)
        checkpoint = open_checkpoint(folder, adapter)
        self.architecture = checkpoint.architecture
        self.max_context = context_of(max_context, self.architecture)
        self.tokenizer = Tokenizer.from_folder(folder, self.architecture)
        self.scheme = resolve_scheme(checkpoint, dtype, vocabulary_dtype)
        self.prefill_scheme = self.scheme
        if prefill_dtype is not None:
            require_head(self.architecture, Head.CAUSAL_LM, model=str(model), job="complete prompts")
            asked = resolve_scheme(checkpoint, prefill_dtype, None, name="prefill_dtype")
            self.prefill_scheme = replace(asked, vocabulary=self.scheme.vocabulary)
        self.threads = int(threads or usable_threads())
        self.folder = folder
        self._model = str(model)
        self._runtime = open_runtime(
            checkpoint,
            self.scheme,
            num_slots=max_slots,
            context_length=self.max_context,
            threads=self.threads,
            providers=providers,
            num_stepwise=0 if speculation is None else speculation.max_draft + 1,
            prompt_scheme=self.prefill_scheme,
        )
        ends = {*checkpoint.eos_token_ids, self.tokenizer.sep_token_id}
        eos_token_ids = sorted(token_id for token_id in ends if token_id is not None)
        self._constraints = Constraints(
            self.tokenizer, vocab_size=self.architecture.vocab_size, eos_token_ids=eos_token_ids
        )
        self._speculator = (
            None
            if speculation is None
            else open_speculator(
                speculation,
                self._runtime,
                self.tokenizer,
                chunk_size=chunk_size,
                threads=self.threads,
                providers=providers,
                cache_dir=cache_dir,
                show_progress=show_progress,
            )
        )
        scheduler = Scheduler(
            self._runtime,
            eos_token_ids=eos_token_ids,
            chunk_size=chunk_size,
            prefix_cache=PrefixCache(self._runtime.cache, max_bytes=prefix_cache_bytes)
            if prefix_cache_bytes
            else None,
            speculator=self._speculator,
        )
        self._driver = Driver(scheduler)
        self.batch_invariant = batch_invariant
        scheduler.is_batch_invariant = batch_invariant
        self._completions = Completions(
            self._driver,
            tokenizer=self.tokenizer,
            architecture=self.architecture,
            max_context=self.max_context,
            constraints=self._constraints,
            model=self._model,
        )
        self._reader = Reader(
            self._runtime,
            self._driver,
            max_batch_tokens=max_batch_tokens,
            context_length=self.max_context,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Completes every prompt, in batches as slots allow; results come in the order of the prompts.

        Args:
            prompts: text (`[CLS]` is put in front, nothing behind) or token ids (used as they are), one or
                many.
            sampling_params: for all prompts, or one for each; by default `SamplingParams()`.
            use_tqdm: draw a progress bar on standard error.

        Raises:
            InputError: an empty prompt, ids outside the vocabulary, or a prompt and `max_tokens` that do not
                fit the context.
        """
        listed = as_list(prompts)
        params = one_for_each(sampling_params, len(listed))
        return self._completions.run(listed, params, description="generate" if use_tqdm else None)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[StreamChunk, None, None]:
        """Completes one prompt, yielding what each step adds; closing the generator ends the request.

        The prompt is checked when this is called, the work is done as the generator is advanced.

        Raises:
            InputError: as for `generate`.
        """
        return self._completions.stream(prompt, sampling_params or SamplingParams())

    def classify(
        self,
        texts: Text | Sequence[Text],
        *,
        truncate: bool = False,
        max_length: int | None = None,
        use_tqdm: bool = False,
    ) -> list[ClassificationOutput]:
        """Labels and probabilities of texts, pairs of texts or token ids, in their order.

        Args:
            texts: one or many. Text takes the tokenizer's template, `[CLS] text [SEP]`; a pair is a tuple of
                two; token ids are used as they are, without padding ids at their end.
            truncate: cut what is longer than `max_length`; otherwise that is an error.
            max_length: most tokens of a text, those of the template included; by default the context.
            use_tqdm: draw a progress bar on standard error.

        Raises:
            InputError: the checkpoint has no classification head, or a text cannot be used.
        """
        listed = as_list(texts)
        outputs = self.iter_classify(listed, truncate=truncate, max_length=max_length)
        return collected(outputs, len(listed), "classify" if use_tqdm else None)

    def iter_classify(
        self, texts: Iterable[Text], *, truncate: bool = False, max_length: int | None = None
    ) -> Iterator[ClassificationOutput | TextError]:
        """`classify` for any number of texts, lazily and in bounded memory; bad texts give a `TextError`."""
        self._require(Head.SEQUENCE_CLASSIFICATION, "classify")
        encoder = self._template_encoder(truncate=truncate, max_length=max_length)
        return self._reader.read(texts, Classification(encoder, self.architecture))

    def embed(
        self,
        texts: Text | Sequence[Text],
        *,
        pooling: str = "last",
        normalize: bool = True,
        truncate: bool = False,
        max_length: int | None = None,
        use_tqdm: bool = False,
    ) -> NDArray[np.float32]:
        """Vectors (texts, width) of texts, pairs of texts or token ids: states after the final norm.

        Args:
            texts: as in `classify`.
            pooling: "last" takes the last token's state, "mean" the mean over all tokens.
            normalize: scale every vector to length 1.
            truncate: as in `classify`.
            max_length: as in `classify`.
            use_tqdm: draw a progress bar on standard error.

        Raises:
            InputError: another pooling, or a text that cannot be used.
        """
        listed = as_list(texts)
        outputs = self.iter_embed(
            listed, pooling=pooling, normalize=normalize, truncate=truncate, max_length=max_length
        )
        vectors = np.empty((len(listed), self.architecture.hidden_size), np.float32)
        for i, output in enumerate(collected(outputs, len(listed), "embed" if use_tqdm else None)):
            vectors[i] = output.embedding
        return vectors

    def iter_embed(
        self,
        texts: Iterable[Text],
        *,
        pooling: str = "last",
        normalize: bool = True,
        truncate: bool = False,
        max_length: int | None = None,
    ) -> Iterator[EmbeddingOutput | TextError]:
        """`embed` for any number of texts, lazily and in bounded memory; bad texts give a `TextError`."""
        encoder = self._template_encoder(truncate=truncate, max_length=max_length)
        return self._reader.read(texts, Embedding(encoder, pooling=pooling, normalize=normalize))

    def hidden_states(
        self,
        texts: Text | Sequence[Text],
        *,
        truncate: bool = False,
        max_length: int | None = None,
        use_tqdm: bool = False,
    ) -> list[NDArray[np.float32]]:
        """States (tokens, width) of every token of each text, after the final norm; texts as in `embed`."""
        listed = as_list(texts)
        states = self.iter_hidden_states(listed, truncate=truncate, max_length=max_length)
        return collected(states, len(listed), "states" if use_tqdm else None)

    def iter_hidden_states(
        self, texts: Iterable[Text], *, truncate: bool = False, max_length: int | None = None
    ) -> Iterator[NDArray[np.float32] | TextError]:
        """`hidden_states` for any number of texts, lazily; bad texts give a `TextError`."""
        encoder = self._template_encoder(truncate=truncate, max_length=max_length)
        return self._reader.read(texts, HiddenStates(encoder))

    def score(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        stride: int | None = None,
        top_logprobs: int = 0,
        use_tqdm: bool = False,
    ) -> list[Score]:
        """The log-probability of every token of each text given the tokens before it.

        Args:
            texts: as the prompts of `generate`: `[CLS]` is put in front of text and is not scored itself.
            stride: texts longer than the context are read in windows that start with `[CLS]` and begin
                `stride` tokens after each other; every token is scored once, with at least
                `max_context - stride` tokens before it. Without it such texts are refused.
            top_logprobs: how many of the most likely tokens to report at each place.
            use_tqdm: draw a progress bar on standard error.

        Raises:
            InputError: the checkpoint has no language-model head, or a text cannot be used.
        """
        listed = as_list(texts)
        scores = self.iter_score(listed, stride=stride, top_logprobs=top_logprobs)
        return collected(scores, len(listed), "score" if use_tqdm else None)

    def iter_score(
        self, texts: Iterable[Prompt], *, stride: int | None = None, top_logprobs: int = 0
    ) -> Iterator[Score | TextError]:
        """`score` for any number of texts, lazily and in bounded memory; bad texts give a `TextError`."""
        self._require(Head.CAUSAL_LM, "score")
        job = Scoring(
            self.tokenizer,
            vocab_size=self.architecture.vocab_size,
            context=self.max_context,
            stride=stride,
            num_top=top_logprobs,
        )
        return self._reader.read(texts, job)

    def rank(
        self,
        text: str,
        candidates: Sequence[str],
        *,
        normalization: str = "sum",
        unconditional_text: str = "",
    ) -> list[RankedCandidate]:
        """How likely each candidate is to continue the text, the greatest score first.

        A candidate's tokens are those that tokenizing text and candidate together adds to the text's own;
        spaces at the end of the text go to the candidate, as words are tokenized with the space before them.

        Args:
            text: what stands before; "" is `[CLS]` alone.
            candidates: what may follow.
            normalization: the score is the log-probability of the candidate's tokens ("sum"), that per token
                ("token") or per UTF-8 byte ("byte"), or less the log-probability of the same continuation
                after `unconditional_text` ("unconditional").
            unconditional_text: "" is `[CLS]` alone.

        Raises:
            InputError: the checkpoint has no language-model head, or an argument cannot be used.
        """
        ranked = self.iter_rank(
            [(text, candidates)], normalization=normalization, unconditional_text=unconditional_text
        )
        return collected(ranked, 1, None)[0]

    def iter_rank(
        self,
        items: Iterable[tuple[str, Sequence[str]]],
        *,
        normalization: str = "sum",
        unconditional_text: str = "",
    ) -> Iterator[list[RankedCandidate] | TextError]:
        """`rank` for any number of texts with candidates, lazily; bad ones give a `TextError`."""
        self._require(Head.CAUSAL_LM, "rank")
        job = Ranking(
            self.tokenizer,
            vocab_size=self.architecture.vocab_size,
            context=self.max_context,
            normalization=normalization,
            unconditional_text=unconditional_text,
        )
        return self._reader.read(items, job)

    def iter_likelihoods(self, items: Iterable[Continued]) -> Iterator[list[Likelihood] | TextError]:
        """How probable given tokens are after given others, for any number of contexts, lazily.

        Args:
            items: token ids of a context, used as they are, and those of each of its continuations. What
                they have in common is read once.

        Raises:
            InputError: the checkpoint has no language-model head.
        """
        self._require(Head.CAUSAL_LM, "score")
        job = Likelihoods(vocab_size=self.architecture.vocab_size, context=self.max_context)
        return self._reader.read(items, job)

    def check_structured(self, structured: StructuredOutput) -> object:
        """Compiles structured output, which takes its time; requests that ask for it later find it done.

        Returns:
            What was compiled. Until it is dropped, it is certain to be found.

        Raises:
            InputError: it cannot be compiled, or llguidance is not installed.
        """
        return self._constraints.compiled(structured)

    @property
    def cache(self) -> KVCache:
        """The slots and their bytes."""
        return self._runtime.cache

    @property
    def formats(self) -> str:
        """The format of the weights, as `int8`, and that in which prompts are read if it is another one."""
        if self.prefill_scheme == self.scheme:
            return self.scheme.name
        return f"{self.scheme.name}, prompts in {self.prefill_scheme.body_name}"

    @property
    def network_seconds(self) -> float:
        """Time spent inside the network so far; the rest of a call's time is scheduling and sampling."""
        return self._runtime.network_seconds

    def close(self) -> None:
        """Releases the sessions and the cache; the object cannot be used afterwards.

        Open streams, and calls of other threads, end with `EngineClosedError`.
        """
        if not self._driver.is_closed:
            self._driver.close()
            self._reader.close()
            if self._speculator is not None:
                self._speculator.close()
            self._runtime.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _template_encoder(self, *, truncate: bool, max_length: int | None) -> TemplateEncoder:
        return TemplateEncoder(
            self.tokenizer,
            self.architecture,
            context=self.max_context,
            truncate=truncate,
            max_length=max_length,
        )

    def _require(self, head: Head, job: str) -> None:
        """Refuses a job that needs another head than the checkpoint has, and any job after `close`."""
        self._driver.check_open()
        require_head(self.architecture, head, model=self._model, job=job)


def collected(
    outputs: Iterable[Result | TextError], count: int, description: str | None = None
) -> list[Result]:
    """All results, or the first error."""
    progress = progress_bar(description, count)
    results: list[Result] = []
    try:
        for output in outputs:
            if isinstance(output, TextError):
                which = f"text {len(results)}: " if count > 1 else ""
                raise InputError(which + output.message)
            results.append(output)
            progress.update(1)
    finally:
        progress.close()
    return results
