"""Ours as a worker: `mbd train pretrain` as the command calls it, packed documents, no logits.

Every round is a run of its own from the same weights, in a folder that vanishes.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import Trainer, TrainingArguments

from benchmarks.protocol import serve
from benchmarks.training.cases import LEARNING_RATE, WEIGHT_DECAY
from benchmarks.training.clock import TrainingClock, from_nothing
from benchmarks.training.documents import IDS_KEY
from modernbert_decoder.training.pretraining import PretrainingRun, pretrain
from modernbert_decoder.training.recipe import Recipe
from modernbert_decoder.training.strict_reading import read_section
from modernbert_decoder.training.trainer import PretrainingTrainer

# The processor's speed is not measured for the report of the run.
_PEAK_FLOPS = 1e12


class PackedWorker:
    """Trains from a model folder."""

    def load(self, *, model: str, threads: int) -> Mapping[str, Any]:
        """Remember what to train."""
        self._model, self._threads = model, threads
        return {
            "versions": {name: metadata.version(name) for name in ("torch", "torch-optimi", "accelerate")}
        }

    def train(
        self,
        *,
        documents: str,
        precision: str,
        steps: int,
        sequence_length: int,
        sequences_per_step: int,
        at_once: int,
    ) -> Mapping[str, Any]:
        """Some steps from the weights of the model folder.

        Args:
            documents: a file of them, taken in its order.
            precision: float32 or bfloat16.
            steps: of the optimizer.
            sequence_length: in tokens.
            sequences_per_step: of the optimizer.
            at_once: sequences of a micro-batch.
        """
        phase = {
            "name": "benchmark",
            "tokens": steps * sequences_per_step * sequence_length,
            "sequence_length": sequence_length,
            "batch_sequences": sequences_per_step,
            "rope_base": None,
        }
        table = {
            "name": "benchmark",
            "model": {"checkpoint": self._model},
            "tokenizer": {"source": self._model},
            "data": {"files": [documents], "ids_key": IDS_KEY, "shuffle_documents": 1},
            "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
            "phases": [phase],
            "run": {
                "precision": precision,
                "micro_batch_tokens": at_once * sequence_length,
                "threads": self._threads,
                "peak_flops": _PEAK_FLOPS,
                "log_every_steps": 1,
            },
        }
        recipe = read_section(Recipe, table, source="the benchmark")
        return from_nothing(lambda clock: _train(recipe, clock))


def _train(recipe: Recipe, clock: TrainingClock) -> Trainer:
    trainers: list[Trainer] = []

    class WatchedRun(PretrainingRun):
        """The command's run with a clock, and without checkpoints, which are not measured."""

        def _make_trainer(self, args: TrainingArguments) -> PretrainingTrainer:
            trainer = super()._make_trainer(args)
            trainer.remove_callback(self.writer)
            clock.watch(trainer)
            trainers.append(trainer)
            return trainer

    with TemporaryDirectory() as folder:
        pretrain(recipe, Path(folder) / "run", write=lambda line: None, run_type=WatchedRun)
    return trainers[0]


def main() -> None:
    """Serve the worker protocol."""
    worker = PackedWorker()
    serve({"load": worker.load, "train": worker.train})


if __name__ == "__main__":
    main()
