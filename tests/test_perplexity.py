"""What int8 and int4 cost: perplexity of the bundled model against float32, within the promised bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from modernbert_decoder.checkpoint import BUNDLED_MODEL, find_checkpoint
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.sampling import SamplingParams

# docs/design.md: perplexity against float32, on the books that the bundled model was not trained on.
MAX_COSTS = {"int8": 0.005, "int4": 0.03, "w8a8": 0.005}
WINDOW = 512
CHARACTERS_OF_EACH_BOOK = 40_000
# Nats / ln 2 / bytes over all six books is in the model's README. A part of them, whichever, is near it.
BITS_PER_BYTE_TOLERANCE = 0.1

HELD_OUT_BOOKS = (
    "aesop-the-aesop-for-children-with-pictures-by-milo-winter",
    "burgess-old-mother-west-wind",
    "jacobs-indian-fairy-tales",
)


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, LLM]]:
    opened = {
        dtype: LLM(BUNDLED_MODEL, dtype=dtype, threads=1, chunk_size=512) for dtype in ("float32", *MAX_COSTS)
    }
    yield opened
    for llm in opened.values():
        llm.close()


def nats_per_token(llm: LLM, windows: list[list[int]]) -> float:
    scores = llm.score(windows)
    return -sum(score.total_logprob for score in scores) / sum(len(score.logprobs) for score in scores)


def windows_of(ids: list[int]) -> list[list[int]]:
    """Windows that share one token, so that each token but the first is predicted once."""
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - 1, WINDOW - 1)]


def assert_costs_are_within_bounds(nats: dict[str, float]) -> None:
    costs = {dtype: math.expm1(nats[dtype] - nats["float32"]) for dtype in MAX_COSTS}
    print(f"float32 perplexity {math.exp(nats['float32']):.3f}")
    for dtype, most in MAX_COSTS.items():
        print(f"{dtype} {costs[dtype]:+.2%}")
        assert costs[dtype] < most, f"{dtype} costs {costs[dtype]:.2%}"


def test_quantization_costs_little_perplexity_on_held_out_books(shared: Path, models: dict[str, LLM]) -> None:
    tokenizer = models["float32"].tokenizer
    assert tokenizer.sep_token_id is not None
    ids: list[int] = []
    num_bytes = 0
    for book in HELD_OUT_BOOKS:
        path = shared / "corpus" / f"{book}.txt"
        if not path.is_file():
            pytest.skip(f"{path} not found")
        text = path.read_text(encoding="utf-8")[:CHARACTERS_OF_EACH_BOOK]
        ids += [*tokenizer.encode(text), tokenizer.sep_token_id]
        num_bytes += len(text.encode())
    nats = {dtype: nats_per_token(llm, windows_of(ids)) for dtype, llm in models.items()}
    bits_per_byte = nats["float32"] * (len(ids) - 1) / math.log(2) / num_bytes
    print(f"{len(ids):,} tokens, {bits_per_byte:.3f} bits per byte")
    card = (find_checkpoint(BUNDLED_MODEL) / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"held-out bits per byte \| \*\*([\d.]+)\*\*", card)
    assert stated is not None
    assert bits_per_byte == pytest.approx(float(stated[1]), abs=BITS_PER_BYTE_TOLERANCE)
    assert_costs_are_within_bounds(nats)


def test_quantization_costs_little_perplexity_on_the_models_own_text(models: dict[str, LLM]) -> None:
    """Needs no books: for text that the float32 model writes, no other model is better on average."""
    params = SamplingParams(temperature=1.0, max_tokens=400, seed=1, n=16, ignore_eos=True)
    output = models["float32"].generate("Once upon a time", params)[0]
    texts = [[*output.prompt_token_ids, *completion.token_ids] for completion in output.outputs]
    assert_costs_are_within_bounds({dtype: nats_per_token(llm, texts) for dtype, llm in models.items()})
