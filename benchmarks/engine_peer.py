"""The engine as a worker: `LLM` as a user gets it, driven step by step through its scheduler.

Every timed step is a whole one: scheduling, network, sampling and detokenization. It knows the protocol and
the engine; what is measured when is decided by the harness.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.protocol import PROMPT_ID_LIMIT, reset_peak_memory, serve
from modernbert_decoder import LLM, SamplingParams
from modernbert_decoder.cli.formats import bytes_per_weight
from modernbert_decoder.engine.calls import Row
from modernbert_decoder.engine.request import Request

# variant -> dtype, vocabulary_dtype
DTYPES: Mapping[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "int8": ("int8", None),
    "int4": ("int4", None),
    "int4-pure": ("int4", "int4"),
}


class EnginePeer:
    """One loaded model."""

    def __init__(self) -> None:
        self.llm: LLM

    def load(self, *, model: str, variant: str, threads: int) -> Mapping[str, Any]:
        """Load a checkpoint in the variant's formats; bytes per weight are means over its matrices."""
        start = time.perf_counter()
        dtype, vocabulary_dtype = DTYPES[variant]
        self.llm = LLM(model, dtype=dtype, vocabulary_dtype=vocabulary_dtype, threads=threads)
        seconds = time.perf_counter() - start
        body, vocabulary = bytes_per_weight(self.llm.architecture, self.llm.scheme)
        return {
            "load_seconds": seconds,
            "format": self.llm.scheme.name,
            "body_bytes_per_weight": body,
            "vocabulary_bytes_per_weight": vocabulary,
        }

    def decode(self, *, prompt: int, tokens: int, sequences: int) -> Mapping[str, Any]:
        """Time the prefill of all prompts, then `tokens` greedy steps with all sequences decoding."""
        reset_peak_memory()
        prompts = random_prompts(prompt, sequences)
        return {
            "prefill_seconds": self._prefill_seconds(prompts),
            "step_seconds": self._step_seconds(prompts, {"temperature": 0}, tokens)[0],
        }

    def overhead(self, *, prompt: int, tokens: int, sampling: dict[str, Any]) -> Mapping[str, Any]:
        """Seconds of decode steps, and those of them spent inside the network."""
        seconds, network = self._step_seconds(random_prompts(prompt, 1), sampling, tokens)
        return {"step_seconds": seconds, "network_seconds": network}

    def logits(self, *, tokens: int, path: str) -> Mapping[str, Any]:
        """Save the logits (tokens, vocabulary) of a random text."""
        runtime = self.llm._runtime
        slot = runtime.cache.allocate()
        ids = random_prompts(tokens, 1)[0]
        np.save(path, runtime.step([Row(slot, ids, num_logits=tokens)])[0])
        runtime.cache.free(slot)
        return {}

    def greedy(self, *, prompt: int, tokens: int) -> Mapping[str, Any]:
        """The ids of a greedy completion."""
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        output = self.llm.generate(random_prompts(prompt, 1), params)[0]
        return {"token_ids": list(output.outputs[0].token_ids)}

    def score(self, *, windows: str) -> Mapping[str, Any]:
        """Summed log-probability (nats) of windows of ids, each predicted from its own tokens only."""
        scores = self.llm.score(json.loads(Path(windows).read_text()))
        return {
            "total_logprob": sum(score.total_logprob for score in scores),
            "num_scored": sum(len(score.logprobs) for score in scores),
        }

    def _submit(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Request]:
        groups = [self.llm._completions.requests(prompt, params) for prompt in prompts]
        self.llm._driver.submit(groups)
        return [request for group in groups for request in group]

    def _prefill_seconds(self, prompts: Sequence[Sequence[int]]) -> float:
        """From submission until every prompt has its first token."""
        start = time.perf_counter()
        requests = self._submit(prompts, SamplingParams(temperature=0, max_tokens=1))
        while not all(request.is_finished for request in requests):
            self.llm._driver.step()
        return time.perf_counter() - start

    def _step_seconds(
        self, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any], tokens: int
    ) -> tuple[list[float], list[float]]:
        """Wall and network seconds of `tokens` steps in which all prompts are past their prefill."""
        driver = self.llm._driver
        # The first prompts decode while the last ones are prefilled: none may end before all are measured.
        params = SamplingParams(**sampling, max_tokens=None, ignore_eos=True)
        requests = self._submit(prompts, params)
        while not all(request.token_ids for request in requests):
            driver.step()
        seconds, network = [], []
        for _ in range(tokens):
            network_before = self.llm.network_seconds
            start = time.perf_counter()
            driver.step()
            seconds.append(time.perf_counter() - start)
            network.append(self.llm.network_seconds - network_before)
        driver.abort(requests)
        return seconds, network


def random_prompts(tokens: int, sequences: int) -> list[list[int]]:
    """The same random ids in every peer."""
    ids = np.random.default_rng(1).integers(0, PROMPT_ID_LIMIT, (sequences, tokens))
    return [[int(token_id) for token_id in row] for row in ids]


def main() -> None:
    """Serve the worker protocol."""
    peer = EnginePeer()
    serve(
        {
            "load": peer.load,
            "decode": peer.decode,
            "overhead": peer.overhead,
            "logits": peer.logits,
            "greedy": peer.greedy,
            "score": peer.score,
        }
    )


if __name__ == "__main__":
    main()
