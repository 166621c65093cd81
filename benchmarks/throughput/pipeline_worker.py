"""transformers' own text-classification pipeline as a worker, float32, at whichever batch size is best.

It must not import the package: the peer is upstream's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.protocol import reset_peak_memory, serve


class PipelineWorker:
    """One loaded pipeline."""

    def load(self, *, model: str, variant: str, threads: int) -> Mapping[str, Any]:
        """Load a checkpoint folder in float32."""
        import torch
        import transformers

        assert variant == "float32"
        torch.set_num_threads(threads)
        self.pipeline: Any = transformers.pipeline(
            "text-classification", model=model, device="cpu", dtype=torch.float32
        )
        return {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}

    def classify(self, *, texts: str, batch_size: int) -> Mapping[str, Any]:
        """Seconds for all texts of a JSON file, and the labels they got."""
        listed = json.loads(Path(texts).read_text(encoding="utf-8"))
        reset_peak_memory()
        start = time.perf_counter()
        outputs = self.pipeline(listed, batch_size=batch_size)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "labels": [output["label"] for output in outputs]}

    def best_batch_size(self, *, texts: str, sizes: Sequence[int], tries: int) -> Mapping[str, Any]:
        """The batch size whose fastest try on these texts is the fastest of all.

        After a warm-up the sizes take turns, so that what slows the machine down slows all of them.
        """
        self.classify(texts=texts, batch_size=sizes[0])
        seconds = [
            {size: self.classify(texts=texts, batch_size=size)["seconds"] for size in sizes}
            for _ in range(tries)
        ]
        least = {size: min(each[size] for each in seconds) for size in sizes}
        return {"batch_size": min(least, key=least.__getitem__), "seconds": least}


if __name__ == "__main__":
    worker = PipelineWorker()
    serve({"load": worker.load, "classify": worker.classify, "best_batch_size": worker.best_batch_size})
