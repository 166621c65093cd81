"""Which number format and which device a run computes with, and how fast that device can be.

Knows nothing of recipes.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Final, Literal

import torch
from transformers.utils.import_utils import is_torch_bf16_gpu_available

Precision = Literal["auto", "float32", "bfloat16"]

_MATRIX: Final = 2048
_ROUNDS: Final = 5


def uses_bfloat16(precision: Precision) -> bool:
    """Whether products are computed in bfloat16: as asked or, if "auto", where an accelerator has it.

    On a CPU "auto" means float32, so that a recipe is computed in one precision on all of them; bfloat16 has
    to be asked for there.
    """
    if precision != "auto":
        return precision == "bfloat16"
    return has_accelerator() and is_torch_bf16_gpu_available()


def has_accelerator() -> bool:
    """Whether anything but the CPU is there to train on."""
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()


def measured_peak_flops(device: torch.device, *, is_bfloat16: bool) -> float:
    """Floating-point operations per second of a large matrix product on a device: the best of a few.

    Measured once in a process, for as many threads as there are.
    """
    return _measured_peak_flops(device, is_bfloat16, torch.get_num_threads())


@cache
def _measured_peak_flops(device: torch.device, is_bfloat16: bool, threads: int) -> float:
    size = _MATRIX if device.type != "cpu" else _MATRIX // 2
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
