"""`mbd run`: the spelling of `transformers run` for what `mbd generate` does."""

from __future__ import annotations

from typing import Any, Final

import click

from modernbert_decoder.cli.completion_options import CompletionOptions, completion_options
from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.errors import InputError

TASK: Final = "text-generation"
_CPU_NAMES: Final = ("cpu", "-1", "auto")
_FIRST_GPU_NAMES: Final = ("0", "cuda", "cuda:0", "gpu")
_CUDA: Final = "CUDAExecutionProvider"


# \b keeps click from joining the lines.
_EXAMPLES: Final = (
    '\b\necho "The future of AI is" | mbd run --task text-generation --model jhu-clsp/ettin-decoder-17m\n'
)


@click.command("run", short_help="The same, spelled like transformers run.", epilog=_EXAMPLES)
@click.option("--task", default=TASK, show_default=True, help="Only text-generation is known.")
@click.option("--device", default="cpu", show_default=True, help="cpu, -1 or auto: the CPU. 0, cuda: a GPU.")
@completion_options
def command(task: str, device: str, **options: Any) -> None:
    """Run a task, as `transformers run` would.

    A GPU can be used only where onnxruntime-gpu with CUDA is installed. The other options are those of
    `mbd generate`.
    """
    if task != TASK:
        raise InputError(f"task {task!r} is not available; mbd run knows {TASK} only")
    providers = providers_of(device)
    with interrupts_deferred():
        from modernbert_decoder.cli.completion import complete

    complete(CompletionOptions(**options), providers=providers)


def providers_of(device: str) -> tuple[str, ...] | None:
    """ONNX Runtime's providers for a device as transformers names it; None for the CPU.

    Raises:
        InputError: a device that is not there.
    """
    if device in _CPU_NAMES:
        return None
    with interrupts_deferred():
        import onnxruntime

    if device in _FIRST_GPU_NAMES and _CUDA in onnxruntime.get_available_providers():
        return (_CUDA, "CPUExecutionProvider")
    raise InputError(
        f"device {device!r} is not available: this installation runs models on the CPU; "
        "leave --device out, or use --device cpu"
    )
