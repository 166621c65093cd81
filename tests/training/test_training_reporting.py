"""Where a run's numbers go beside its log: trackio by the library's callback; what is missing is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_runs import tiny_recipe, write_texts
from watched_runs import StruckError, run, strike_at

from modernbert_decoder.errors import InputError
from modernbert_decoder.training.pretraining import pretrain
from modernbert_decoder.training.reporting import check_reporting

# What the library's callback calls, writing to a file what it is told.
TRACKIO = '''
"""Stands in for trackio."""

import contextvars
import json
import types
from pathlib import Path

__version__ = "0.43.0"
LOG = Path(__file__).with_name("log.jsonl")
context_vars = types.SimpleNamespace(
    current_space_id=contextvars.ContextVar("space", default=None),
    current_project=contextvars.ContextVar("project", default=None),
)


class _Config(dict):
    def update(self, other, allow_val_change=False):
        super().update(other)


config = _Config()


def init(**options):
    LOG.write_text("")


def log(values, **options):
    with LOG.open("a") as file:
        file.write(json.dumps(values) + "\\n")


def finish():
    with LOG.open("a") as file:
        file.write(json.dumps("finished") + "\\n")
'''


def test_trackio_gets_what_the_log_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "trackio.py").write_text(TRACKIO, encoding="utf-8")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    recipe = tiny_recipe(write_texts(tmp_path / "texts"), run={"report_to": ["trackio"]})
    pretrain(recipe, tmp_path / "run", write=lambda line: None)
    del sys.modules["trackio"]
    *logged, last = (json.loads(line) for line in (site / "log.jsonl").read_text().splitlines())
    assert last == "finished"
    losses = [each for each in logged if "train/loss" in each]
    assert [each["train/tokens"] for each in losses] == [512, 1024, 1536, 2048]
    assert losses[-1]["train/loss"] < losses[0]["train/loss"]
    assert all(each["train/tokens_per_second"] > 0 and each["train/mfu"] > 0 for each in losses)


def test_tensorboard_has_every_step_once_after_a_run_was_struck(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reported = {"report_to": ["tensorboard"], "log_every_steps": 1}
    recipe = tiny_recipe(write_texts(tmp_path / "texts"), run=reported)
    with pytest.MonkeyPatch.context() as patch:
        strike_at(patch, 7)  # two steps behind a checkpoint
        with pytest.raises(StruckError):
            run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 17))


def test_a_destination_that_is_not_installed_is_refused_before_the_run(tmp_path: Path) -> None:
    recipe = tiny_recipe(write_texts(tmp_path / "texts"), run={"report_to": ["nowhere"]})
    with pytest.raises(InputError, match=r"run\.report_to names nowhere, which is not installed"):
        pretrain(recipe, tmp_path / "run", write=lambda line: None)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_every_missing_destination_is_named() -> None:
    with pytest.raises(InputError, match=r"names here, there, which are not"):
        check_reporting(["tensorboard", "here", "there"])
