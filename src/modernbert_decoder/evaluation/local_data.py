"""The documents of the tasks in `tasks/`, read from local files that the caller names.

The harness calls these functions with everything it knows about a run; the files are in its `data_files`:
task name -> path. Nothing is downloaded. Since the task files refer to this module, reading one of them
registers the engine's model as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.errors import InputError
from modernbert_decoder.evaluation import harness_model

assert harness_model.MODEL_NAME  # imported for its registration

LAMBADA: Final = "lambada_file"
MULTIPLE_CHOICE: Final = "multiple_choice_file"
TEXTS: Final = "texts_file"
SPLIT: Final = "test"

Row = Mapping[str, Any]


def lambada_documents(**run: Any) -> Any:
    """Passages whose last word is asked for: JSON lines with a `text` of two words at least.

    Args:
        **run: what the harness knows; `data_files` is used.
    """

    def check(row: Row) -> dict[str, Any]:
        text = row.get("text")
        if not isinstance(text, str) or " " not in text.strip():
            raise InputError("`text` must be a text of two words or more")
        context, word = text.strip().rsplit(" ", 1)
        return {"context": context, "target": f" {word}"}

    return _documents(LAMBADA, run, check)


def multiple_choice_documents(**run: Any) -> Any:
    """Questions with answers to choose from: JSON lines with `question`, `choices` and `answer`.

    `answer` is the number of the right choice, from 0, or its text.

    Args:
        **run: what the harness knows; `data_files` is used.
    """

    def check(row: Row) -> dict[str, Any]:
        question, answer = row.get("question"), row.get("answer")
        choices: Any = row.get("choices")
        is_list = isinstance(choices, list) and len(choices) > 1
        if not is_list or not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise InputError("`choices` must be a list of two texts or more")
        if not isinstance(question, str) or not question.strip():
            raise InputError("`question` must be a text")
        index = choices.index(answer) if answer in choices else answer
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
            raise InputError(f"`answer` is {answer!r}, which is neither a choice nor the number of one")
        return {"question": question.rstrip(), "choices": choices, "answer": index}

    return _documents(MULTIPLE_CHOICE, run, check)


def text_documents(**run: Any) -> Any:
    """Texts to predict from their beginnings: JSON lines with a `text`.

    Args:
        **run: what the harness knows; `data_files` is used.
    """

    def check(row: Row) -> dict[str, Any]:
        text = row.get("text")
        if not isinstance(text, str) or not text:
            raise InputError("`text` must be a text")
        return {"text": text}

    return _documents(TEXTS, run, check)


def _documents(task: str, run: Mapping[str, Any], check: Callable[[Row], dict[str, Any]]) -> Any:
    """The checked rows of the task's file as a data set of one split.

    Raises:
        InputError: no file was named, or a line of it cannot be used.
    """
    from datasets import Dataset

    files = run.get("data_files")
    if not isinstance(files, Mapping) or task not in files:
        raise InputError(
            f"{task} reads a local file; name it: `mbd eval --tasks {task} --data {task}=FILE.jsonl`, or "
            f"""with the harness itself `--metadata '{{"data_files": {{"{task}": "FILE.jsonl"}}}}'`"""
        )
    path = Path(str(files[task])).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                rows.append(check(row if isinstance(row, dict) else {}))
            except (json.JSONDecodeError, InputError) as error:
                raise InputError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise InputError(f"{path} has no rows")
    return {SPLIT: Dataset.from_list(rows)}
