"""Our classes or upstream's as a worker: one language model and one classifier on its body, float32, SDPA.

Both runtimes get the same random weights and the same random texts. A training step is forward, loss,
backward and AdamW with a learning rate of zero: all the work, and the same loss every time, which the harness
compares. Peaks of memory are measured over what the process held before.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.protocol import PROMPT_ID_LIMIT, peak_memory_bytes, reset_peak_memory, serve
from benchmarks.wing.cases import OURS

_IGNORED = -100
_PAD_ID = 50_283
_NUM_LABELS = 4


class TorchWorker:
    """One loaded model with its optimizer."""

    def load(self, *, runtime: str, model: str, threads: int) -> Mapping[str, Any]:
        """Load a checkpoint folder into the classes of a runtime."""
        import transformers

        torch.set_num_threads(threads)
        if runtime == OURS:
            from modernbert_decoder import pytorch as classes
        else:
            classes = transformers
        options = {"attn_implementation": "sdpa", "dtype": torch.float32}
        self.is_ours = runtime == OURS
        self.model = classes.ModernBertDecoderForCausalLM.from_pretrained(model, **options)
        # lm_head.* of the checkpoint has the shape of head.*, and the body is shared: no second copy of it.
        config = classes.ModernBertDecoderConfig.from_pretrained(model, num_labels=_NUM_LABELS)
        config._attn_implementation = "sdpa"
        self.classifier = classes.ModernBertDecoderForSequenceClassification(config)
        self.classifier.model = self.model.model
        self.classifier.head = self.model.lm_head
        weights = torch.Generator().manual_seed(0)
        torch.nn.init.normal_(self.classifier.classifier.weight, generator=weights)
        self.classifier.eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"versions": versions}

    def release(self) -> Mapping[str, Any]:
        """Gives free memory back to the system."""
        gc.collect()
        return {"is_released": give_memory_back()}

    def train(self, *, lengths: list[int], is_packed: bool, skips_logits: bool) -> Mapping[str, Any]:
        """One step; the check is its loss."""
        batch = packed_batch(lengths) if is_packed else padded_batch(lengths)
        options = {"skip_logits": skips_logits} if self.is_ours else {}
        self.model.train()

        def step() -> float:
            loss = self.model(**batch, **options, use_cache=False).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return float(loss.detach())

        return measured(step)

    def loss(self, *, tokens: int, is_packed: bool, skips_logits: bool) -> Mapping[str, Any]:
        """Head, projection on the vocabulary and loss of one text, and their gradients."""
        assert not is_packed
        config = self.model.config
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, tokens, config.hidden_size, generator=generator).requires_grad_()
        labels = texts([tokens])[0][None]
        self.model.train()
        run = self._loss_of_ours if self.is_ours else self._loss_of_upstream

        def step() -> float:
            loss = run(hidden, labels, skips_logits)
            loss.backward()
            hidden.grad = None
            self.optimizer.zero_grad()
            return float(loss.detach())

        return measured(step)

    def _loss_of_upstream(self, hidden: Tensor, labels: Tensor, skips_logits: bool) -> Tensor:
        assert not skips_logits
        logits = self.model.decoder(self.model.lm_head(hidden))
        loss: Tensor = self.model.loss_function(
            logits=logits, labels=labels, vocab_size=self.model.config.vocab_size
        )
        return loss

    def _loss_of_ours(self, hidden: Tensor, labels: Tensor, skips_logits: bool) -> Tensor:
        from modernbert_decoder.pytorch import losses

        decoder, targets = self.model.decoder, losses.next_token_labels(labels)
        arguments = (hidden, targets, decoder.weight, decoder.bias)
        if skips_logits:
            return losses.fused_causal_lm_loss(*arguments, transform=self.model.lm_head)
        loss, _logits = losses.causal_lm_loss_and_logits(*arguments, transform=self.model.lm_head)
        return loss

    def classify(self, *, lengths: list[int], is_packed: bool, skips_logits: bool) -> Mapping[str, Any]:
        """The logits of one padded batch; the check is the sum of their magnitudes."""
        batch = padded_batch(lengths)
        del batch["labels"]
        self.classifier.eval()
        return measured(inferring(lambda: float(self.classifier(**batch).logits.abs().sum())))

    def prefill(
        self, *, sequences: int, tokens: int, repeats: int, is_packed: bool, skips_logits: bool
    ) -> Mapping[str, Any]:
        """The last position's logits and a new cache; the check is the largest logit."""
        ids = torch.stack(texts([tokens] * sequences))
        self.model.eval()

        def run() -> float:
            output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return float(output.logits.max())

        return measured(inferring(run), repeats=repeats)

    def generate(
        self, *, sequences: int, tokens: int, new_tokens: int, is_packed: bool, skips_logits: bool
    ) -> Mapping[str, Any]:
        """`generate`, greedy; the check is a checksum of the new ids."""
        ids = torch.stack(texts([tokens] * sequences))
        self.model.eval()
        options = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
        mask = torch.ones_like(ids)
        return measured(
            lambda: checksum(self.model.generate(ids, attention_mask=mask, **options)[:, tokens:])
        )


