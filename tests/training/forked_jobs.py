"""Fine-tunes and crosses models in several processes, job after job, as a launcher would: a test program.

Arguments: a JSON file with a list of jobs (see `Job`), and a folder for what their processes say.
Libraries are imported once; the processes are forks of this one, which itself computes nothing. Prints their
exit codes, job by job.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from modernbert_decoder.training.adapters import LoraSettings
from modernbert_decoder.training.classification_data import LabelledFiles
from modernbert_decoder.training.cross import cross
from modernbert_decoder.training.finetune import finetune_classifier, finetune_text
from modernbert_decoder.training.finetune_run import FinetuneSettings
from modernbert_decoder.training.text_data import TextFiles

_PATIENCE_SECONDS = 300


@dataclass(frozen=True)
class Job:
    """A training run of several processes.

    Attributes:
        name: of the job.
        kind: `classifier`, `text` or `cross`.
        model: folder.
        out: folder.
        options: of that kind.
        processes: how many.
        environment: what the launcher sets beside places and addresses.
        stop_at: a step behind which all processes fail; None: none.
    """

    name: str
    kind: str
    model: str
    out: str
    options: dict[str, Any]
    processes: int = 2
    environment: dict[str, str] = field(default_factory=dict)
    stop_at: int | None = None


class Stopped(BaseException):
    """Nothing that anybody catches."""


class Stop(TrainerCallback):
    """Fails behind a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise Stopped


def train(job: Job) -> None:
    """The job, in this process alone or with others."""
    options, out = job.options, Path(job.out)
    if job.kind == "cross":
        cross(job.model, out, write=lambda line: None, **options)
        return
    lora = options.get("lora")
    more: dict[str, Any] = {
        "settings": FinetuneSettings(**options["settings"]),
        "lora": None if lora is None else LoraSettings(**lora),
        "callbacks": [] if job.stop_at is None else [Stop(job.stop_at)],
    }
    train_file, validation_file = (options[name] for name in ("data", "validation"))
    if job.kind == "classifier":
        data, validation = LabelledFiles(files=(train_file,)), LabelledFiles(files=(validation_file,))
        finetune_classifier(job.model, data, out, validation=validation, **more)
    else:
        texts, held_out = (
            TextFiles(files=(name,), text="prompt", completion="answer")
            for name in (train_file, validation_file)
        )
        finetune_text(job.model, texts, out, validation=held_out, **more)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(job: Job, said: Path) -> list[int]:
    """The exit codes of processes that train together."""
    children, port = [], free_port()
    for rank in range(job.processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ.update(job.environment)
        if job.processes > 1:
            number = {name: str(job.processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), **number})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        code = 1
        try:
            with open(said / f"{job.name}-{rank}", "w", encoding="utf-8") as file:
                os.dup2(file.fileno(), 2)
            faulthandler.dump_traceback_later(_PATIENCE_SECONDS, exit=True)  # processes that wait for ever
            torch.set_num_threads(1)
            train(job)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    import peft  # noqa: F401  (once, not in every process)

    jobs = [Job(**each) for each in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    print(json.dumps([run(job, Path(sys.argv[2])) for job in jobs]))


if __name__ == "__main__":
    main()
