"""Arguments that would be broadcast, sliced or added without a word are refused, each with the fix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_models import TOLERANCE, error, needs_compiler, ours, random_ids
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modernbert_decoder.pytorch import ModernBertDecoderConfig, losses

KINDS = ("full_attention", "sliding_attention")


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_of_another_length_are_refused(name: str, skip_logits: bool) -> None:
    ids = random_ids(80)
    with pytest.raises(ValueError, match=r"\(2, 50\), but the tokens \(2, 80\)"):
        ours()(ids, **{name: ids[:, :50]}, skip_logits=skip_logits)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_labels_may_be_of_32_bits(skip_logits: bool) -> None:
    model, ids = ours(), random_ids(80)
    loss = model(ids, labels=ids.int(), skip_logits=skip_logits).loss
    assert error(loss, model(ids, labels=ids).loss) < TOLERANCE
    classifier = ours("ForSequenceClassification")
    assert torch.isfinite(classifier(ids, labels=torch.tensor([0, 1], dtype=torch.int32)).loss)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("is_per_kind", [False, True])
def test_a_mask_of_integers_is_not_added_to_the_scores(attention: str, is_per_kind: bool) -> None:
    mask: Any = causal(80).long()
    with pytest.raises(ValueError, match=r"Pass mask\.bool\(\)"):
        ours(attention=attention)(
            random_ids(80), attention_mask=dict.fromkeys(KINDS, mask) if is_per_kind else mask
        )


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_no_mask_is_not_taken_for_a_causal_one(attention: str) -> None:
    with pytest.raises(ValueError, match="would see later tokens"):
        ours(attention=attention)(random_ids(40), attention_mask=dict.fromkeys(KINDS))


def test_no_mask_is_taken_by_sdpa_where_its_causal_flag_says_the_same() -> None:
    model, ids, none = ours(attention="sdpa"), random_ids(80), dict.fromkeys(KINDS)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        first = model(ids[:, :64], attention_mask=none, past_key_values=cache).logits
        second = model(ids[:, 64:65], attention_mask=none, past_key_values=cache).logits
        assert error(torch.cat([first, second], 1), whole[:, :65]) < TOLERANCE
        with pytest.raises(ValueError, match="none before the new ones"):
            model(ids[:, 65:70], attention_mask=none, past_key_values=cache)
        with pytest.raises(ValueError, match=r"sliding_attention'\] is None.*more than the window"):
            model(ids, attention_mask=none)
        unwindowed = DynamicCache()
        model(ids[:, :70], past_key_values=unwindowed)
        with pytest.raises(ValueError, match=r"sliding_attention'\] is None"):
            model(ids[:, 70:71], attention_mask=none, past_key_values=unwindowed)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 1, 80), r"must be \(2 or 1, 2 or 1, 80, keys\)"),  # one row for all queries
        ((3, 1, 80, 80), r"must be \(2 or 1"),
        ((2, 3, 80, 80), r"2 or 1, 80, keys"),
        ((2, 1, 80, 70), "70 columns, but there are 80 slots"),
        ((2, 1, 80, 90), "90 columns, but there are 80 slots"),
    ],
)
def test_a_mask_of_four_dimensions_and_another_shape_is_refused(
    shape: tuple[int, ...], message: str, attention: str
) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    for given in (mask, dict.fromkeys(KINDS, mask)):
        with pytest.raises(ValueError, match=message):
            ours(attention=attention)(random_ids(80), attention_mask=given)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("shape", [(2, 80), (1, 80), (2, 80, 80)])
def test_a_mask_per_layer_kind_needs_four_dimensions(attention: str, shape: tuple[int, ...]) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"has {len(shape)} dimensions, but must have 4"):
        ours(attention=attention)(random_ids(80, rows=shape[0]), attention_mask=dict.fromkeys(KINDS, mask))


@pytest.mark.parametrize("name", ["Model", "ForCausalLM", "ForSequenceClassification"])
def test_positions_in_a_cache_are_those_that_it_has_anyway(name: str) -> None:
    model, ids = ours(name, attention="sdpa"), random_ids(80)
    with torch.no_grad():
        whole = model(ids)[0]
        assert torch.equal(model(ids, cache_position=torch.arange(80))[0], whole)
        for cache in (
            DynamicCache(config=model.config),
            StaticCache(config=model.config, max_cache_len=90),
        ):
            model(ids[:, :60], past_key_values=cache, cache_position=torch.arange(60))
            rest = model(ids[:, 60:], past_key_values=cache, cache_position=torch.arange(60, 80))[0]
            assert error(rest, whole if name == "ForSequenceClassification" else whole[:, 60:]) < TOLERANCE


@pytest.mark.parametrize("positions", [torch.tensor([7]), torch.arange(81), torch.arange(80)[None]])
def test_positions_in_a_cache_of_another_shape_are_refused(positions: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"cache_position has the shape .* must be \(80,\)"):
        ours()(random_ids(80), cache_position=positions)


def test_stated_positions_keep_the_padding_of_a_step_without_logits() -> None:
    model, ids = ours(attention="sdpa").train(), random_ids(80)
    mask = torch.ones_like(ids)
    mask[0, 60:] = 0
    inputs = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "skip_logits": True}
    loss = model(ids, **inputs, cache_position=torch.arange(80)).loss
    assert error(loss, model(ids, **inputs).loss) < TOLERANCE


@pytest.mark.parametrize("skip_logits", [False, True])
def test_shifted_labels_are_labels_moved_by_one(skip_logits: bool) -> None:
    model, ids = ours(attention="sdpa"), random_ids(80)
    labels = ids.masked_fill(torch.rand(2, 80) < 0.2, -100)
    expected = model(ids, labels=labels).loss
    shifted = losses.next_token_labels(labels)
    assert shifted[:, :-1].equal(labels[:, 1:])
    assert error(model(ids, shift_labels=shifted, skip_logits=skip_logits).loss, expected) < TOLERANCE
    # they come first, as trainers that split sequences expect
    both = model(ids, shift_labels=shifted, labels=ids, skip_logits=skip_logits).loss
    assert error(both, expected) < TOLERANCE


def test_a_mask_for_one_kind_only_is_refused() -> None:
    with pytest.raises(ValueError, match="states full_attention, but this model needs sliding_attention"):
        ours()(random_ids(80), attention_mask={"full_attention": causal(80)})


@pytest.mark.parametrize("name", ["ForCausalLM", "ForSequenceClassification"])
def test_a_mask_of_other_rows_or_columns_than_the_tokens_is_refused(name: str) -> None:
    model, ids = ours(name), random_ids(80)
    with pytest.raises(ValueError, match="3 rows, but the batch has 2"):
        model(ids, attention_mask=torch.ones(3, 80))
    for columns in (79, 90):
        with pytest.raises(ValueError, match=f"{columns} columns, but 0 cached and 80 new"):
            model(ids, attention_mask=torch.ones(2, columns))


def test_a_classifier_with_a_static_cache_pools_by_the_columns_of_its_tokens() -> None:
    model, ids = ours("ForSequenceClassification", attention="sdpa"), random_ids(80)
    expected = model(ids[:, :70]).logits
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[:, 70:] = 0
    cache = StaticCache(config=model.config, max_cache_len=100)
    with torch.no_grad():
        assert error(model(ids, attention_mask=mask, past_key_values=cache).logits, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        (torch.rand(3, 2), "regression"),
        (torch.rand(2), "multi_label_classification"),
        (torch.zeros(2, 3, dtype=torch.long), "single_label_classification"),
    ],
)
def test_labels_of_another_shape_than_a_classifiers_are_refused(
    labels: torch.Tensor, problem_type: str
) -> None:
    model = ours("ForSequenceClassification", num_labels=3, problem_type=problem_type)
    with pytest.raises(ValueError, match="labels have the shape"):
        model(random_ids(20), labels=labels)


def test_ids_and_positions_of_another_shape_are_refused() -> None:
    model, ids = ours(), random_ids(80)
    for wrong in (ids[0], ids[:, :0]):
        with pytest.raises(ValueError, match=r"must be \(batch, tokens\), with a token at least"):
            model(wrong)
    for positions in (torch.arange(80), torch.arange(70)[None], torch.arange(80).expand(3, -1)):
        with pytest.raises(ValueError, match=r"must be \(2, 80\) or \(1, 80\)"):
            model(ids, position_ids=positions)


def test_lengths_of_packed_sequences_without_positions_are_refused_where_they_would_do_nothing() -> None:
    lengths = torch.tensor([0, 40, 80], dtype=torch.int32)
    with pytest.raises(ValueError, match="Pass position_ids that start anew"):
        ours(attention="sdpa")(random_ids(80, rows=1), cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
    positions = torch.arange(40).repeat(2)[None]
    inputs = {"position_ids": positions, "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
    model, ids = ours(attention="sdpa"), random_ids(80, rows=1)
    assert model(ids, **inputs).logits.equal(model(ids, position_ids=positions).logits)
    with pytest.raises(ValueError, match="and no attention_mask"):  # with one nothing is separated
        model(ids, **inputs, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("Model", "labels"),
        ("ForCausalLM", "attention_masks"),
        ("ForCausalLM", "is_causal"),
        ("ForSequenceClassification", "shift_labels"),
        ("ForSequenceClassification", "skip_logits"),
    ],
)
def test_an_argument_that_nobody_reads_is_refused(name: str, argument: str, attention: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: no such argument.* takes cu_seq_lens_k"):
        ours(name, attention=attention)(random_ids(80), **{argument: random_ids(80)})


def test_token_types_are_taken_where_they_say_nothing() -> None:
    model, ids = ours(), random_ids(80)
    types = torch.zeros_like(ids)  # tokenizers of transformers 4 add them
    assert torch.equal(model(ids, token_type_ids=types).logits, model(ids).logits)
    types[0, 40:] = 1
    with pytest.raises(ValueError, match="has no token types"):
        model(ids, token_type_ids=types)


def test_an_attention_function_registered_by_others_gets_every_argument() -> None:
    seen: dict[str, Any] = {}

    def attend(module: Any, q: torch.Tensor, k: Any, v: Any, mask: Any, **options: Any) -> tuple[Any, None]:
        seen.update(options)
        return q.transpose(1, 2), None

    model = ours()
    AttentionInterface.register("of_the_test", attend)
    try:
        model.config._attn_implementation = "of_the_test"
        model(random_ids(80), temperature=0.5)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("of_the_test")
    assert seen["temperature"] == 0.5


def test_packed_sequences_that_flash_attention_would_join_are_refused() -> None:
    model = ours()
    model.config._attn_implementation = "flash_attention_2"
    positions = torch.cat([torch.arange(40), torch.arange(30)])[None]
    with pytest.raises(ValueError, match="2 rows and 0 cached tokens"):
        model(random_ids(70), position_ids=positions)


def test_an_override_of_the_scaling_keeps_the_bases_that_only_transformers_5_states() -> None:
    stated = {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in zip(KINDS, (50000.0, 7000.0), strict=True)
    }
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = ModernBertDecoderConfig.from_dict({"rope_parameters": stated}, rope_scaling=scaling)
    assert (config.global_rope_theta, config.local_rope_theta) == (50000.0, 7000.0)
    assert config.rope_parameters["full_attention"]["factor"] == 2.0


def test_evaluation_without_gradients_computes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[int] = []
    original = losses._add_product
    monkeypatch.setattr(losses, "_add_product", lambda *arguments: (products.append(1), original(*arguments)))
    model, ids = ours(), random_ids(40)
    with torch.no_grad():
        model(ids, labels=ids, skip_logits=True)
    assert not products
    model(ids, labels=ids, skip_logits=True)
    assert products


@needs_compiler
@pytest.mark.filterwarnings("ignore::UserWarning")  # a warning of the library's about running uncompiled
@pytest.mark.parametrize("case", ["packed", "four dimensions", "cached"])
def test_flex_attention_equals_eager_with_every_mask(case: str) -> None:
    flex, eager, ids = ours(attention="flex_attention"), ours(), random_ids(130)
    inputs: dict[str, Any] = {"use_cache": False}
    if case == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(80), torch.arange(50)])[None]
    elif case == "four dimensions":
        inputs["attention_mask"] = causal(130) & ((torch.rand(2, 1, 130, 130) < 0.5) | torch.eye(130).bool())
    with torch.no_grad():
        expected = eager(ids, **inputs).logits
        if case == "cached":
            cache = DynamicCache(config=flex.config)
            chunks = [flex(chunk, past_key_values=cache).logits for chunk in ids.split([100, 30], dim=1)]
            assert error(torch.cat(chunks, 1), expected) < TOLERANCE
        else:
            assert error(flex(ids, **inputs).logits, expected) < TOLERANCE
            if case == "four dimensions":
                with pytest.raises(ValueError, match="takes a boolean one"):
                    flex(ids, attention_mask=torch.zeros(2, 1, 130, 130))
