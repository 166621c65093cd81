"""What others build on `PreTrainedModel`: Auto classes, pipelines, Trainer, PEFT, device maps, back ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_models import PAD, TOLERANCE, error, gradients, ours, padded_batch, random_ids, worst
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.modernbert_decoder.modeling_modernbert_decoder import (
    ModernBertDecoderForCausalLM as UpstreamForCausalLM,
)

import modernbert_decoder.pytorch as wing
from checkpoints import CLS, SEP, tiny_architecture, write_checkpoint
from modernbert_decoder.pytorch import ModernBertDecoderForCausalLM
from modernbert_decoder.pytorch.attention import BackEnd

# Registering changes the library for the whole process, so it happens in one of its own.
AUTO = """
import json, sys
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline
)
from transformers.utils import logging
from modernbert_decoder.pytorch import register_auto_classes

logging.set_verbosity_error()
folder = sys.argv[1]
before = type(AutoConfig.from_pretrained(folder)).__module__
register_auto_classes()
register_auto_classes()
classes = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
modules = [type(auto.from_pretrained(folder)).__module__ for auto in (AutoConfig, *classes)]
generate = pipeline("text-generation", model=folder)
generated = generate("hello", max_new_tokens=4, do_sample=False)[0]["generated_text"]
classify = pipeline("text-classification", model=folder)
texts = ["a", "a longer text"]
rows = classify(texts, padding=True, batch_size=2, top_k=None)
scores = [{row["label"]: row["score"] for row in of_text} for of_text in rows]
with torch.no_grad():
    logits = classify.model(**classify.tokenizer(texts, padding=True, return_tensors="pt")).logits
expected = [dict(zip(("LABEL_0", "LABEL_1"), row)) for row in logits.softmax(-1).tolist()]
modules += [type(pipe.model).__module__ for pipe in (generate, classify)]
print(json.dumps([before, modules, generated[:5], scores, expected]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    folder = write_checkpoint(tmp_path / "model", tiny_architecture())
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]", "pad_token": "[PAD]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id) == (CLS, SEP)
    tokenizer.save_pretrained(folder)
    return folder


def test_auto_classes_and_pipelines_use_these_classes_once_registered(folder: Path) -> None:
    import json

    command = [sys.executable, "-W", "ignore", "-c", AUTO, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    before, modules, text, scores, expected = json.loads(done.stdout.splitlines()[-1])
    assert before.startswith("transformers.")
    assert len(modules) == 6
    assert all(module.startswith("modernbert_decoder.pytorch.") for module in modules)
    assert text == "hello"
    assert [pytest.approx(row, rel=1e-5) for row in expected] == scores
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)


@pytest.fixture
def flash_calls() -> Iterator[list[dict[str, Any]]]:
    """Stands in for FlashAttention, which needs a GPU, and records what it is called with."""
    calls: list[dict[str, Any]] = []

    def record(module: Any, q: torch.Tensor, k: Any, v: Any, mask: Any, **options: Any) -> tuple[Any, None]:
        calls.append({"kind": module.kind, "causal": module.is_causal, "mask": mask, "keys": k, **options})
        return torch.zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3]), None

    original = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = record
    yield calls
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = original


def test_flash_attention_is_called_with_window_and_padding(flash_calls: list[dict[str, Any]]) -> None:
    model = ours()
    model.config._attn_implementation = "flash_attention_2"
    batch = padded_batch(130, "left")
    cache = model(**batch).past_key_values
    assert [call["sliding_window"] for call in flash_calls] == [None, 64, 64, None]
    assert all(call["causal"] and call["dropout"] == 0.0 for call in flash_calls)
    assert all(torch.equal(call["mask"], batch["attention_mask"].bool()) for call in flash_calls)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    flash_calls.clear()
    model(random_ids(1), attention_mask=mask, past_key_values=cache)
    assert [call["keys"].shape[2] for call in flash_calls] == [131, 64, 64, 131]
    assert all(call["mask"].shape[1] == call["keys"].shape[2] for call in flash_calls)


def test_flash_attention_gets_positions_and_no_mask_for_packed_sequences(
    flash_calls: list[dict[str, Any]],
) -> None:
    model = ours()
    model.config._attn_implementation = "flash_attention_2"
    positions = torch.cat([torch.arange(40), torch.arange(30)])[None]
    model(random_ids(70, rows=1), position_ids=positions)
    assert all(call["mask"] is None for call in flash_calls)
    assert all(torch.equal(call["position_ids"], positions) for call in flash_calls)


