"""`"zero-shot-classification"`: labels chosen at run time, by entailment or by likelihood.

A classifier trained on natural language inference judges whether the text entails each label's hypothesis, as
in transformers. A language model has no such judge: there the labels are ranked by how likely the model finds
them after the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, Final

import numpy as np

from modernbert_decoder.architecture import Head
from modernbert_decoder.engine.choices import NORMALIZATIONS
from modernbert_decoder.engine.probabilities import sigmoid, softmax
from modernbert_decoder.errors import InputError
from modernbert_decoder.pipelines.arguments import as_flag
from modernbert_decoder.pipelines.encoding import Encoding
from modernbert_decoder.pipelines.engine_pipeline import EnginePipeline, in_batches, require_text, unfailing
from modernbert_decoder.pipelines.text_classification import NO_CLASSIFIER, described

DEFAULT_TEMPLATE: Final = "This example is {}."
UNCONDITIONAL: Final = "unconditional"
# Between a text and the hypothesis that a language model continues.
_SEPARATOR: Final = "\n"
# Where two texts meet, both together may have a few tokens more than each by itself.
_TOKENS_OF_A_SEAM: Final = 8
# Of a tokenizer of bytes: four of UTF-8, and normalization makes three characters of some.
_MOST_TOKENS_PER_CHARACTER: Final = 12


class ZeroShotClassificationPipeline(EnginePipeline):
    """Sorts `candidate_labels` by how well they fit a text.

    A text gives `{"sequence": ..., "labels": [...], "scores": [...]}`, best label first.

    Arguments, at construction or in a call: `candidate_labels` (a list, or a string with commas; also the
    second positional argument), `hypothesis_template`, `multi_label`, `batch_size`, and for language models
    `normalization` (docs/pipelines.md): "unconditional", "sum", "token" or "byte".
    """

    task = "zero-shot-classification"
    parameters = frozenset({"candidate_labels", "hypothesis_template", "multi_label", "normalization"})
    advice: ClassVar[Mapping[str, str]] = {
        "multi_class": "it is called multi_label",
        "truncation": "the text is cut to what fits beside the hypothesis, which stays whole",
    }

    def __call__(
        self, inputs: Any, candidate_labels: Any = None, *, batch_size: int | None = None, **parameters: Any
    ) -> Any:
        """As `EnginePipeline.__call__`."""
        if candidate_labels is not None:
            parameters["candidate_labels"] = candidate_labels
        return super().__call__(inputs, batch_size=batch_size, **parameters)

    def _check_head(self, head: Head) -> None:
        if head is Head.NONE:
            raise InputError(f"{self.task}: {NO_CLASSIFIER.format(head=described(head))}")
        if head is Head.SEQUENCE_CLASSIFICATION:
            entailment_id(self.model.architecture.id2label)

    def _computation(
        self, given: Mapping[str, Any], batch_size: int | None
    ) -> Callable[[Iterable[Any]], Iterator[Any]]:
        parameters = {**self._parameters, **given}
        labels = parsed_labels(parameters.get("candidate_labels"))
        template = checked_template(parameters.get("hypothesis_template", DEFAULT_TEMPLATE), labels)
        is_multi_label = as_flag("multi_label", parameters.get("multi_label", False)) or len(labels) == 1
        normalization = parameters.get("normalization")
        if self.model.architecture.head is Head.SEQUENCE_CLASSIFICATION:
            if normalization is not None:
                raise InputError(
                    "normalization is for language models; this checkpoint is a classifier, which judges "
                    "entailment"
                )
            run = self._entailment(labels, template, is_multi_label=is_multi_label)
        else:
            run = self._likelihood(labels, template, normalization, is_multi_label=is_multi_label)
        return lambda items: in_batches(items, batch_size, run)

    def _entailment(
        self, labels: Sequence[str], template: str, *, is_multi_label: bool
    ) -> Callable[[Iterable[Any]], Iterator[Any]]:
        entailment = entailment_id(self.model.architecture.id2label)
        contradiction = -1 if entailment == 0 else 0
        encoding = Encoding.of({"truncation": "only_first"}, self.model)
        hypotheses = [template.format(label) for label in labels]

        def run(items: Iterable[Any]) -> Iterator[Any]:
            waiting: list[str] = []  # texts whose pairs the engine has taken and not answered

            def pairs() -> Iterator[list[int]]:
                for item in items:
                    text = require_text(item, task=self.task)
                    waiting.append(text)
                    yield from (encoding.ids(self.model, text, hypothesis) for hypothesis in hypotheses)

            outputs = unfailing(self.model.iter_classify(pairs()))
            for first in outputs:
                group = [first, *islice(outputs, len(labels) - 1)]
                logits = np.asarray([output.logits for output in group], np.float32)  # (labels, classes)
                if is_multi_label:
                    scores = softmax(logits[:, [contradiction, entailment]])[:, 1]
                else:
                    scores = softmax(logits[:, entailment])
                yield _record(waiting.pop(0), labels, scores.tolist())

        return run

    def _likelihood(
        self, labels: Sequence[str], template: str, normalization: Any, *, is_multi_label: bool
    ) -> Callable[[Iterable[Any]], Iterator[Any]]:
        normalization = UNCONDITIONAL if normalization is None else normalization
        if normalization not in NORMALIZATIONS:
            raise InputError(
                f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}"
            )
        if is_multi_label and normalization != UNCONDITIONAL:
            raise InputError(
                f"normalization is {normalization!r}, but labels that are judged one by one (multi_label, or "
                f"a single label) need {UNCONDITIONAL!r}, which says whether a text makes a label likelier"
            )
        stem, candidates = continuations(template, labels)
        ending = _SEPARATOR + stem
        whole_endings = self.tokenizer.encode_batch([ending + candidate for candidate in candidates])
        longest = max(map(len, whole_endings))  # [CLS] included

        def run(items: Iterable[Any]) -> Iterator[Any]:
            waiting: list[str] = []

            def questions() -> Iterator[tuple[str, Sequence[str]]]:
                for item in items:
                    text = require_text(item, task=self.task)
                    waiting.append(text)
                    yield self._cut(text, longest) + ending, candidates

            rankings = self.model.iter_rank(
                questions(),
                normalization=normalization,
                unconditional_text=stem if normalization == UNCONDITIONAL else "",
            )
            for ranking in unfailing(rankings):
                in_order = sorted(ranking, key=lambda entry: entry.index)
                values = np.asarray([entry.score for entry in in_order])
                scores = sigmoid(values) if is_multi_label else softmax(values)
                yield _record(waiting.pop(0), labels, scores.tolist())

        return run

    def _cut(self, text: str, longest: int) -> str:
        """The text, without what would not fit before its ending and the longest candidate together."""
        room = self.model.max_context - longest - _TOKENS_OF_A_SEAM
        if _MOST_TOKENS_PER_CHARACTER * len(text) <= room:
            return text
        ids = self.tokenizer.first_ids(text, max(room, 0) + 1)
        if len(ids) <= room:
            return text
        if room < 1:
            raise InputError(
                f"the hypothesis has up to {longest} tokens and leaves nothing of the context of "
                f"{self.model.max_context} to the text; shorten the labels"
            )
        return self.tokenizer.decode(ids[:room], skip_special_tokens=False)


def parsed_labels(labels: Any) -> list[str]:
    """The candidate labels as a list.

    Raises:
        InputError: none, or something that is no text.

    >>> parsed_labels("urgent, not urgent,")
    ['urgent', 'not urgent']
    """
    if isinstance(labels, str):
        labels = [part.strip() for part in labels.split(",") if part.strip()]
    if labels is None or not isinstance(labels, Iterable):
        raise InputError(f'candidate_labels must be a list of texts or "one, two, three", got {labels!r}')
    listed = list(labels)
    if not listed or not all(isinstance(label, str) and label for label in listed):
        raise InputError(f"candidate_labels must hold at least one text and nothing empty, got {listed!r}")
    return listed


def checked_template(template: Any, labels: Sequence[str]) -> str:
    """The hypothesis template, if a label changes what it says.

    Raises:
        InputError: no place for the label.
    """
    try:
        if isinstance(template, str) and template.format(labels[0]) != template:
            return template
    except (IndexError, KeyError, ValueError):
        pass
    raise InputError(f"hypothesis_template must be a text with {{}} where the label goes, got {template!r}")


def continuations(template: str, labels: Sequence[str]) -> tuple[str, list[str]]:
    """The beginning that all hypotheses share, without white space at its end, and what each label adds.

    >>> continuations("This example is {}.", ["good", "bad"])
    ('This example is', [' good.', ' bad.'])
    """
    mark = "\0"
    before = template.format(mark).split(mark)[0]
    stem = before.rstrip()
    return stem, [template.format(label)[len(stem) :] for label in labels]


def entailment_id(id2label: Mapping[int, str]) -> int:
    """The id of the first label whose name begins with "entail".

    Raises:
        InputError: there is none.
    """
    for label_id, label in id2label.items():
        if label.lower().startswith("entail"):
            return label_id
    raise InputError(
        f"zero-shot-classification needs a classifier with a label named entailment; this one has "
        f"{', '.join(id2label.values())}. Set id2label in its config.json, or use text-classification"
    )


def _record(text: str, labels: Sequence[str], scores: Sequence[float]) -> dict[str, Any]:
    """What a text gets; of equal scores the later label comes first, as in transformers."""
    order = np.argsort(np.asarray(scores))[::-1]
    return {
        "sequence": text,
        "labels": [labels[i] for i in order],
        "scores": [scores[i] for i in order],
    }
