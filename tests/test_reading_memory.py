"""Memory does not grow with the number of texts that pass through the engine, nor with their length."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modernbert_decoder.architecture import Head
from pipeline_checkpoints import write_with_tokenizer

FEW, MANY = 100, 3000
MOST_GROWTH_BYTES = 20e6

_PEAKS = """
import itertools, sys
from pathlib import Path
from modernbert_decoder import LLM

task, folder, few, many = *sys.argv[1:3], *map(int, sys.argv[3:])

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

every = {"classify": 10, "score": 1000}[task]
longest = 0

def texts():
    global longest
    for i in range(many):
        text = f"{i} " + "word " * 20_000 if i % every == 5 else f"{i % 10}"
        longest = max(longest, len(text))
        yield text

with LLM(folder, dtype="float32", threads=1, max_context=700, max_batch_tokens=1400) as llm:
    if task == "classify":
        outputs = llm.iter_classify(texts(), truncate=True, max_length=100)
    else:
        outputs = llm.iter_score(texts(), stride=350)
    # Opening a model takes more for a moment, in which what is kept later would find room.
    Path("/proc/self/clear_refs").write_text("5")
    num_tokens = sum(output.num_tokens for output in itertools.islice(outputs, few))
    early = peak()
    num_results = few
    for output in outputs:
        num_tokens += output.num_tokens
        num_results += 1
    print(num_results, num_tokens, longest, peak() - early)
"""


@pytest.mark.parametrize(
    ("task", "head"), [("classify", Head.SEQUENCE_CLASSIFICATION), ("score", Head.CAUSAL_LM)]
)
def test_memory_is_that_of_a_few_texts_whatever_their_number_and_length(
    task: str, head: Head, tmp_path: Path
) -> None:
    """All long texts together, if they were kept, would be 30 MB; their tokens several times that."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not let a process measure its peak anew")
    folder = write_with_tokenizer(tmp_path / "m", head=head)
    command = [sys.executable, "-c", _PEAKS, task, str(folder), str(FEW), str(MANY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    num_results, num_tokens, longest, growth_bytes = map(int, done.stdout.split())
    assert num_results == MANY
    assert longest > 100_000
    assert num_tokens > {"classify": 300 * 100, "score": 3 * 20_000}[task]
    assert growth_bytes < MOST_GROWTH_BYTES