def test_sdpa_gets_no_mask_that_it_does_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = ours(attention="sdpa"), []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        masks.append(None if mask is None else tuple(mask.shape))
        return original(module, q, k, v, mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", record)
    ones = torch.ones(2, 200, dtype=torch.long)
    ids = random_ids(200)

    def masks_of(**inputs: Any) -> list[Any]:
        masks.clear()
        model(**inputs)
        return list(masks)

    within = ids[:, :64]
    assert masks_of(input_ids=within) == [None] * 4
    assert masks_of(input_ids=within, attention_mask=ones[:, :64]) == [None] * 4
    full, sliding, *_ = masks_of(input_ids=ids, attention_mask=ones)
    assert full is None
    assert sliding is not None
    cache = model(ids[:, :150]).past_key_values
    step = {"attention_mask": ones[:, :151], "past_key_values": cache}
    assert masks_of(input_ids=ids[:, 150:151], **step) == [None] * 4  # decode: every kept key is visible


@pytest.mark.filterwarnings("ignore")
def test_layers_offloaded_to_the_disk_generate_the_same(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    places = {"model.embeddings": "cpu", "model.rotary_emb": "cpu", "model.final_norm": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(4)}
    places |= {"lm_head": "cpu", "decoder": "cpu"}
    load = ModernBertDecoderForCausalLM.from_pretrained
    spread = load(folder, device_map=places, offload_folder=str(tmp_path / "offloaded"))
    assert spread.model.layers[1].attn.Wo.weight.device.type == "meta"
    ids = random_ids(50)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False}
    assert torch.equal(spread.generate(ids, **options), load(folder).generate(ids, **options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ForCausalLM", "ForSequenceClassification"])
def test_trainer_accumulates_gradients_to_the_same_step(folder: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments, set_seed

    is_lm, tokens = name == "ForCausalLM", range(40)
    rows = [
        {"input_ids": [i + t for t in tokens], "labels": [i + t for t in tokens] if is_lm else i % 2}
        for i in range(8)
    ]
    weights = []
    for batch_size, accumulated in ((8, 1), (2, 4)):
        set_seed(0)  # the classifier's head is random
        model = getattr(wing, f"ModernBertDecoder{name}").from_pretrained(folder)
        before = model.model.layers[0].attn.Wo.weight.detach().clone()
        if is_lm:
            model.skip_logits = True
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,  # clipping would hide a wrong length of the step
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        weights.append(model.model.layers[0].attn.Wo.weight.detach() - before)
    assert error(weights[1], weights[0]) < 10 * TOLERANCE  # of the steps, which are small differences


@pytest.mark.filterwarnings("ignore")
def test_batches_of_a_flattening_collator_train_like_padded_ones() -> None:
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithFlattening

    lengths = (90, 20, 130, 70)
    rows = [{"input_ids": random_ids(n, rows=1)[0].tolist()} for n in lengths]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batches = list(DataLoader(rows, batch_size=4, collate_fn=collator))
    assert [batch["input_ids"].shape for batch in batches] == [(1, sum(lengths))]
    inputs = {key: value for key, value in batches[0].items() if key != "attention_mask"}
    ids = torch.full((4, max(lengths)), PAD)
    for row, of_row in zip(ids, rows, strict=True):
        row[: len(of_row["input_ids"])] = torch.tensor(of_row["input_ids"])
    labels = ids.masked_fill(ids == PAD, -100)
    model = ours(attention="sdpa").train()
    expected = gradients(model, model(ids, attention_mask=(ids != PAD).long(), labels=labels).loss)
    for skip_logits in (False, True):
        loss = model(**inputs, skip_logits=skip_logits).loss
        assert worst(gradients(model, loss), expected) < TOLERANCE


def same_quantization(folder: Path, **options: Any) -> None:
    """This package's class and upstream's, quantized by the same library, compute the same."""
    mine = ModernBertDecoderForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    theirs = UpstreamForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    plain = ModernBertDecoderForCausalLM.from_pretrained(folder)
    ids = random_ids(130)
    with torch.no_grad():
        logits = mine(ids).logits
        assert error(logits, theirs(ids).logits) < TOLERANCE
        assert error(logits, plain(ids).logits) > TOLERANCE  # it was quantized


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_quantizes_on_the_cpu_as_it_does_upstream(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    folder = write_checkpoint(tmp_path, tiny_architecture(intermediate_size=128))  # blocks of 64
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    same_quantization(folder, quantization_config=config, device_map="cpu")


@pytest.mark.filterwarnings("ignore")
def test_torchao_quantizes_on_the_cpu_as_it_does_upstream(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    folder = write_checkpoint(tmp_path, tiny_architecture())
    same_quantization(folder, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()))


@pytest.mark.filterwarnings("ignore")
def test_lora_trains_saves_and_merges(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "Wi"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(ModernBertDecoderForCausalLM.from_pretrained(folder), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, seen = random_ids(80), []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[2] < seen[0]
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    base = ModernBertDecoderForCausalLM.from_pretrained(folder)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().eval()
    assert error(merged(ids).logits, model(input_ids=ids).logits) < TOLERANCE


def test_a_mask_is_moved_once_for_all_layers_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Tensor] = []
    original = torch.Tensor.to

    def to(mask: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        moved.append(mask)
        return original(mask, *arguments, **options)

    attention = ours().model.layers[0].attn
    mask = torch.zeros(1, 1, 3, 3)
    back_end = BackEnd(
        implementation="eager", masks={attention.kind: mask}, cache=None, slots=torch.arange(3)
    )
    elsewhere = torch.empty(1, 2, 3, 16, device="meta")
    monkeypatch.setattr(torch.Tensor, "to", to)
    for _ in range(3):
        back_end(attention, elsewhere, elsewhere, elsewhere)
    assert sum(each is mask for each in moved) == 1
    here = torch.zeros(1, 2, 3, 16)
    back_end(attention, here, here, here)
    assert sum(each is mask for each in moved) == 1