def checksum(ids: Tensor) -> float:
    """A number that changes by more than rounding with an id, the order of ids, or how many there are."""
    return float(zlib.crc32(ids.contiguous().numpy().tobytes()))


def inferring(run: Callable[[], float]) -> Callable[[], float]:
    """The same without gradients."""

    def inner() -> float:
        with torch.inference_mode():
            return run()

    return inner


def measured(run: Callable[[], float], *, repeats: int = 1) -> dict[str, Any]:
    """Seconds (the median of the repeats), what `run` returned, and bytes at the peak over those before."""
    gc.collect()
    reset_peak_memory()
    before, seconds = resident_bytes(), []
    for _ in range(repeats):
        start = time.perf_counter()
        check = run()
        seconds.append(time.perf_counter() - start)
    growth = max(0, peak_memory_bytes() - before)
    return {"seconds": statistics.median(seconds), "check": check, "growth_bytes": growth}


def give_memory_back() -> bool:
    """Makes the C library release what it holds for later, where it can (glibc); whether it did."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))


def resident_bytes() -> int:
    """This process's resident memory (Linux; elsewhere the high-water mark, so that nothing grows)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_memory_bytes()
    import resource

    return int(statm.read_text().split()[1]) * resource.getpagesize()


def texts(lengths: list[int]) -> list[Tensor]:
    """Random ids, the same in every worker: each (length,)."""
    generator = np.random.default_rng(1)
    return [torch.from_numpy(generator.integers(0, PROMPT_ID_LIMIT, length)) for length in lengths]


def padded_batch(lengths: list[int]) -> dict[str, Tensor]:
    """The texts as rows, padded on the right; padding has no labels."""
    rows = texts(lengths)
    padding = {"input_ids": _PAD_ID, "attention_mask": 0, "labels": _IGNORED}
    real = {"input_ids": rows, "attention_mask": [torch.ones_like(row) for row in rows], "labels": rows}
    return {
        name: torch.nn.utils.rnn.pad_sequence(real[name], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


def packed_batch(lengths: list[int]) -> dict[str, Tensor]:
    """The texts in one row, positions starting anew in each; the first token of each is nobody's label."""
    rows = texts(lengths)
    labels = [torch.nn.functional.pad(row[1:], (1, 0), value=_IGNORED) for row in rows]
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "labels": torch.cat(labels)[None],
    }


def main() -> None:
    """Serve the worker protocol."""
    worker = TorchWorker()
    names = ("load", "release", "train", "loss", "classify", "prefill", "generate")
    serve({name: getattr(worker, name) for name in names})


if __name__ == "__main__":
    main()
