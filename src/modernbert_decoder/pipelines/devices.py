"""What a device is called in Hugging Face's arguments, and what the engine can use of it.

A device is never substituted by another: what is not there is an error. It loads neither PyTorch nor
ONNX Runtime before it has to ask them.
"""

from __future__ import annotations

import numbers
from typing import Any, Final

from modernbert_decoder.errors import InputError

CPU: Final = "cpu"
_FIRST_GPU: Final = ("cuda", "cuda:0", "gpu", "0")
_CUDA_PROVIDER: Final = "CUDAExecutionProvider"


def device_name(device: Any) -> str | None:
    """`"cpu"`, or the name of an accelerator (`"cuda:1"`, `"0"`, `"mps"`); None where none was asked for.

    Args:
        device: an ordinal (-1 is the CPU), a name, or a `torch.device`.

    Raises:
        InputError: something else.

    >>> device_name(-1), device_name("cuda"), device_name(0), device_name(None)
    ('cpu', 'cuda', '0', None)
    """
    if device is None:
        return None
    if isinstance(device, numbers.Integral) and str(device) not in ("True", "False"):
        return CPU if int(device) < 0 else str(int(device))
    is_torch_device = type(device).__module__ == "torch" and type(device).__name__ == "device"
    if not (isinstance(device, str) or is_torch_device):
        raise InputError(
            f'device must be a number or a name such as -1, "cpu", 0 or "cuda:0", got {device!r}'
        )
    name = str(device).strip().lower()
    return CPU if name in ("cpu", "cpu:0", "-1") else name


def engine_providers(device: str | None, *, shown: Any = None) -> tuple[str, ...] | None:
    """ONNX Runtime's providers for a device as `device_name` gives it; None for the CPU.

    Args:
        device: the name.
        shown: how the user wrote it, if otherwise.

    Raises:
        InputError: a device that is not there.
    """
    if device is None or device == CPU:
        return None
    import onnxruntime

    if device in _FIRST_GPU and _CUDA_PROVIDER in onnxruntime.get_available_providers():
        return (_CUDA_PROVIDER, "CPUExecutionProvider")
    raise InputError(
        f"device {device if shown is None else shown!r} is not available: this installation runs models on "
        "the CPU; leave the device out, or use cpu"
    )
