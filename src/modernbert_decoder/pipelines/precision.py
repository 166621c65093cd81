"""What a `dtype` argument means for the engine: Hugging Face's names, PyTorch's objects, our formats.

It loads no PyTorch: an object whose text is "torch.float16" is enough.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from modernbert_decoder.checkpoint import QUANTIZATION_KEY
from modernbert_decoder.config_keys import load_config
from modernbert_decoder.errors import InputError
from modernbert_decoder.pipelines.arguments import warn_caller
from modernbert_decoder.quantization import DTYPES

AUTO: Final = "auto"
_FULL: Final = "float32"
_HALF: Final = ("float16", "bfloat16")
_OTHER_SPELLINGS: Final = {
    "float": _FULL,
    "fp32": _FULL,
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
}


def dtype_name(dtype: Any) -> str:
    """The name of a dtype given as a name, as a PyTorch object or as None.

    Raises:
        InputError: something else.

    >>> dtype_name("torch.float16"), dtype_name(None)
    ('float16', 'auto')
    """
    if dtype is None:
        return AUTO
    text = str(dtype)
    if not isinstance(dtype, str) and not text.startswith("torch."):
        raise InputError(f'dtype must be a name such as "float32" or a torch.dtype, got {dtype!r}')
    name = text.removeprefix("torch.")
    return _OTHER_SPELLINGS.get(name, name)


def engine_dtype(name: str, folder: Path) -> str | None:
    """The engine's format for a dtype name: None is what a packed folder holds.

    `"auto"` is the checkpoint's own precision, which for all floating-point weights is computed in float32.
    Asking for float16 or bfloat16 is answered with float32 and a warning.

    Raises:
        InputError: a format that the engine does not have.
    """
    if name == AUTO:
        return None if load_config(folder / "config.json").get(QUANTIZATION_KEY) is not None else _FULL
    if name in _HALF:
        warn_caller(f"{name} is computed as float32 on the CPU; smaller and faster formats are int8 and int4")
        return _FULL
    if name not in DTYPES:
        raise InputError(
            f"dtype {name!r} is not available; the engine has {', '.join(DTYPES)}, takes float16 and "
            'bfloat16 as float32, and "auto" as the precision of the checkpoint'
        )
    return name
