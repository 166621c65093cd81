"""The engine as a model of lm-evaluation-harness, under the name `modernbert-decoder`.

Responsible for the harness's conventions: how a request becomes token ids, what is cut where it is too long,
how generated text ends. The numbers are those of the harness's own `hf` model with a tokenizer that puts
`[CLS]` in front and no `[SEP]` behind. Importing this module registers the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import lm_eval.models  # registers the harness's own models, which it does only while none is registered
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from modernbert_decoder.engine.likelihoods import Likelihood
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.outputs import TextError
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.errors import InputError

MODEL_NAME: Final = "modernbert-decoder"
assert lm_eval.models is not None

_LOGGER: Final = logging.getLogger(__name__)
# Continuations that share one reading of their context; more wait for another.
_MAX_TOGETHER: Final = 64
_MAX_GENERATED_TOKENS: Final = 256  # the harness's own default
_LENGTH_KEYS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_KEYS: Final = ("top_k", "top_p", "min_p", "repetition_penalty")

Pair = tuple[list[int], list[int]]
"""Ids of a context and of its continuation."""


@register_model(MODEL_NAME)
class EngineModel(LM):  # type: ignore[misc]
    """A model of the harness that runs on the engine.

    Args:
        pretrained: a bundled name, a folder or a Hub id, as the harness calls it; or an open `LLM`.
        dtype: of the weights: "float32", "int8", "int4" or "w8a8".
        vocabulary_dtype: as in `LLM`.
        adapter: as in `LLM`.
        revision: as in `LLM`.
        max_length: the context; by default the model's.
        threads: as in `LLM`.
        max_batch_tokens: as in `LLM`, which makes batches by tokens, not by requests.
        add_bos_token: put `[CLS]` in front of texts, as every training sequence has it.
        seed: of tasks that sample; greedy ones need none.
        batch_size: what the harness passes to every model; the engine does not use it.
        max_batch_size: likewise.
        device: likewise: the engine runs on the CPU.

    Raises:
        InputError: an argument cannot be used, or the model is no language model.
    """

    def __init__(
        self,
        pretrained: str | LLM = "storyteller",
        *,
        dtype: str = "float32",
        vocabulary_dtype: str | None = None,
        adapter: str | None = None,
        revision: str | None = None,
        max_length: int | None = None,
        threads: int | None = None,
        max_batch_tokens: int = 512,
        add_bos_token: bool = True,
        seed: int = 1234,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, LLM):
            self.llm = pretrained
        else:
            self.llm = LLM(
                pretrained,
                dtype=dtype,
                vocabulary_dtype=vocabulary_dtype,
                adapter=adapter,
                revision=revision,
                max_context=max_length,
                threads=threads,
                max_batch_tokens=max_batch_tokens,
            )
        self._name = str(self.llm.folder)
        self._adds_cls = bool(add_bos_token)
        self._seed = seed
        tokenizer = self.llm.tokenizer
        self._cls_text = tokenizer.decode([tokenizer.cls_token_id], skip_special_tokens=False)

    @property
    def max_length(self) -> int:
        """Most tokens that are fed."""
        return self.llm.max_context

    @property
    def tokenizer_name(self) -> str:
        """Tells the tokenizer from others in the harness's cache of requests."""
        return self._name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {
            "model_num_parameters": self.llm.architecture.num_parameters(),
            "model_dtype": self.llm.scheme.name,
            "max_length": self.max_length,
            "add_bos_token": self._adds_cls,
        }

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether greedy decoding would write it."""
        texts = [request.args for request in requests]
        pairs = self._encoded_pairs(texts)
        answers: list[tuple[float, bool] | None] = [None] * len(pairs)
        with tqdm(total=len(pairs), desc="loglikelihood", disable=disable_tqdm) as bar:
            for index, likelihood in self._likelihoods(pairs):
                answer = (likelihood.logprob, likelihood.is_greedy)
                answers[index] = answer
                self.cache_hook.add_partial("loglikelihood", texts[index], answer)
                bar.update()
        return [answer for answer in answers if answer is not None]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, long ones in the harness's windows.

        As in `hf`, the text's own `[CLS]` is predicted too, after another one.
        """
        windows: list[Pair] = []
        counts: list[int] = []
        for request in requests:
            (text,) = request.args
            rolled = get_rolling_token_windows(
                token_list=self._encode(text),
                prefix_token=self.llm.tokenizer.cls_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [make_disjoint_window(window) for window in rolled]
            windows += own
            counts.append(len(own))
        logprobs = [0.0] * len(windows)
        with tqdm(total=len(windows), desc="loglikelihood_rolling", disable=disable_tqdm) as bar:
            for index, likelihood in self._likelihoods(windows):
                logprobs[index] = likelihood.logprob
                bar.update()
        totals, begin = list[float](), 0
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(logprobs[begin : begin + count]))
            begin += count
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text behind each context, up to the first of its stop strings."""
        prompts: list[list[int]] = []
        params: list[SamplingParams] = []
        for number, request in enumerate(requests):
            context, settings = request.args
            params.append(self._sampling_params(settings, number))
            room = self.max_length - (params[-1].max_tokens or 0)
            if room < 1:
                raise InputError(
                    f"{request.task_name} asks for {params[-1].max_tokens} tokens and the context holds "
                    f"{self.max_length}; set max_gen_toks in --gen_kwargs"
                )
            prompts.append(self._encode(context)[-room:])
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        texts = []
        for request, output, own in zip(requests, outputs, params, strict=True):
            text = output.outputs[0].text
            for stop in own.stop_strings:
                text = text.split(stop)[0]
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _sampling_params(self, settings: Mapping[str, Any], number: int) -> SamplingParams:
        """A task's `generation_kwargs` in the engine's terms.

        Raises:
            InputError: a setting that the engine does not have.
        """
        left = dict(settings)
        stops = left.pop("until", None) or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        lengths = [left.pop(key, None) for key in _LENGTH_KEYS]
        length = next((int(value) for value in lengths if value is not None), _MAX_GENERATED_TOKENS)
        temperature = float(left.pop("temperature", 0.0) or 0.0)
        samples = left.pop("do_sample", None)
        if samples is False or temperature == 0.0:
            temperature = 0.0
        own = {key: left.pop(key) for key in _SAMPLING_KEYS if key in left}
        if left:
            listed = ", ".join(f"{key}={value!r}" for key, value in left.items())
            raise InputError(f"the engine has no {listed}; leave it out of generation_kwargs")
        return SamplingParams(
            temperature=temperature,
            max_tokens=length,
            stop=[stop for stop in stops if stop],
            seed=None if temperature == 0.0 else self._seed + number,
            **own,
        )

    def _encode(self, text: str, *, adds_cls: bool | None = None) -> list[int]:
        return self._encode_all([text], adds_cls=adds_cls)[0]

    def _encode_all(self, texts: Sequence[str], *, adds_cls: bool | None = None) -> list[list[int]]:
        """Ids of texts; unless told so, a text that spells out its own `[CLS]` gets no other."""
        if not texts:
            return []
        encoded = self.llm.tokenizer.encode_batch(texts)
        return [
            ids if self._wants_cls(text, adds_cls) else ids[1:]
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _wants_cls(self, text: str, adds_cls: bool | None) -> bool:
        if adds_cls is not None:
            return adds_cls
        return self._adds_cls and not text.startswith(self._cls_text)

    def _encoded_pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """Contexts and continuations as ids, each distinct text encoded once.

        Spaces at the end of a context go to the continuation, and the continuation is what the whole text has
        beyond the context's own tokens. An empty context is `[CLS]`.
        """
        splits = [_without_final_spaces(*text) for text in texts]
        wanted = dict.fromkeys(
            part for context, continuation in splits if context for part in (context, context + continuation)
        )
        ids = dict(zip(wanted, self._encode_all(list(wanted)), strict=True))
        cls_token_id = self.llm.tokenizer.cls_token_id
        pairs: list[Pair] = []
        for context, continuation in splits:
            if context:
                own, whole = ids[context], ids[context + continuation]
                pairs.append((own, whole[len(own) :]))
            else:
                alone = self._encode(continuation, adds_cls=False)
                begins_anew = alone[:1] == [cls_token_id]
                pairs.append((alone[:1], alone[1:]) if begins_anew else ([cls_token_id], alone))
        return pairs

    def _likelihoods(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Likelihood]]:
        """The number of each pair and its likelihood, pairs of one context together."""
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (context, continuation) in enumerate(pairs):
            if not continuation:
                raise InputError(f"request {index} has no tokens to predict: its continuation is empty")
            surplus = len(context) + len(continuation) - (self.max_length + 1)
            if surplus > 0:
                _LOGGER.warning("request %d: %d tokens are cut off its beginning", index, surplus)
                if surplus >= len(context):
                    raise InputError(
                        f"request {index} has {len(continuation)} tokens to predict, more than the context "
                        f"of {self.max_length}"
                    )
            groups.setdefault(tuple(context[max(surplus, 0) :]), []).append((index, continuation))
        parts = [
            (context, group[begin : begin + _MAX_TOGETHER])
            for context, group in groups.items()
            for begin in range(0, len(group), _MAX_TOGETHER)
        ]
        results = self.llm.iter_likelihoods(
            (context, [continuation for _, continuation in group]) for context, group in parts
        )
        for (_, group), likelihoods in zip(parts, results, strict=True):
            if isinstance(likelihoods, TextError):
                raise InputError(f"request {group[0][0]}: {likelihoods.message}")
            for (index, _), likelihood in zip(group, likelihoods, strict=True):
                yield index, likelihood


def _without_final_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Both texts, with the spaces at the first one's end moved to the second.

    >>> _without_final_spaces("The king ", "rode")
    ('The king', ' rode')
    """
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
