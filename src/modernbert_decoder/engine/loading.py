"""From a checkpoint to a runtime: graph and weights in the scheme asked for, and the limits of the two.

This module puts them together; it knows nothing of requests or texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.architecture import DecoderArchitecture, Head
from modernbert_decoder.checkpoint import Checkpoint
from modernbert_decoder.engine.batch_invariance import Pairs
from modernbert_decoder.engine.calls import Stepwise
from modernbert_decoder.engine.graph_cache import cached_graph
from modernbert_decoder.engine.prompts import checked_integer, is_integer
from modernbert_decoder.engine.runtime import PromptModel, Runtime
from modernbert_decoder.engine.selective import divided_projection, is_worthwhile
from modernbert_decoder.engine.session import CPU_PROVIDER
from modernbert_decoder.engine.weights import load_weights, rotary_tables
from modernbert_decoder.errors import InputError
from modernbert_decoder.machine import MAX_THREADS
from modernbert_decoder.quantization import QuantizationScheme
from modernbert_decoder.spellings import CLASS_NAMES

_HEAD_NAMES: Final = {
    Head.CAUSAL_LM: "a language-model head",
    Head.SEQUENCE_CLASSIFICATION: "a classification head",
    Head.NONE: "no head",
}


def context_of(max_context: Any, architecture: DecoderArchitecture) -> int:
    """The context asked for, or the model's own.

    Raises:
        InputError: more than the model has, or less than 2.
    """
    limit = architecture.max_position_embeddings
    if max_context is None:
        return limit
    if not is_integer(max_context) or not 2 <= max_context <= limit:
        raise InputError(f"max_context must be an integer from 2 to the model's {limit}, got {max_context!r}")
    return int(max_context)


def check_sizes(*, threads: Any, providers: Any, **sizes: Any) -> None:
    """Checks the constructor's numbers and names.

    Raises:
        InputError: one that cannot be used.
    """
    for name, value in sizes.items():
        checked_integer(name, value, 1)
    if threads is not None and checked_integer("threads", threads, 1) > MAX_THREADS:
        raise InputError(f"threads must be at most {MAX_THREADS}, got {threads}")
    is_list = isinstance(providers, Sequence) and not isinstance(providers, str)
    if providers is not None and not (is_list and all(isinstance(name, str) for name in providers)):
        raise InputError(f"providers must be a list of names such as {[CPU_PROVIDER]}, got {providers!r}")


def require_head(architecture: DecoderArchitecture, head: Head, *, model: str, job: str) -> None:
    """Refuses a job that takes another head than the checkpoint has.

    Raises:
        InputError: it has another one.
    """
    if architecture.head is not head:
        raise InputError(
            f"{model} has {_HEAD_NAMES[architecture.head]} and cannot {job}, which takes "
            f"{_HEAD_NAMES[head]}; load a {CLASS_NAMES[head]} checkpoint"
        )


def open_checkpoint(folder: Path, adapter: str | Path | None) -> Checkpoint:
    """The checkpoint in a folder, with a LoRA adapter merged in where one is given.

    Raises:
        UserError: either of them cannot be used.
    """
    checkpoint = Checkpoint.open(folder)
    if adapter is None:
        return checkpoint
    from modernbert_decoder.engine.adapters import with_adapter

    return with_adapter(checkpoint, adapter)


def open_runtime(
    checkpoint: Checkpoint,
    scheme: QuantizationScheme,
    *,
    num_slots: int,
    context_length: int,
    threads: int,
    providers: Sequence[str] | None,
    num_stepwise: int = 0,
    prompt_scheme: QuantizationScheme | None = None,
) -> Runtime:
    """A runtime on the checkpoint's weights, taken from the cache folder or put there.

    If it is ever batch-invariant, it computes up to `num_stepwise` tokens of a row as if one by one. Prompts
    are read with weights in `prompt_scheme`, if that is another one.
    """
    architecture = checkpoint.architecture
    is_selective = is_worthwhile(architecture)
    build = partial(cached_graph, architecture, num_positions=context_length)
    is_for_pieces = architecture.head is not Head.CAUSAL_LM  # nothing is generated
    graph = build(scheme, is_for_pieces=is_for_pieces, is_selective=is_selective)
    tables = rotary_tables(architecture, context_length)
    weights = load_weights(checkpoint, scheme, threads=threads)
    if is_selective:
        weights = divided_projection(weights, architecture, scheme)
    stepwise = None
    if num_stepwise and architecture.head is Head.CAUSAL_LM:  # others have nothing to verify
        num_steps = num_stepwise + num_stepwise % 2  # as calls may be padded to pairs
        stepwise = Stepwise(partial(build, scheme, num_stepwise=num_steps), num_steps)
    prompt_model = None
    if prompt_scheme is not None and prompt_scheme != scheme:
        prompt_weights = load_weights(checkpoint, prompt_scheme, threads=threads)
        prompt_model = PromptModel(
            build(prompt_scheme, is_for_pieces=True), {**prompt_weights, **tables}, Pairs.of(prompt_scheme)
        )
    return Runtime(
        architecture,
        graph,
        {**weights, **tables},
        num_slots=num_slots,
        context_length=context_length,
        threads=threads,
        providers=tuple(providers or (CPU_PROVIDER,)),
        is_selective=is_selective,
        pairs=Pairs.of(scheme),
        stepwise=stepwise,
        prompt_model=prompt_model,
    )
