"""Runs a recipe in two processes several times in a row, as a launcher would: a program for tests.

Arguments: the recipe, the folder of the run, a port, and for each time a phase to stop after ("": none).
PyTorch is imported once; the processes are forks of this one, which itself computes nothing.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch

from modernbert_decoder.training.pretraining import pretrain
from modernbert_decoder.training.recipe_files import read_recipe


def run(recipe: Path, out: Path, *, port: int, stop_after: str | None) -> list[int]:
    """The exit codes of two processes that train together."""
    children = []
    for rank in range(2):
        child = os.fork()
        if child:
            children.append(child)
            continue
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        code = 1
        try:
            torch.set_num_threads(1)
            pretrain(read_recipe(recipe), out, stop_after=stop_after, write=lambda line: None)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    recipe, out, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    for i, phase in enumerate(sys.argv[4:]):
        codes = run(recipe, out, port=port + i, stop_after=phase or None)
        if any(codes):
            sys.exit(f"processes ended with {codes}")


if __name__ == "__main__":
    main()
