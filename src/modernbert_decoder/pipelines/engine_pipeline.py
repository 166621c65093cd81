"""What all pipelines on the engine share: inputs of every kind, batches, and who closes the model.

One text gives one result, a list gives a list, any other iterable (a generator, a data set) gives an iterator
that takes texts as results are asked for. It does not know what a task computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from modernbert_decoder.architecture import Head
from modernbert_decoder.engine.outputs import TextError
from modernbert_decoder.errors import InputError
from modernbert_decoder.pipelines.arguments import as_count, refuse_unknown

if TYPE_CHECKING:
    from types import TracebackType

    from modernbert_decoder.engine.llm import LLM
    from modernbert_decoder.tokenizer import Tokenizer

Item = TypeVar("Item")
Result = TypeVar("Result")


class EnginePipeline(ABC):
    """A task on the engine.

    Attributes:
        task: its name, as in `pipeline(task)`.
        model: the `LLM` that runs it.
        batch_size: texts computed together; None leaves it to the engine.
    """

    task: ClassVar[str]
    parameters: ClassVar[frozenset[str]]
    """The arguments that the task understands, at construction and in each call."""
    advice: ClassVar[Mapping[str, str]] = {}
    """Arguments of transformers that it does not have -> what to use instead."""

    def __init__(self, model: LLM, *, batch_size: int | None = None, **parameters: Any) -> None:
        self.model = model
        self.batch_size = None if batch_size is None else as_count("batch_size", batch_size)
        self._owns_model = False
        self._check_head(model.architecture.head)
        self._parameters = self._checked(parameters)

    def own_model(self) -> Self:
        """Makes `close` close the model too; for models that were loaded for this pipeline."""
        self._owns_model = True
        return self

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.model.tokenizer

    def close(self) -> None:
        """Releases the model, unless it was handed over by the caller."""
        if self._owns_model:
            self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(task={self.task!r}, dtype={self.model.scheme.name!r})"

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **parameters: Any) -> Any:
        """The results of one text, of a list of texts, or, as an iterator, of any other iterable.

        Args:
            inputs: what the task reads.
            batch_size: instead of the one given at construction.
            **parameters: of the task, instead of those given at construction.

        Raises:
            InputError: arguments or texts that cannot be used.
        """
        size = self.batch_size if batch_size is None else as_count("batch_size", batch_size)
        compute = self._computation(self._checked(parameters), size)
        if isinstance(inputs, str | Mapping):
            return next(iter(compute([inputs])))
        if isinstance(inputs, list):
            return list(compute(inputs))
        if isinstance(inputs, tuple | bytes) or not (isinstance(inputs, Iterable) or _is_indexed(inputs)):
            raise InputError(
                f"{self.task} reads a text, a list of texts or an iterable that is not a tuple, got "
                f"{type(inputs).__name__}; pass list(...) of it"
            )
        return compute(iter(inputs))

    @abstractmethod
    def _check_head(self, head: Head) -> None:
        """Raises InputError if a checkpoint with this head cannot do the task."""

    @abstractmethod
    def _computation(
        self, given: Mapping[str, Any], batch_size: int | None
    ) -> Callable[[Iterable[Any]], Iterator[Any]]:
        """What turns inputs into results, lazily and in order, under the parameters given in a call.

        It has to respect those of the constructor, `self._parameters`, too.

        Raises:
            InputError: values that cannot be honoured.
        """

    def _checked(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        refuse_unknown(parameters, self.parameters, task=self.task, advice=self.advice)
        return dict(parameters)


def in_batches(
    items: Iterable[Item], size: int | None, run: Callable[[Iterable[Item]], Iterator[Result]]
) -> Iterator[Result]:
    """`run` on `size` items at a time, or on all of them in one stream where `size` is None."""
    if size is None:
        yield from run(items)
        return
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield from run(batch)


def unfailing(results: Iterable[Result | TextError]) -> Iterator[Result]:
    """The results; where a text could not be used, that is raised instead, as transformers does.

    Raises:
        InputError: what was wrong with the first such text.
    """
    for result in results:
        if isinstance(result, TextError):
            raise InputError(result.message)
        yield result


def require_text(value: object, *, task: str) -> str:
    """A text.

    Raises:
        InputError: anything else; chats are named as such.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and "role" in value:
        raise InputError(
            f"{task} got a chat message, but these models have no chat template; write the prompt as text"
        )
    raise InputError(f"{task} reads texts, got {type(value).__name__}: {str(value)[:60]!r}")


def _is_indexed(inputs: object) -> bool:
    """Whether it can be walked by number, as data sets of PyTorch are."""
    return hasattr(type(inputs), "__getitem__") and not isinstance(inputs, Sequence)
