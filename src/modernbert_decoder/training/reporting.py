"""Where the numbers of a run go beside its own log: TensorBoard and others; and when it is evaluated.

Knows the library's callbacks and nothing of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import integration_utils

from modernbert_decoder.errors import InputError


class EvaluateEvery(TrainerCallback):
    """Asks for an evaluation every so many steps."""

    def __init__(self, every_steps: int) -> None:
        self._every_steps = every_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Whether it is time."""
        if state.global_step % self._every_steps == 0:
            control.should_evaluate = True


def check_reporting(
    names: Sequence[str],
    *,
    where: str = "run.report_to",
    otherwise: str = "change the recipe (--set run.report_to=[])",
) -> None:
    """Refuse destinations whose package is not installed.

    Args:
        names: of the destinations.
        where: what names them.
        otherwise: what to do instead of installing them.

    Raises:
        InputError: names them and those that could be used.
    """
    available: list[str] = integration_utils.get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    missing = [name for name in names if name not in available]
    if missing:
        raise InputError(
            f"{where} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed; install it, or {otherwise}. Installed: "
            f"{', '.join(available) or 'none'}"
        )


def tensorboard_callback(out: Path, *, first_step: int) -> TrainerCallback:
    """Writes to `tensorboard` in the run's folder, over what was logged behind step `first_step` before."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(out / "tensorboard"), purge_step=first_step + 1)
    return integration_utils.TensorBoardCallback(writer)  # type: ignore[no-untyped-call]
