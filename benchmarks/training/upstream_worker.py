"""Upstream's class as a worker: transformers' Trainer on padded or flattened batches, as its users write it.

Only the optimizer is ours: the same groups and settings of the same StableAdamW as on the other side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    ModernBertDecoderForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.protocol import serve
from benchmarks.training.cases import LEARNING_RATE, WEIGHT_DECAY
from benchmarks.training.clock import TrainingClock, from_nothing
from benchmarks.training.documents import read_documents
from modernbert_decoder.training.optimizer import OptimizerSettings, parameter_groups, stable_adamw

_SEED = 0


class UpstreamWorker:
    """Trains from a model folder."""

    def load(self, *, model: str, threads: int) -> Mapping[str, Any]:
        """Remember what to train."""
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        self._model = model
        return {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}

    def length_groups(self, *, lengths: list[int], documents_per_step: int) -> Mapping[str, Any]:
        """An epoch's order of documents of these lengths with `train_sampling_strategy="group_by_length"`."""
        generator = torch.Generator().manual_seed(_SEED)
        sampler = LengthGroupedSampler(documents_per_step, lengths=lengths, generator=generator)
        return {"order": list(sampler)}

    def train(
        self,
        *,
        documents: str,
        precision: str,
        is_flattened: bool,
        steps: int,
        documents_per_step: int,
        at_once: int,
    ) -> Mapping[str, Any]:
        """Some steps from the weights of the model folder.

        Args:
            documents: a file of them, taken in its order.
            precision: float32 or bfloat16.
            is_flattened: the documents of a micro-batch in one row, instead of padded ones.
            steps: of the optimizer.
            documents_per_step: of the optimizer.
            at_once: documents of a micro-batch.
        """

        def train(clock: TrainingClock) -> Trainer:
            with TemporaryDirectory() as folder:
                arguments = TrainingArguments(
                    output_dir=folder,
                    max_steps=steps,
                    per_device_train_batch_size=at_once,
                    gradient_accumulation_steps=documents_per_step // at_once,
                    train_sampling_strategy="sequential",
                    bf16=precision == "bfloat16",
                    max_grad_norm=0.0,  # the optimizer clips its updates instead
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                    remove_unused_columns=False,
                )
                return self._trained(arguments, Path(documents), clock, is_flattened=is_flattened)

        return from_nothing(train)

    def _trained(
        self, arguments: TrainingArguments, documents: Path, clock: TrainingClock, *, is_flattened: bool
    ) -> Trainer:
        tokenizer = AutoTokenizer.from_pretrained(self._model)
        cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        rows: Any = [{"input_ids": [cls_id, *ids, sep_id]} for ids in read_documents(documents)]
        model = ModernBertDecoderForCausalLM.from_pretrained(self._model, dtype=torch.float32)
        if is_flattened:
            # Trainer turns the cache off, with which the documents of a row would see each other.
            collator: Any = DataCollatorWithFlattening()
        else:
            collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        settings = OptimizerSettings(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        optimizer = stable_adamw(parameter_groups(model, weight_decay=WEIGHT_DECAY), settings)
        trainer = Trainer(
            model,
            arguments,
            data_collator=collator,
            train_dataset=rows,
            optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)),
        )
        trainer.remove_callback(PrinterCallback)
        clock.watch(trainer)
        trainer.train()
        return trainer


def main() -> None:
    """Serve the worker protocol."""
    worker = UpstreamWorker()
    serve({"load": worker.load, "length_groups": worker.length_groups, "train": worker.train})


if __name__ == "__main__":
    main()
