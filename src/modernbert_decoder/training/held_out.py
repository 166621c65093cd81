"""Bits per byte of held-out texts under a PyTorch model, as the model cards of this package state them.

Each text is `[CLS] text [SEP]`; all are concatenated and cut into windows that overlap by one token; every
token but the first is predicted once, from its own window only. Knows nothing of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from modernbert_decoder.errors import InputError
from modernbert_decoder.training.encoding import DocumentEncoder
from modernbert_decoder.training.sequences import Ids


@dataclass(frozen=True)
class HeldOutResult:
    """What held-out texts cost a model.

    Attributes:
        loss: nats per token.
        bits_per_byte: of the texts' UTF-8, special tokens' cost included.
        num_tokens: predicted ones.
    """

    loss: float
    bits_per_byte: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(min(self.loss, 700.0))


class HeldOutTexts:
    """Held-out texts, cut into windows once."""

    def __init__(self, ids: Ids, *, num_bytes: int, window: int) -> None:
        """All tokens, concatenated, and the bytes that they stand for."""
        self._ids = ids
        self._window = window
        self.num_bytes = num_bytes
        self.num_windows = max(-(-(len(ids) - 1) // (window - 1)), 0)

    @classmethod
    def read(cls, files: Sequence[Path], encoder: DocumentEncoder, *, window: int) -> HeldOutTexts:
        """From text files, each one text.

        Raises:
            InputError: a file is no text in UTF-8, or all are empty.
        """
        texts = [_text_of(file) for file in files]
        num_bytes = sum(len(text.encode()) for text in texts)
        if num_bytes == 0:
            raise InputError(
                f"the held-out texts are empty ({', '.join(map(str, files))}); name others in "
                "evaluation.files, or remove the section evaluation"
            )
        return cls(np.concatenate(encoder(texts)), num_bytes=num_bytes, window=window)

    @torch.no_grad()
    def measure(
        self,
        model: nn.Module,
        *,
        tokens_at_once: int,
        skips_logits: bool = True,
        max_windows: int | None = None,
    ) -> HeldOutResult:
        """Run the model over the windows, or over so many of them, evenly spread.

        Args:
            model: a `ModernBertDecoderForCausalLM`, wrapped or not; its mode is restored.
            tokens_at_once: size of a batch.
            skips_logits: see the model.
            max_windows: None: all.
        """
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        nats, num_tokens = 0.0, 0
        for windows in self._batches(tokens_at_once, max_windows):
            ids = torch.from_numpy(windows).to(device)
            count = ids.shape[0] * (ids.shape[1] - 1)
            total: Tensor = model(
                input_ids=ids, labels=ids, skip_logits=skips_logits, num_items_in_batch=1, use_cache=False
            ).loss
            nats += total.item()
            num_tokens += count
        model.train(was_training)
        loss = nats / num_tokens
        bits = loss * (len(self._ids) - 1) / math.log(2)
        return HeldOutResult(loss, bits / self.num_bytes, num_tokens)

    def _batches(self, tokens_at_once: int, max_windows: int | None) -> list[NDArray[np.int64]]:
        """Windows of equal length in batches; the last, shorter one is alone."""
        window, step = self._window, self._window - 1
        begins = np.arange(self.num_windows) * step
        if max_windows is not None and max_windows < len(begins):
            begins = begins[np.linspace(0, len(begins) - 1, max_windows).round().astype(int)]
        full = [begin for begin in begins if begin + window <= len(self._ids)]
        rows = max(tokens_at_once // window, 1)
        batches = [
            np.stack([self._ids[begin : begin + window] for begin in full[i : i + rows]]).astype(np.int64)
            for i in range(0, len(full), rows)
        ]
        batches += [
            self._ids[None, begin:].astype(np.int64) for begin in begins if begin + window > len(self._ids)
        ]
        return batches


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is no text in UTF-8 ({error.reason} at byte {error.start:,}); evaluation.files names "
            "plain text files: unpack or convert it, or name others"
        ) from error
