"""The float32 engine against transformers on random checkpoints: logits, and greedy tokens over 200 steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from checkpoints import Float32, open_runtime, random_ids, relative_error, tiny_architecture, write_checkpoint
from modernbert_decoder.architecture import (
    DecoderArchitecture,
    LayerKind,
    RotaryParameters,
    released_architecture,
)
from modernbert_decoder.engine.calls import Row
from modernbert_decoder.engine.runtime import Runtime

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# The bound that docs promise; two float32 implementations of these depths differ by about 1e-5.
LOGIT_TOLERANCE = 1e-4
# Where the reference's two best logits are closer than this many times the error, either may come first.
TIE_FACTOR = 10
# Such near-ties are rare with logits this far apart: more of them would mean that the error is large.
MAX_TIE_SHARE = 0.01
NUM_STEPS = 200
PROMPT_LENGTHS = (1, 63, 64, 65, 200, 1000)
CONTEXT_LENGTH = PROMPT_LENGTHS[-1] + NUM_STEPS
# So many logits are compared: all positions of a tiny vocabulary, the last ones of a large one.
_MAX_COMPARED = 1 << 24
_PIECE = 128

FULL, SLIDING = LayerKind.FULL, LayerKind.SLIDING


def rotary(full: RotaryParameters, sliding: RotaryParameters) -> dict[LayerKind, RotaryParameters]:
    return {FULL: full, SLIDING: sliding}


_BIASES = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
_YARN = RotaryParameters("yarn", 10000.0, factor=4.0, original_max_position_embeddings=256)
_YARN_IN_FULL = RotaryParameters(
    "yarn", 500.0, factor=8.0, original_max_position_embeddings=64, beta_fast=16.0, attention_factor=1.3
)
_LLAMA3 = RotaryParameters(
    "llama3",
    factor=4.0,
    original_max_position_embeddings=128,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)

ARCHITECTURES: dict[str, DecoderArchitecture] = {
    "17m": released_architecture("17m"),
    "32m": released_architecture("32m"),
    "tiny": tiny_architecture(),
    "untied": tiny_architecture(tie_word_embeddings=False),
    "untied, no decoder bias": tiny_architecture(tie_word_embeddings=False, decoder_bias=False),
    "no decoder bias": tiny_architecture(decoder_bias=False),
    "all biases": tiny_architecture(**_BIASES),
    **{f"{name} alone": tiny_architecture(**{name: True}) for name in _BIASES},
    "every layer full": tiny_architecture(full_every=1),
    "every second layer full": tiny_architecture(full_every=2),
    "only the first layer full": tiny_architecture(full_every=9),
    "only sliding layers": tiny_architecture(layer_kinds=(SLIDING,) * 4),
    "irregular kinds": tiny_architecture(layer_kinds=(SLIDING, FULL, FULL, SLIDING)),
    "one layer": tiny_architecture(num_hidden_layers=1),
    "local_attention 2": tiny_architecture(window=1),
    "local_attention 8": tiny_architecture(window=4),
    "local_attention 130": tiny_architecture(window=65),
    "local_attention 600": tiny_architecture(window=300),
    "small global base": tiny_architecture(rotary=rotary(RotaryParameters(theta=50.0), RotaryParameters())),
    "small local base": tiny_architecture(rotary=rotary(RotaryParameters(), RotaryParameters(theta=50.0))),
    "linear": tiny_architecture(rotary=dict.fromkeys(LayerKind, RotaryParameters("linear", factor=3.0))),
    "dynamic": tiny_architecture(rotary=dict.fromkeys(LayerKind, RotaryParameters("dynamic", factor=3.0))),
    "yarn": tiny_architecture(rotary=dict.fromkeys(LayerKind, _YARN)),
    "yarn and linear": tiny_architecture(
        rotary=rotary(_YARN_IN_FULL, RotaryParameters("linear", 900.0, factor=2.0))
    ),
    "llama3": tiny_architecture(rotary=dict.fromkeys(LayerKind, _LLAMA3)),
    "silu and relu": tiny_architecture(hidden_activation="silu", classifier_activation="relu"),
    "gelu_new and swish": tiny_architecture(hidden_activation="gelu_new", classifier_activation="swish"),
    "relu and tanh": tiny_architecture(hidden_activation="relu", classifier_activation="gelu_pytorch_tanh"),
    "heads of 16": tiny_architecture(num_attention_heads=4),
    "heads of 128": tiny_architecture(hidden_size=256, num_attention_heads=2),
    "heads of 80": tiny_architecture(hidden_size=80, num_attention_heads=1),
    "odd sizes": tiny_architecture(
        vocab_size=301, hidden_size=96, intermediate_size=37, num_hidden_layers=5, num_attention_heads=3
    ),
    "large norm_eps": tiny_architecture(norm_eps=0.03),
}


@dataclass(frozen=True)
class Pair:
    """One checkpoint, opened by the engine and by transformers."""

    architecture: DecoderArchitecture
    runtime: Runtime
    reference: Any

    def reference_logits(self, ids: list[int], num_positions: int) -> Float32:
        """The last `num_positions` rows of one forward pass without a cache."""
        with torch.no_grad():
            output = self.reference(torch.tensor([ids]), logits_to_keep=num_positions, use_cache=False)
        logits: Float32 = output.logits[0].numpy()
        return logits


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    architecture = ARCHITECTURES[request.param]
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), architecture)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small for threads to gain more than their waiting costs
    yield Pair(
        architecture,
        open_runtime(folder, context_length=CONTEXT_LENGTH),
        transformers.ModernBertDecoderForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
    )
    torch.set_num_threads(num_threads)


def greedy(runtime: Runtime, prompt: list[int], *, num_prompt_logits: int) -> tuple[Float32, list[int]]:
    """The logits of the last prompt positions and of every step, and the tokens chosen."""
    slot = runtime.cache.allocate()
    rows = list(runtime.step([Row(slot, prompt, num_prompt_logits)])[0].copy())
    tokens = [int(rows[-1].argmax())]
    while len(tokens) < NUM_STEPS:
        rows.append(runtime.step([Row(slot, tokens[-1:])])[0][0].copy())
        tokens.append(int(rows[-1].argmax()))
    runtime.cache.free(slot)
    return np.stack(rows), tokens


def near_ties(tokens: list[int], reference: Float32, error: float) -> int:
    """How often our token is not the reference's but as good; any other difference fails.

    The reference was fed our tokens, so each step is judged on the text so far.
    """
    num_ties = 0
    for step, (token, row) in enumerate(zip(tokens, reference, strict=True)):
        best = int(row.argmax())
        if token == best:
            continue
        gap = float(row[best] - row[token])
        assert gap < TIE_FACTOR * error, f"step {step}: {token} instead of {best}, {gap} below it"
        num_ties += 1
    return num_ties


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_logits_and_greedy_tokens_over_200_steps_are_those_of_transformers(
    pair: Pair, length: int, report_parity: Callable[[int, int, float], None]
) -> None:
    prompt = random_ids(pair.architecture, length)
    num_prompt_logits = min(length, _MAX_COMPARED // pair.architecture.vocab_size - NUM_STEPS)
    logits, tokens = greedy(pair.runtime, prompt, num_prompt_logits=num_prompt_logits)
    reference = pair.reference_logits(prompt + tokens[:-1], len(logits))
    error = relative_error(logits, reference)
    assert error < LOGIT_TOLERANCE
    num_ties = near_ties(tokens, reference[-NUM_STEPS:], error * float(np.abs(reference).max()))
    report_parity(NUM_STEPS, num_ties, error)
    assert num_ties <= MAX_TIE_SHARE * NUM_STEPS
    assert len(set(tokens)) > 20, "greedy decoding collapsed: the comparison would show nothing"


@pytest.mark.parametrize("pair", ["17m", "32m"], indirect=True)
def test_logits_of_every_position_of_a_long_prompt_are_those_of_transformers(pair: Pair) -> None:
    """A large vocabulary's logits for all positions at once would take gigabytes: piece by piece."""
    prompt = random_ids(pair.architecture, PROMPT_LENGTHS[-1])
    with torch.no_grad():
        states = pair.reference.model(torch.tensor([prompt]), use_cache=False).last_hidden_state
    slot = pair.runtime.cache.allocate()
    num_compared = 0
    for start in range(0, len(prompt), _PIECE):
        piece = prompt[start : start + _PIECE]
        logits = pair.runtime.step([Row(slot, piece, len(piece))])[0]
        with torch.no_grad():
            reference = pair.reference.decoder(pair.reference.lm_head(states[:, start : start + _PIECE]))
        assert relative_error(logits, reference[0].numpy()) < LOGIT_TOLERANCE
        num_compared += len(logits)
    pair.runtime.cache.free(slot)
    assert num_compared == len(prompt)


@pytest.mark.parametrize("pair", ["17m", "tiny", "local_attention 8"], indirect=True)
def test_greedy_tokens_are_those_of_generate(pair: Pair) -> None:
    """The same through upstream's own loop and cache, here on prompts where no near-tie occurs."""
    prompt = random_ids(pair.architecture, 65)
    _, tokens = greedy(pair.runtime, prompt, num_prompt_logits=1)
    output = pair.reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NUM_STEPS,
        eos_token_id=None,
        pad_token_id=pair.architecture.pad_token_id,
    )
    assert output[0, len(prompt) :].tolist() == tokens


def test_near_ties_are_told_from_wrong_tokens() -> None:
    row = np.array([[0.0, 1.0, 0.999]], np.float32)
    assert near_ties([1], row, 1e-3) == 0
    assert near_ties([2], row, 1e-3) == 1
    with pytest.raises(AssertionError, match="step 0: 2 instead of 1"):
        near_ties([2], row, 1e-5)
