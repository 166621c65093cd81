"""One model of the harness in a process of its own: reads a job from its arguments, prints one JSON object.

python -m benchmarks.evaluation.worker '{"kind": "engine", "dtype": "int8", ...}'
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import warnings
from typing import Any


def engine_model(job: dict[str, Any]) -> Any:
    """Ours."""
    from modernbert_decoder.evaluation.harness_model import EngineModel

    return EngineModel(job["model"], dtype=job["dtype"], threads=job["threads"])


def hf_model(job: dict[str, Any]) -> Any:
    """The harness's `hf` with transformers' class, and a tokenizer whose template is `[CLS] A`."""
    import tokenizers
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(job["threads"])
    transformers.utils.logging.set_verbosity_error()
    fast = tokenizers.Tokenizer.from_file(f"{job['model']}/tokenizer.json")
    cls = fast.token_to_id("[CLS]")
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", cls)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        **{"bos_token": "[CLS]", "cls_token": "[CLS]", "pad_token": "[PAD]"},
        **{"eos_token": "[SEP]", "sep_token": "[SEP]"},
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=job["batch_size"], add_bos_token=True, device="cpu"
    )


def main() -> None:
    """Loads the model, runs every task once, and reports seconds, metrics and peak memory."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    job = json.loads(sys.argv[1])
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from modernbert_decoder.evaluation.harness import TASKS_FOLDER

    model = engine_model(job) if job["kind"] == "engine" else hf_model(job)
    manager = TaskManager(
        include_path=str(TASKS_FOLDER), include_defaults=False, metadata={"data_files": job["files"]}
    )
    seconds, metrics = {}, {}
    for task in ("warm-up", *job["files"]):
        name, limit = (next(iter(job["files"])), 8) if task == "warm-up" else (task, None)
        started = time.perf_counter()
        found = simple_evaluate(
            model, tasks=[name], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
        if task != "warm-up":
            seconds[task] = time.perf_counter() - started
            results = found["results"][task]
            metrics[task] = {
                key.partition(",")[0]: value
                for key, value in results.items()
                if isinstance(value, float) and "stderr" not in key
            }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "metrics": metrics, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
