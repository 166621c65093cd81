"""Running tasks of lm-evaluation-harness on the engine, and the published numbers beside the results.

Responsible for which tasks there are, what of the harness's results is kept, and the comparison. The model
itself is `harness_model.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from modernbert_decoder.errors import InputError
from modernbert_decoder.evaluation.published import published_result, published_tasks

if TYPE_CHECKING:
    from modernbert_decoder.engine.llm import LLM

TASKS_FOLDER: Final = Path(__file__).parent / "tasks"
LOCAL_TASKS: Final = ("lambada_file", "multiple_choice_file", "texts_file")
PUBLISHED: Final = "ettin"  # the tasks of the published table


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What to run.

    Attributes:
        tasks: names of the harness, of the tasks that come with this package, or "ettin" for those of the
            published table.
        data_files: task of this package -> its file.
        include_path: a folder with more task files of the harness.
        num_fewshot: examples in front of each question; None: what the task says.
        limit: only so many documents of each task.
    """

    tasks: tuple[str, ...]
    data_files: Mapping[str, str]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError("no tasks are named")
        for task in self.data_files:
            if task not in self.tasks:
                raise InputError(f"there is a data file for {task}, which is not among the tasks")
        for task in self.tasks:
            if task in LOCAL_TASKS and task not in self.data_files:
                raise InputError(f"{task} reads a local file; name it with --data {task}=FILE.jsonl")

    def names(self) -> list[str]:
        """The tasks, each once, in their order."""
        expanded = [
            name for task in self.tasks for name in (published_tasks() if task == PUBLISHED else (task,))
        ]
        return list(dict.fromkeys(expanded))


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task.

    Attributes:
        task: name.
        metric: name; a filter's name is behind a comma, unless the task has none.
        value: what the harness found.
        standard_error: of it, where the harness estimates one.
        num_documents: that were evaluated.
        num_fewshot: examples in front of each.
        published: what was published for the released model of this size.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    num_documents: int
    num_fewshot: int
    published: float | None


def run_tasks(llm: LLM, options: TaskOptions, *, size: str | None = None) -> list[TaskResult]:
    """Evaluates a language model.

    Args:
        llm: the engine.
        options: what to run.
        size: whose published results to put beside the model's own; None: nobody's.

    Raises:
        InputError: lm-eval is not installed, there is no such task, or its data cannot be used.
    """
    evaluate = _harness()
    from modernbert_decoder.evaluation.harness_model import EngineModel

    names = options.names()
    manager = _task_manager(options, names)
    found = evaluate(
        model=EngineModel(llm),
        tasks=names,
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return _results(found, size=size)


def _harness() -> Callable[..., Any]:
    """The harness's entry point, which from here on says only what went wrong."""
    try:
        from lm_eval import simple_evaluate
    except ImportError as error:
        raise InputError(
            'tasks need lm-evaluation-harness; install it with `pip install "modernbert-decoder[eval]"`'
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    evaluate: Callable[..., Any] = simple_evaluate
    return evaluate


def _task_manager(options: TaskOptions, names: Sequence[str]) -> Any:
    """The harness's index of tasks; its own thousands of files are read only for tasks not found elsewhere.

    Raises:
        InputError: there is no such task or folder.
    """
    from lm_eval.tasks import TaskManager

    folders = [str(TASKS_FOLDER)]
    if options.include_path is not None:
        if not options.include_path.is_dir():
            raise InputError(f"{options.include_path} is not a folder with task files")
        folders.append(str(options.include_path))
    metadata = {"data_files": dict(options.data_files)}
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if all(manager.match_tasks([name]) for name in names):
        return manager
    manager = TaskManager(include_path=folders, metadata=metadata)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise InputError(
            f"there is no task {', '.join(unknown)}; `lm_eval ls tasks` lists the harness's, and this "
            f"package adds {', '.join(LOCAL_TASKS)}. Files of your own are found with --include-path FOLDER"
        )
    return manager


def _results(found: Mapping[str, Any], *, size: str | None) -> list[TaskResult]:
    """The metrics of every task and group, in the harness's order."""
    results = []
    for task, metrics in found["results"].items():
        samples = found.get("n-samples", {}).get(task, {})
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{name}_stderr,{filtered}")
            results.append(
                TaskResult(
                    task=task,
                    metric=name if filtered == "none" else f"{name},{filtered}",
                    value=float(value),
                    standard_error=float(error) if isinstance(error, int | float) else None,
                    num_documents=int(samples.get("effective", 0)),
                    num_fewshot=int(found.get("n-shot", {}).get(task, 0) or 0),
                    published=None if size is None else published_result(size, task, name),
                )
            )
    return results


def comparison_rows(results: Sequence[TaskResult], *, size: str | None) -> tuple[list[str], list[list[str]]]:
    """A table: a header and a row for each metric, with the published number where there is one."""
    header = ["task", "metric", "documents", "shots", "value", "+-"]
    if size is not None:
        header += [f"Ettin {size}", "difference"]
    rows = []
    for result in results:
        row = [
            result.task,
            result.metric,
            f"{result.num_documents:,}" if result.num_documents else "",
            f"{result.num_fewshot}",
            f"{result.value:.4f}",
            "" if result.standard_error is None else f"{result.standard_error:.4f}",
        ]
        if size is not None:
            is_there = result.published is not None
            row.append(f"{result.published:.4f}" if is_there else "")
            row.append(f"{result.value - (result.published or 0.0):+.4f}" if is_there else "")
        rows.append(row)
    return header, rows
