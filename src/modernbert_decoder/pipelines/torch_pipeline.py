"""transformers' own pipeline on this package's PyTorch classes, for GPUs and for what the engine does not do.

It prepares the call (classes, device, tokenizer) and hands everything else on; PyTorch is loaded inside the
functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.checkpoint import BUNDLED_MODEL, find_checkpoint
from modernbert_decoder.errors import InputError
from modernbert_decoder.pipelines.precision import AUTO
from modernbert_decoder.quantization import DTYPES

_OURS_ALONE: Final = frozenset(DTYPES) - {"float32"}


def torch_pipeline(
    task: str, model: Any, *, device: str | None, dtype: str, arguments: Mapping[str, Any]
) -> Any:
    """A pipeline of transformers with our classes.

    Args:
        task: as transformers calls it.
        model: the bundled model's name, a folder, a Hub id, or a model object.
        device: as `devices.device_name` gives it.
        dtype: as `precision.dtype_name` gives it.
        arguments: for transformers' `pipeline`, unchanged.

    Raises:
        InputError: PyTorch or the device is not there, a format of the engine is asked for, or for a model
            object another dtype than its own.
    """
    _require_torch(device)
    if device is not None:
        _require_device(device)
    if dtype in _OURS_ALONE:
        raise InputError(
            f"dtype {dtype!r} is a format of the engine; leave engine and device out, or take a torch dtype"
        )
    import transformers

    from modernbert_decoder.pytorch import register_auto_classes

    register_auto_classes()
    if isinstance(model, str | Path):
        named = find_checkpoint(model) if model == BUNDLED_MODEL else Path(model).expanduser()
        model = str(named) if named.is_dir() else str(model)
        arguments = {**arguments, "dtype": dtype}
    else:
        _require_dtype(model, dtype)
    if device is not None:
        arguments = {**arguments, "device": int(device) if device.isdecimal() else device}
    build: Any = transformers.pipeline
    built = build(task=task, model=model, **arguments)
    if task == "text-generation":
        prompt_without_sep(built.tokenizer)
    return built


def prompt_without_sep(tokenizer: Any) -> None:
    """Makes a transformers tokenizer feed `[CLS] text`: the file's template ends a prompt with `[SEP]`, after
    which the model believes the text to be over.
    """
    from tokenizers.processors import TemplateProcessing

    name = tokenizer.cls_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[name, "$A"], pair=None, special_tokens=[(name, tokenizer.cls_token_id)]
    )


def _require_dtype(model: Any, dtype: str) -> None:
    """A model object stays as it is in transformers, whatever dtype is asked for."""
    own = str(getattr(model, "dtype", "unknown")).removeprefix("torch.")
    if dtype not in (AUTO, own):
        raise InputError(
            f"dtype {dtype!r} comes too late: the model is loaded, as {own}; leave dtype out, or load or "
            "convert the model with it beforehand"
        )


def _require_torch(device: str | None) -> None:
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        wanted = 'engine="torch"' if device is None else f"device {device!r}"
        raise InputError(
            f"{wanted} needs PyTorch, and {' and '.join(missing)} is not installed: "
            'pip install "modernbert-decoder[torch]", or leave engine and device out to run on the CPU'
        )


def _require_device(name: str) -> None:
    """The device must be there: transformers would take the CPU in its place."""
    import torch

    kind, _, index = ("cuda", "", name) if name.isdecimal() else name.partition(":")
    backends: dict[str, Any] = {"cpu": None, "cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}
    if kind not in backends or (index and not index.isdecimal()):
        raise InputError(f'device {name!r} is not known; use "cpu", a number, "cuda:0", "xpu:0" or "mps"')
    count = 1 if kind == "cpu" else int(backends[kind].device_count())
    if count == 0 and name.isdecimal():
        count = max(int(torch.xpu.device_count()), int(torch.mps.device_count()))
    if int(index or 0) >= count:
        raise InputError(
            f"device {name!r} is not available: PyTorch sees {count or 'no'} such device"
            f'{"s" if count > 1 else ""} here; leave the device out, or use device="cpu"'
        )
