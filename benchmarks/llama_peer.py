"""llama.cpp as a worker: a random Llama of the same shape through llama-cpp-python's low-level API.

Runs in the interpreter that has llama-cpp-python (`MBD_LLAMA_PYTHON`). It must not import the package.
Attention is left at llama.cpp's default ("auto", which turns flash attention on for CPU).
`python -m benchmarks.llama_peer FILE.gguf` prints one token, for start-up times.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.llama_gguf import ensure_gguf
from benchmarks.protocol import PROMPT_ID_LIMIT, reset_peak_memory, serve
from benchmarks.shapes import SHAPES, VOCABULARY_SIZE


class LlamaPeer:
    """One loaded model; a context is made for each (sequences, capacity) and kept."""

    def __init__(self) -> None:
        self.model: Any = None
        self.context: Any = None
        self.context_key: tuple[int, int] | None = None
        self.threads = 2

    def load(self, *, size: str, variant: str, folder: str, threads: int) -> Mapping[str, Any]:
        """Write the file of this size and type (F32, Q8_0, Q4_0) into `folder` if needed; load it."""
        path = ensure_gguf(SHAPES[size], variant, Path(folder))
        start = time.perf_counter()
        self.open(path, threads=threads)
        return {
            "load_seconds": time.perf_counter() - start,
            "file_bytes": path.stat().st_size,
            "versions": {"llama-cpp-python": llama_cpp.__version__},
            "system_info": llama_cpp.llama_print_system_info().decode().strip(" |"),
        }

    def open(self, path: Path, *, threads: int) -> None:
        """Load a GGUF file."""
        self.threads = threads
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path.name}")

    def prepare(self, sequences: int, capacity: int) -> None:
        """Make or reuse a context for this many sequences of up to `capacity` tokens, and empty it."""
        key = (sequences, capacity)
        if key != self.context_key:
            if self.context:
                llama_cpp.llama_free(self.context)
            parameters = llama_cpp.llama_context_default_params()
            padded = -(-capacity // 256) * 256
            parameters.n_ctx = padded * sequences
            parameters.n_batch = padded * sequences
            parameters.n_seq_max = sequences
            parameters.n_threads = parameters.n_threads_batch = self.threads
            parameters.no_perf = True
            self.context = llama_cpp.llama_init_from_model(self.model, parameters)
            self.context_key = key
            if not self.context:
                raise RuntimeError(f"llama.cpp made no context for {sequences} sequences of {capacity}")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode_batch(self, tokens: np.ndarray, first_position: int) -> np.ndarray:
        """Run tokens (sequences, new) at these positions; greedy next token of every sequence.

        Logits are computed for the last token of each sequence only.
        """
        sequences, new = tokens.shape
        batch = llama_cpp.llama_batch_init(sequences * new, 0, 1)
        k = 0
        for s in range(sequences):
            for j in range(new):
                batch.token[k] = int(tokens[s, j])
                batch.pos[k] = first_position + j
                batch.n_seq_id[k] = 1
                batch.seq_id[k][0] = s
                batch.logits[k] = j == new - 1
                k += 1
        batch.n_tokens = k
        start = time.perf_counter()
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode answered {status}")
        best = np.empty(sequences, np.int64)
        for s in range(sequences):
            pointer = llama_cpp.llama_get_logits_ith(self.context, (s + 1) * new - 1)
            row = np.ctypeslib.as_array(
                ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (VOCABULARY_SIZE,)
            )
            best[s] = int(row.argmax())
        self.seconds = time.perf_counter() - start
        llama_cpp.llama_batch_free(batch)
        return best

    def prompt(self, tokens: int, sequences: int) -> np.ndarray:
        """Random prompt ids (sequences, tokens), the same in every peer."""
        return np.random.default_rng(1).integers(0, PROMPT_ID_LIMIT, (sequences, tokens))

    def decode(self, *, prompt: int, tokens: int, sequences: int) -> Mapping[str, Any]:
        """Prefill, then time `tokens` greedy steps; the batch is filled outside the timed part."""
        reset_peak_memory()
        self.prepare(sequences, prompt + 256)
        best = self.decode_batch(self.prompt(prompt, sequences), 0)
        prefill_seconds = self.seconds
        steps = []
        for i in range(tokens):
            best = self.decode_batch(best[:, None], prompt + i)
            steps.append(self.seconds)
        return {"prefill_seconds": prefill_seconds, "step_seconds": steps}


def print_first_token(path: str) -> None:
    """Load a GGUF file, run one prompt of four tokens and print the id that follows; it has no tokenizer."""
    peer = LlamaPeer()
    peer.open(Path(path), threads=os.cpu_count() or 1)
    peer.prepare(1, 256)
    sys.stdout.write(f"{peer.decode_batch(peer.prompt(4, 1), 0)[0]}\n")
    sys.stdout.flush()


def main() -> None:
    """Serve the worker protocol, or print a first token."""
    if len(sys.argv) == 2:
        print_first_token(sys.argv[1])
        return
    peer = LlamaPeer()
    serve({"load": peer.load, "decode": peer.decode})


if __name__ == "__main__":
    main()
