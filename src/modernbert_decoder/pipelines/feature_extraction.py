"""`"feature-extraction"`: the final states of every token of a text.

One vector per text is another job: `LLM.embed` and `mbd embed` pool and normalise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from modernbert_decoder.architecture import Head
from modernbert_decoder.errors import InputError
from modernbert_decoder.pipelines.encoding import TOKENIZER_ADVICE, TOKENIZER_ARGUMENTS, Encoding
from modernbert_decoder.pipelines.engine_pipeline import EnginePipeline, in_batches, require_text, unfailing


class FeatureExtractionPipeline(EnginePipeline):
    """The states that the heads read, of every token, those of the template included.

    A text of T tokens gives a nested list (1, T, C), or with `return_tensors` (True or "np") a numpy array of
    that shape. Unlike transformers' batches, it is never padded to the longest of its neighbours.

    Arguments, at construction or in a call: `return_tensors`, `truncation`, `max_length`, `padding`,
    `tokenize_kwargs` (a dictionary of those three), `batch_size`.
    """

    task = "feature-extraction"
    parameters = frozenset({"return_tensors", "tokenize_kwargs"}) | TOKENIZER_ARGUMENTS
    advice: ClassVar[Mapping[str, str]] = TOKENIZER_ADVICE

    def _check_head(self, head: Head) -> None:
        """Every checkpoint has states."""

    def _computation(
        self, given: Mapping[str, Any], batch_size: int | None
    ) -> Callable[[Iterable[Any]], Iterator[Any]]:
        parameters = {**self._parameters, **given}
        encoding = Encoding.of(_tokenizer_arguments(parameters), self.model)
        return_tensors = parameters.get("return_tensors")
        if return_tensors not in (None, False, True, "np"):
            raise InputError(
                f'return_tensors must be True or "np" (numpy) or False (lists), got {return_tensors!r}; '
                'engine="torch" returns PyTorch tensors'
            )

        def extract(items: Iterable[Any]) -> Iterator[Any]:
            ids = (encoding.ids(self.model, require_text(item, task=self.task)) for item in items)
            for states in unfailing(self.model.iter_hidden_states(ids)):
                yield states[None] if return_tensors else [states.tolist()]

        return lambda items: in_batches(items, batch_size, extract)


def _tokenizer_arguments(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`truncation`, `max_length` and `padding`, from the call or from `tokenize_kwargs`."""
    given = parameters.get("tokenize_kwargs") or {}
    if not isinstance(given, Mapping) or set(given) - TOKENIZER_ARGUMENTS:
        raise InputError(
            f"tokenize_kwargs must be a dictionary of {', '.join(sorted(TOKENIZER_ARGUMENTS))}, got {given!r}"
        )
    direct = {name: parameters[name] for name in TOKENIZER_ARGUMENTS if name in parameters}
    if twice := sorted(direct.keys() & given.keys()):
        raise InputError(f"{twice[0]} is given twice: as an argument and in tokenize_kwargs; give it once")
    return {**direct, **given}
