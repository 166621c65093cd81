"""The command line of lm-evaluation-harness with the model `modernbert-decoder` known to it.

`python -m modernbert_decoder.evaluation --model modernbert-decoder --model_args pretrained=FOLDER ...` is
`lm_eval ...`, which has no way to be told of models outside its own package. Nothing is added but the model
and the folder of tasks that read local files.
"""

from __future__ import annotations

import sys
from typing import Final

from modernbert_decoder.evaluation.harness import TASKS_FOLDER

_INCLUDE: Final = "--include_path"


def main() -> None:
    """Runs the harness with the arguments of this process."""
    from lm_eval.__main__ import cli_evaluate

    from modernbert_decoder.evaluation import harness_model

    sys.argv[0] = f"lm_eval with {harness_model.MODEL_NAME}"
    runs = any(argument in ("--tasks", "-t") for argument in sys.argv)
    if runs and not any(argument.startswith(_INCLUDE) for argument in sys.argv):
        sys.argv += [_INCLUDE, str(TASKS_FOLDER)]
    cli_evaluate()


if __name__ == "__main__":
    main()
