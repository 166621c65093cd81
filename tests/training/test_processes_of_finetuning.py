"""Two processes (gloo) fine-tune and cross a model: the losses of one, sharded or not; results that load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from forked_jobs import Job, train
from test_training_processes import FSDP
from tiny_rows import ANIMALS, answered, labelled, write_rows
from tiny_runs import recipe_table, tiny_recipe, weights, write_texts

from modernbert_decoder.conversion.convert import convert_checkpoint
from modernbert_decoder.conversion.kinds import CheckpointKind
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.training.checkpoints import all_checkpoints, log_history_of
from modernbert_decoder.training.pretraining import pretrain

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

PROGRAM = Path(__file__).with_name("forked_jobs.py")
# Two processes add gradients in another order, and every step starts from the difference of the one before.
TOLERANCE = 1e-3
# Rows of a step, over all processes; divides the rows, of which the library would otherwise repeat some.
ROWS_PER_STEP = 8
SETTINGS = {"epochs": 2, "learning_rate": 3e-3, "max_length": 32, "precision": "float32"}


class Runs:
    """What two processes did, and one alone."""

    def __init__(self, folder: Path) -> None:
        files = write_texts(folder / "texts")
        decoder = pretrain(tiny_recipe(files), folder / "pretrained", write=lambda line: None).folder
        convert_checkpoint(decoder, folder / "encoder", to=CheckpointKind.ENCODER)
        self.folder = folder
        self.models = {"decoder": str(decoder), "encoder": str(folder / "encoder")}
        self.data: dict[str, tuple[str, str]] = {}
        make: dict[str, Callable[..., list[dict[str, Any]]]] = {"classifier": labelled, "text": answered}
        for kind, rows in make.items():
            names = (folder / f"{kind}-{part}.jsonl" for part in ("train", "held-out"))
            written = [
                write_rows(name, rows(count, seed=count)) for name, count in zip(names, (64, 16), strict=True)
            ]
            self.data[kind] = (written[0], written[1])
        phase = {"name": "cross", "tokens": 1024, "sequence_length": 32, "batch_sequences": 4}
        rates = {"rope_base": None, "warmup_tokens": 256, "decay_tokens": 256, "final_rate": 0.02}
        table = recipe_table(files, phases=[{**phase, **rates}], run={"log_every_steps": 1})
        table |= {"model": {"checkpoint": "replaced"}, "tokenizer": {"source": "replaced"}}
        (folder / "recipe.yaml").write_text(json.dumps(table), encoding="utf-8")

    def job(self, kind: str, name: str, *, processes: int, **changes: Any) -> Job:
        """A fine-tuning run, or with kinds `to ...` a crossing one, in a folder of that name."""
        out = str(self.folder / name)
        changes["processes"] = processes
        if kind.startswith("to "):
            to = kind.removeprefix("to ")
            model = self.models["encoder" if to == "decoder" else "decoder"]
            options: dict[str, Any] = {"to": to, "recipe": str(self.folder / "recipe.yaml")}
            return replace(Job(name, "cross", model, out, options), **changes)
        settings = {**SETTINGS, "batch_size": ROWS_PER_STEP // processes}
        data, validation = self.data[kind.split(maxsplit=1)[0]]
        options = {"settings": settings, "data": data, "validation": validation}
        if kind.endswith("adapter"):
            options["lora"] = {"rank": 4}
        first_word = kind.split(maxsplit=1)[0]
        return replace(Job(name, first_word, self.models["decoder"], out, options), **changes)

    def together(self, jobs: Sequence[Job]) -> dict[str, list[int]]:
        """Exit codes by name of the job."""
        said = self.folder / "said"
        said.mkdir()
        path = self.folder / "jobs.json"
        path.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(path), str(said)],
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        return dict(zip([job.name for job in jobs], json.loads(done.stdout), strict=True))

    def said(self, name: str) -> str:
        """The last of what the processes of a job said."""
        return "\n".join(
            path.read_text()[-3000:] for path in sorted((self.folder / "said").glob(f"{name}-*"))
        )


# With what `accelerate launch --use_fsdp` sets of itself: weights are read by the first process alone.
SHARDS = {**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_SYNC_MODULE_STATES": "true"}
FORMS: dict[str, dict[str, str]] = {"replicas": {}, "shards": SHARDS}
KINDS = [
    ("classifier", "replicas"),
    ("classifier", "shards"),
    ("text", "replicas"),
    ("text", "shards"),
    ("text with an adapter", "shards"),
    ("to decoder", "replicas"),
    ("to encoder", "replicas"),
    ("to encoder", "shards"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def codes(runs: Runs) -> dict[str, list[int]]:
    """Every kind; and classifiers that stop behind their first checkpoint and go on."""
    jobs = [runs.job(kind, f"{kind}, {form}", processes=2, environment=FORMS[form]) for kind, form in KINDS]
    for form, environment in FORMS.items():
        stopped = runs.job("classifier", f"stopped {form}", processes=2, environment=environment)
        jobs.append(replace(stopped, stop_at=10))
        jobs.append(replace(stopped, name=f"one process after {form}", processes=1, environment={}))
    jobs.append(replace(stopped, name="went on"))
    first = {**SHARDS, "FSDP_VERSION": "1"}
    jobs.append(runs.job("classifier", "first FSDP", processes=2, environment=first))
    return runs.together(jobs)


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Callable[[str], Path]:
    """The folder of one process's run of a kind."""
    done: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in done:
            job = runs.job(kind, f"{kind}, alone", processes=1)
            train(job)
            done[kind] = Path(job.out)
        return done[kind]

    return folder


