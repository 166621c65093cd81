"""transformers as a worker: upstream's ModernBertDecoderForCausalLM, SDPA, float32, with a DynamicCache.

The loop is a bare one (forward, argmax), faster than `generate`. It must not import the package: the peer is
upstream's model. `python -m benchmarks.transformers_peer FOLDER PROMPT` prints one token, for start-up times.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.protocol import PROMPT_ID_LIMIT, reset_peak_memory, serve


class TransformersPeer:
    """One loaded model."""

    def load(self, *, model: str, threads: int) -> Mapping[str, Any]:
        """Load a checkpoint folder in float32."""
        start = time.perf_counter()
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        upstream: Any = transformers.ModernBertDecoderForCausalLM
        self.model = upstream.from_pretrained(model, attn_implementation="sdpa", dtype=torch.float32)
        self.model.eval()
        return {
            "load_seconds": time.perf_counter() - start,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def forward(self, ids: Any, cache: Any, *, logits_to_keep: int) -> Any:
        """Logits (B, logits_to_keep, V); extends the cache."""
        with self.torch.inference_mode():
            output = self.model(
                input_ids=ids,
                **{self.cache_argument: cache},
                use_cache=cache is not None,
                logits_to_keep=logits_to_keep,
            )
        return output.logits

    @property
    def cache_argument(self) -> str:
        """`past_key_values`, called `cache` since transformers 5.24."""
        import inspect

        names = inspect.signature(self.model.forward).parameters
        return "cache" if "cache" in names else "past_key_values"

    def prompts(self, tokens: int, sequences: int) -> Any:
        """The same random ids in every peer."""
        ids = np.random.default_rng(1).integers(0, PROMPT_ID_LIMIT, (sequences, tokens))
        return self.torch.from_numpy(ids)

    def decode(self, *, prompt: int, tokens: int, sequences: int) -> Mapping[str, Any]:
        """Time the prefill (logits for the last position only), then `tokens` greedy steps."""
        from transformers import DynamicCache

        reset_peak_memory()
        ids = self.prompts(prompt, sequences)
        start = time.perf_counter()
        cache = DynamicCache(config=self.model.config)
        best = self.forward(ids, cache, logits_to_keep=1).argmax(-1)  # (B, 1)
        prefill_seconds = time.perf_counter() - start
        steps = []
        for _ in range(tokens):
            start = time.perf_counter()
            best = self.forward(best, cache, logits_to_keep=1).argmax(-1)
            steps.append(time.perf_counter() - start)
        return {"prefill_seconds": prefill_seconds, "step_seconds": steps}

    def logits(self, *, tokens: int, path: str) -> Mapping[str, Any]:
        """Save the logits (tokens, vocabulary) of a random text."""
        np.save(path, self.forward(self.prompts(tokens, 1), None, logits_to_keep=0)[0].numpy())
        return {}

    def greedy(self, *, prompt: int, tokens: int, follow: list[int]) -> Mapping[str, Any]:
        """Greedy choices along the given text, and the relative gap between the two best logits at each."""
        follow_ids = self.torch.tensor([follow[:tokens]])
        ids = self.torch.cat([self.prompts(prompt, 1), follow_ids], dim=1)
        logits = self.forward(ids, None, logits_to_keep=0)[0, prompt - 1 : prompt - 1 + tokens]
        best = logits.topk(2, dim=-1)
        gaps = (best.values[:, 0] - best.values[:, 1]) / logits.abs().max()
        return {"token_ids": best.indices[:, 0].tolist(), "gaps": gaps.tolist()}


def print_first_token(folder: str, prompt: str) -> None:
    """What a short script does: load, encode, one step, decode, print."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.ModernBertDecoderForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[tokenizer.cls_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]])
    with torch.inference_mode():
        best = model(input_ids=ids, logits_to_keep=1).logits[0, -1].argmax()
    sys.stdout.write(f"{tokenizer.decode([int(best)])}\n")
    sys.stdout.flush()


def main() -> None:
    """Serve the worker protocol, or print a first token."""
    if len(sys.argv) == 3:
        print_first_token(sys.argv[1], sys.argv[2])
        return
    peer = TransformersPeer()
    serve({"load": peer.load, "decode": peer.decode, "logits": peer.logits, "greedy": peer.greedy})


if __name__ == "__main__":
    main()
