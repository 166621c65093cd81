"""`pipeline(...)`: which task, which wing, and every argument either honoured or refused by name.

The arguments are those of transformers' function of that name. Tasks and models are other modules' business.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from modernbert_decoder.architecture import Head
from modernbert_decoder.checkpoint import find_checkpoint
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.errors import InputError
from modernbert_decoder.pipelines.arguments import OTHER_WAY, refuse_unknown, without_unset
from modernbert_decoder.pipelines.devices import CPU, device_name, engine_providers
from modernbert_decoder.pipelines.engine_pipeline import EnginePipeline
from modernbert_decoder.pipelines.feature_extraction import FeatureExtractionPipeline
from modernbert_decoder.pipelines.precision import AUTO, dtype_name, engine_dtype
from modernbert_decoder.pipelines.text_classification import TextClassificationPipeline
from modernbert_decoder.pipelines.text_generation import TextGenerationPipeline
from modernbert_decoder.pipelines.zero_shot_classification import ZeroShotClassificationPipeline

ENGINE: Final = "onnxruntime"
TORCH: Final = "torch"
_TASKS: Final[Mapping[str, type[EnginePipeline]]] = {
    each.task: each
    for each in (
        TextGenerationPipeline,
        TextClassificationPipeline,
        ZeroShotClassificationPipeline,
        FeatureExtractionPipeline,
    )
}
TASKS: Final = tuple(_TASKS)
ALIASES: Final[Mapping[str, str]] = {"sentiment-analysis": "text-classification"}
_TASK_OF_HEAD: Final[Mapping[Head, str]] = {
    Head.CAUSAL_LM: TextGenerationPipeline.task,
    Head.SEQUENCE_CLASSIFICATION: TextClassificationPipeline.task,
    Head.NONE: FeatureExtractionPipeline.task,
}
# Arguments of LLM that model_kwargs may hold; the others have names of their own in `pipeline`.
_MODEL_ARGUMENTS: Final = frozenset(
    {"vocabulary_dtype", "prefill_dtype", "cache_dir", "threads", "max_slots", "max_context", "chunk_size"}
    | {"max_batch_tokens", "providers", "show_progress"}
)
_MODEL_ADVICE: Final = {
    "dtype": "give it to pipeline itself",
    "torch_dtype": "give dtype to pipeline itself",
    "revision": "give it to pipeline itself",
    "attn_implementation": "it has one attention, windowed as the model's; leave it out",
    "low_cpu_mem_usage": "weights are memory-mapped; leave it out",
    "use_cache": "it always keeps a cache; leave it out",
    "quantization_config": 'use dtype="int8" or dtype="int4"',
}
# Arguments of transformers' function that mean nothing to the engine -> what to do instead.
_TORCH_ONLY: Final[Mapping[str, str]] = {
    "config": "put config.json into the model's folder",
    "tokenizer": "put tokenizer.json into the model's folder",
    "feature_extractor": "these models read text",
    "image_processor": "these models read text",
    "video_processor": "these models read text",
    "processor": "these models read text",
    "use_fast": "its tokenizers are always the fast ones; leave it out",
    "token": "set HF_TOKEN, or run `hf auth login`",
    "device_map": "use device",
    "trust_remote_code": "it never runs code of a repository; leave it out",
    "pipeline_class": "call the class itself",
    "num_workers": 'it computes in threads: model_kwargs={"threads": ...}',
    "binary_output": "use return_tensors",
    "assistant_model": "leave it out",
}


class Pipeline(Protocol):
    """What `pipeline` returns, on either wing."""

    @property
    def task(self) -> Any:
        """The name of the task."""

    def __call__(self, *inputs: Any, **parameters: Any) -> Any:
        """Results for a text, a list of texts, or lazily for an iterable."""


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: Any = None,
    tokenizer: Any = None,
    *,
    feature_extractor: Any = None,
    image_processor: Any = None,
    video_processor: Any = None,
    processor: Any = None,
    framework: str | None = None,
    revision: str | None = None,
    use_fast: bool = True,
    token: str | bool | None = None,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = AUTO,
    trust_remote_code: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    pipeline_class: Any = None,
    engine: str | None = None,
    adapter: str | Path | None = None,
    batch_size: int | None = None,
    **kwargs: Any,
) -> Pipeline:
    """A ready task: `pipeline("text-generation", model="storyteller")("Once upon a time")`.

    It runs on our engine, without PyTorch. `engine="torch"`, a GPU as `device`, or a PyTorch model object
    selects transformers' own pipeline with this package's PyTorch classes (extra `torch`).

    Args:
        task: "text-generation", "text-classification" ("sentiment-analysis"), "zero-shot-classification" or
            "feature-extraction"; by default what the checkpoint's head is for.
        model: "storyteller", a folder, a Hub id, an open `LLM`, or a PyTorch model.
        config: PyTorch only.
        tokenizer: PyTorch only; the engine accepts the model's own name.
        feature_extractor: PyTorch only.
        image_processor: PyTorch only.
        video_processor: PyTorch only.
        processor: PyTorch only.
        framework: "pt" is another spelling of `engine="torch"`.
        revision: branch, tag or commit on the Hub.
        use_fast: PyTorch only.
        token: PyTorch only.
        device: -1, "cpu" or nothing: the CPU. A GPU (0, "cuda:0", "mps"): PyTorch.
        device_map: PyTorch only.
        dtype: "auto", the checkpoint's precision (float16 and bfloat16 weights are computed in float32), or
            "float32", "int8", "int4", "w8a8"; "float16" and "bfloat16", by name or as PyTorch objects, are
            taken as float32 with a warning.
        trust_remote_code: PyTorch only.
        model_kwargs: further arguments of `LLM` (`threads`, `max_slots`, `max_context`, ...), or of
            `from_pretrained` for PyTorch.
        pipeline_class: PyTorch only.
        engine: "onnxruntime" or "torch"; by default chosen by `device` and `model`.
        adapter: a folder with a LoRA adapter in PEFT's format, merged with the model when it is loaded;
            engine only.
        batch_size: texts computed together; by default the engine's own choice.
        **kwargs: parameters of the task, which every call can override.

    Raises:
        InputError: an argument that cannot be honoured; its message says what to use.
        ModelNotFoundError, ConfigurationError, CheckpointError: the model cannot be used as it is.
    """
    task = _known_task(task)
    if model is None:
        raise InputError('model is missing; name one, for instance model="storyteller"')
    if "torch_dtype" in kwargs:
        dtype = _old_spelling(dtype, kwargs.pop("torch_dtype"))
    for_torch = {
        "config": config,
        "tokenizer": tokenizer,
        "feature_extractor": feature_extractor,
        "image_processor": image_processor,
        "video_processor": video_processor,
        "processor": processor,
        "use_fast": None if use_fast is True else use_fast,
        "token": token,
        "device_map": device_map,
        "trust_remote_code": trust_remote_code or None,
        "pipeline_class": pipeline_class,
    }
    given = {**without_unset(for_torch), **kwargs}
    name = device_name(device)
    if _chosen_engine(engine, framework, model, name) == TORCH:
        _refuse_adapter(adapter)
        shared = {"revision": revision, "model_kwargs": model_kwargs, "batch_size": batch_size}
        return _on_torch(task, model, name, dtype, {**given, **without_unset(shared)})
    _refuse_torch_only(model, given)
    llm = _open(model, name, dtype, revision, adapter, model_kwargs or {})
    given.pop("tokenizer", None)
    try:
        kind = _TASKS[task or _TASK_OF_HEAD[llm.architecture.head]]
        built = kind(llm, batch_size=batch_size, **given)
    except BaseException:
        if llm is not model:
            llm.close()
        raise
    return built if llm is model else built.own_model()


def _known_task(task: str | None) -> str | None:
    task = ALIASES.get(task, task) if isinstance(task, str) else task
    if task is not None and task not in _TASKS:
        raise InputError(f"task {task!r} is not available; the tasks are {', '.join((*_TASKS, *ALIASES))}")
    return task


def _old_spelling(dtype: Any, torch_dtype: Any) -> Any:
    """`torch_dtype`, as `dtype` was called before transformers 4.56."""
    if dtype_name(dtype) != AUTO:
        raise InputError("torch_dtype is the old spelling of dtype; give one of them")
    return torch_dtype


def _chosen_engine(engine: str | None, framework: str | None, model: Any, device: str | None) -> str:
    """Which wing runs: what was asked for, else PyTorch for its own models and for GPUs."""
    if engine not in (None, ENGINE, TORCH):
        raise InputError(f"engine must be {ENGINE!r} or {TORCH!r}, got {engine!r}")
    if framework not in (None, "pt"):
        raise InputError(f'framework must be "pt" (PyTorch) or left out, got {framework!r}')
    is_torch_model = _is_torch_model(model)
    if engine == ENGINE and (framework == "pt" or is_torch_model):
        what = 'framework="pt"' if framework else "a PyTorch model"
        raise InputError(f"engine={ENGINE!r} and {what} exclude each other; leave one out")
    if engine is not None:
        return engine
    wants_gpu = device not in (None, CPU)
    return TORCH if framework == "pt" or is_torch_model or wants_gpu else ENGINE


def _is_torch_model(model: Any) -> bool:
    if isinstance(model, str | Path | LLM):
        return False
    if any(base.__module__.partition(".")[0] == "torch" for base in type(model).__mro__):
        return True
    raise InputError(f"model must be a name, a folder, an LLM or a PyTorch model, got {type(model).__name__}")


def _on_torch(
    task: str | None, model: Any, device: str | None, dtype: Any, arguments: Mapping[str, Any]
) -> Pipeline:
    from modernbert_decoder.pipelines.torch_pipeline import torch_pipeline

    if task is None:
        raise InputError(f"task is missing; with PyTorch it has to be named: {', '.join(_TASKS)}")
    if isinstance(model, LLM):
        raise InputError("model is an LLM, which PyTorch cannot run; pass its checkpoint's name or folder")
    built: Pipeline = torch_pipeline(task, model, device=device, dtype=dtype_name(dtype), arguments=arguments)
    return built


def _refuse_adapter(adapter: Any) -> None:
    if adapter is not None:
        raise InputError(
            "adapter is the engine's own argument; with PyTorch, load the model with peft "
            "(PeftModel.from_pretrained(model, adapter).merge_and_unload()) and pass the object as model"
        )


def _refuse_torch_only(model: Any, given: Mapping[str, Any]) -> None:
    for name, instead in _TORCH_ONLY.items():
        is_own_tokenizer = name == "tokenizer" and str(given.get(name)) == str(model)
        if given.get(name) is not None and not is_own_tokenizer:
            raise InputError(f"{name} is not available in the engine; {instead}. {OTHER_WAY}")


def _open(
    model: Any,
    device: str | None,
    dtype: Any,
    revision: str | None,
    adapter: str | Path | None,
    arguments: Mapping[str, Any],
) -> LLM:
    """The model on the engine; an open one as it is."""
    if isinstance(model, LLM):
        is_given = device not in (None, CPU) or dtype_name(dtype) != AUTO or bool(arguments)
        if is_given or revision is not None or adapter is not None:
            raise InputError(
                "model is an open LLM: device, dtype, revision, adapter and model_kwargs are decided; leave "
                "them out"
            )
        return model
    refuse_unknown(arguments, _MODEL_ARGUMENTS, task="model_kwargs", advice=_MODEL_ADVICE)
    arguments = dict(arguments)
    place = {name: arguments.pop(name) for name in ("cache_dir", "show_progress") if name in arguments}
    folder = find_checkpoint(model, revision=revision, **place)
    if device is not None and device != CPU:
        arguments.setdefault("providers", engine_providers(device))
    return LLM(folder, dtype=engine_dtype(dtype_name(dtype), folder), adapter=adapter, **arguments)