def losses(out: Path) -> list[float]:
    """All that were logged, of training and validation."""
    if (out / "report.json").is_file():
        history = json.loads((out / "report.json").read_text())["history"]
    else:
        history = log_history_of(all_checkpoints(out)[-1])
    return [entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry]


@pytest.mark.parametrize(("kind", "form"), KINDS)
def test_two_processes_learn_as_one(
    runs: Runs, codes: dict[str, list[int]], alone: Callable[[str], Path], kind: str, form: str
) -> None:
    out = runs.folder / f"{kind}, {form}"
    assert codes[f"{kind}, {form}"] == [0, 0], runs.said(f"{kind}, {form}")
    expected = losses(alone(kind))
    assert len(expected) >= 4
    assert max(expected) > 1.01 * min(expected)  # something was learned, or equal losses would mean nothing
    assert losses(out) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(("kind", "form"), [each for each in KINDS if not each[0].startswith("to ")])
def test_what_two_processes_leave_loads_in_the_engine(
    runs: Runs, codes: dict[str, list[int]], alone: Callable[[str], Path], kind: str, form: str
) -> None:
    assert codes[f"{kind}, {form}"] == [0, 0]
    out, other = runs.folder / f"{kind}, {form}", alone(kind)
    names = {path.name for path in other.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    found = []
    for folder in (out, other):
        with LLM(folder, dtype="float32") as llm:
            if kind == "classifier":
                found.append([each.logits for each in llm.classify([f"so the {a}" for a in ANIMALS])])
            else:
                found.append([each.total_logprob for each in llm.score("the owl says ho ho")])
    np.testing.assert_allclose(found[0], found[1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("form", ["replicas", "shards"])
def test_encoders_of_two_processes_load_in_transformers(
    runs: Runs, codes: dict[str, list[int]], form: str
) -> None:
    assert codes[f"to encoder, {form}"] == [0, 0]
    folder = runs.folder / f"to encoder, {form}" / "model"
    _, info = transformers.ModernBertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_sharded_run_that_was_stopped_goes_on_from_its_shards(
    runs: Runs, codes: dict[str, list[int]]
) -> None:
    assert codes["stopped shards"] == [1, 1]
    assert "Stopped" in runs.said("stopped shards")
    assert codes["went on"] == [0, 0], runs.said("went on")
    whole, resumed = weights(runs.folder / "classifier, shards"), weights(runs.folder / "stopped shards")
    assert whole.keys() == resumed.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_other_processes_than_those_that_began_are_refused(
    runs: Runs, codes: dict[str, list[int]], form: str
) -> None:
    assert codes[f"one process after {form}"] == [1]
    written = "2 processes, sharded (FSDP)" if form == "shards" else "2 processes"
    expected = (
        f"checkpoint-8 was written by {written}, and this is 1 process; start it with the same launcher"
    )
    assert expected in runs.said(f"one process after {form}")


def test_the_first_fsdp_is_refused_on_processors(runs: Runs, codes: dict[str, list[int]]) -> None:
    assert codes["first FSDP"] == [1, 1]
    assert "launch with `--fsdp_version 2`" in runs.said("first FSDP")
