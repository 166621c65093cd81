"""`"text-classification"`: labels and scores of texts and pairs, shaped as transformers shapes them.

It turns the engine's logits into scores; how they are computed is the engine's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final

import numpy as np

from modernbert_decoder.architecture import DecoderArchitecture, Head
from modernbert_decoder.engine.outputs import ClassificationOutput
from modernbert_decoder.engine.probabilities import Floats, sigmoid, softmax
from modernbert_decoder.errors import InputError
from modernbert_decoder.pipelines.arguments import OTHER_WAY, as_count
from modernbert_decoder.pipelines.encoding import TOKENIZER_ADVICE, TOKENIZER_ARGUMENTS, Encoding
from modernbert_decoder.pipelines.engine_pipeline import EnginePipeline, in_batches, require_text, unfailing

NO_CLASSIFIER: Final = (
    "the checkpoint has no trained classifier (it is {head}), and the engine does not invent one; fine-tune "
    "a ModernBertDecoderForSequenceClassification first. "
    + OTHER_WAY
    + ", which start a random one with a warning"
)


class TextClassificationPipeline(EnginePipeline):
    """Classifies texts, and pairs given as `{"text": ..., "text_pair": ...}`.

    One text gives `[{"label": ..., "score": ...}]`, a list one such dictionary per text. With `top_k` (an
    integer, or None for all labels) every text gives a list of them, best first.

    Arguments, at construction or in a call: `top_k`, `function_to_apply` ("sigmoid", "softmax", "none",
    "default"), `truncation`, `max_length`, `padding`, `batch_size`.
    """

    task = "text-classification"
    parameters = frozenset({"top_k", "function_to_apply"}) | TOKENIZER_ARGUMENTS
    advice: ClassVar[Mapping[str, str]] = {
        **TOKENIZER_ADVICE,
        "return_all_scores": "use top_k=None",
    }

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **parameters: Any) -> Any:
        """As `EnginePipeline.__call__`; a single string without `top_k` in the call gives a list of one."""
        result = super().__call__(inputs, batch_size=batch_size, **parameters)
        return [result] if isinstance(inputs, str) and "top_k" not in parameters else result

    def _check_head(self, head: Head) -> None:
        if head is not Head.SEQUENCE_CLASSIFICATION:
            raise InputError(f"{self.task}: {NO_CLASSIFIER.format(head=described(head))}")

    def _computation(
        self, given: Mapping[str, Any], batch_size: int | None
    ) -> Callable[[Iterable[Any]], Iterator[Any]]:
        parameters = {**self._parameters, **given}
        encoding = Encoding.of(parameters, self.model)
        function = score_function(parameters.get("function_to_apply"), self.model.architecture)
        all_labels = "top_k" in parameters
        top_k = parameters.get("top_k")
        if top_k is not None:
            as_count("top_k", top_k)
        id2label = self.model.architecture.id2label

        def record(output: ClassificationOutput) -> Any:
            scores = function(np.asarray(output.logits, np.float32))
            if not all_labels:
                best = int(scores.argmax())
                return {"label": id2label[best], "score": float(scores[best])}
            listed: list[dict[str, Any]] = [
                {"label": id2label[i], "score": float(score)} for i, score in enumerate(scores)
            ]
            return sorted(listed, key=lambda entry: entry["score"], reverse=True)[:top_k]

        def classify(items: Iterable[Any]) -> Iterator[Any]:
            ids = (encoding.ids(self.model, *text_and_pair(item, task=self.task)) for item in items)
            return map(record, unfailing(self.model.iter_classify(ids)))

        return lambda items: in_batches(items, batch_size, classify)


def described(head: Head) -> str:
    """What a checkpoint with this head is."""
    return {
        Head.CAUSAL_LM: "a language model",
        Head.SEQUENCE_CLASSIFICATION: "a classifier",
        Head.NONE: "a bare decoder",
    }[head]


def text_and_pair(item: Any, *, task: str) -> tuple[str, str | None]:
    """The text of an input and, if it is a pair, the second text.

    Raises:
        InputError: neither a text, nor a `{"text", "text_pair"}`, nor the old `[["a", "b"]]`.
    """
    if isinstance(item, Mapping) and "role" not in item:
        if "text" not in item or set(item) - {"text", "text_pair"}:
            raise InputError(
                f'{task}: a pair is {{"text": ..., "text_pair": ...}}, got the keys {sorted(map(str, item))}'
            )
        pair = item.get("text_pair")
        return require_text(item["text"], task=task), None if pair is None else require_text(pair, task=task)
    if isinstance(item, list):
        if len(item) == 1 and isinstance(item[0], list) and len(item[0]) == 2:
            first, second = item[0]
            return require_text(first, task=task), require_text(second, task=task)
        raise InputError(
            f'{task}: write a pair as {{"text": "...", "text_pair": "..."}}, not as the list {str(item)[:60]}'
        )
    return require_text(item, task=task), None


def score_function(name: Any, architecture: DecoderArchitecture) -> Callable[[Floats], Floats]:
    """What turns logits (num_labels,) into scores: the named function, or the problem type's own.

    Raises:
        InputError: an unknown name.
    """
    if name is None or (isinstance(name, str) and name.lower() == "default"):
        name = _default_function(architecture)
    functions = {"sigmoid": sigmoid, "softmax": softmax, "none": lambda logits: logits}
    if not isinstance(name, str) or name.lower() not in functions:
        raise InputError(f"function_to_apply must be default, sigmoid, softmax or none, got {name!r}")
    return functions[name.lower()]


def _default_function(architecture: DecoderArchitecture) -> str:
    if architecture.problem_type == "regression":
        return "none"
    if architecture.problem_type == "multi_label_classification" or len(architecture.id2label) == 1:
        return "sigmoid"
    return "softmax"
