"""What is true of any causal model of the library: outputs, embeddings, initialization, saving, loading."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch_models import (
    CONFIG,
    NAMES,
    TOLERANCE,
    UpstreamConfig,
    error,
    gradients,
    main_output,
    ours,
    padded_batch,
    random_ids,
    upstream,
    worst,
)
from transformers import DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

import modernbert_decoder.pytorch as wing
from modernbert_decoder.architecture import Head
from modernbert_decoder.pytorch import ModernBertDecoderConfig, network
from modernbert_decoder.pytorch.caches import CACHE_FIELD

HEADS = dict(zip(NAMES, (Head.NONE, Head.CAUSAL_LM, Head.SEQUENCE_CLASSIFICATION), strict=True))
_OUTPUTS = (BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutputWithPast)
OUTPUTS = dict(zip(NAMES, _OUTPUTS, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_checkpoint(name: str) -> None:
    changes = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
    for options in ({}, changes, {"tie_word_embeddings": False}):
        model = ours(name, **options)
        expected = model.config.to_architecture(HEADS[name]).tensor_shapes()
        prefix = "model." if name == "Model" else ""
        assert {prefix + n: tuple(p.shape) for n, p in model.named_parameters()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_outputs_have_the_documented_fields_and_the_tuple_has_the_same_order(name: str) -> None:
    model, ids = ours(name), random_ids(70)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert main_output(output).shape[0] == 2
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 70, 32)] * 5
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, 70, 70)] * 4
    assert error(torch.stack(output.attentions).sum(-1), torch.ones(4, 2, 2, 70)) < TOLERANCE
    as_tuple = model(ids, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 4  # states or logits, cache, hidden states, attentions
    assert torch.equal(as_tuple[0], main_output(output))
    assert torch.equal(as_tuple[2][-1], output.hidden_states[-1])
    assert type(output) is OUTPUTS[name]


@pytest.mark.parametrize("name", ["ForCausalLM", "ForSequenceClassification"])
def test_the_loss_comes_first_in_the_tuple(name: str) -> None:
    model, ids = ours(name), random_ids(70)
    labels = ids if name == "ForCausalLM" else torch.tensor([1, 0])
    output = model(ids, labels=labels)
    loss, logits, cache = model(ids, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert cache.get_seq_length() == 70
    pair = model(ids, labels=labels, return_dict=False, use_cache=False)
    assert [x.shape for x in pair] == [loss.shape, logits.shape]
    model.config.return_dict = False
    assert len(model(ids, labels=labels, use_cache=False)) == 2


@pytest.mark.parametrize("name", NAMES)
def test_both_names_of_the_cache_work_for_every_class(name: str) -> None:
    model, ids = ours(name), random_ids(70)
    output = model(ids)
    assert output.past_key_values is output["past_key_values"] is output[CACHE_FIELD]
    with pytest.raises(ValueError, match="two names of the same argument"):
        model(ids, past_key_values=output[CACHE_FIELD], cache=output[CACHE_FIELD])
    whole = main_output(output)
    for argument in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config)
        assert model(ids[:, :60], **{argument: cache})[CACHE_FIELD] is cache
        rest = main_output(model(ids[:, 60:], **{argument: cache}))
        assert cache.get_seq_length() == 70
        assert error(rest, whole if name == "ForSequenceClassification" else whole[:, 60:]) < TOLERANCE


def test_the_first_state_is_the_normalized_embedding_and_the_last_the_final_one() -> None:
    model, ids = ours("Model"), random_ids(70)
    output = model(ids, output_hidden_states=True)
    assert torch.equal(output.hidden_states[0], model.embeddings(ids, None))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_attention_weights_are_refused_where_no_back_end_holds_them() -> None:
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        ours(attention="sdpa")(random_ids(5), output_attentions=True)


@pytest.mark.parametrize("name", NAMES)
def test_exactly_one_of_ids_and_embeddings_is_taken_and_they_are_equivalent(name: str) -> None:
    model, ids = ours(name), random_ids(70)
    embeds = model.get_input_embeddings()(ids)
    assert error(main_output(model(inputs_embeds=embeds)), main_output(model(ids))) < TOLERANCE
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**arguments)


def test_a_mask_that_does_not_cover_the_cache_is_refused() -> None:
    model, ids = ours(), random_ids(70)
    cache = model(ids[:, :60]).past_key_values
    with pytest.raises(ValueError, match="60 cached and 10 new"):
        model(ids[:, 60:], attention_mask=torch.ones(2, 10), past_key_values=cache)


def test_rows_of_a_batch_do_not_influence_each_other() -> None:
    model, ids = ours(attention="sdpa"), random_ids(130, rows=3)
    alone = torch.cat([model(row[None]).logits for row in ids])
    assert error(model(ids).logits, alone) < TOLERANCE


def test_padding_free_rows_equal_padded_ones() -> None:
    model = ours(attention="sdpa")
    batch = padded_batch(130, "right")
    lengths = batch["attention_mask"].sum(-1).tolist()
    padded = torch.cat([row[:n] for row, n in zip(model(**batch).logits, lengths, strict=True)])
    packed = torch.cat([row[:n] for row, n in zip(batch["input_ids"], lengths, strict=True)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    assert error(model(packed, position_ids=positions).logits[0], padded) < TOLERANCE


def test_two_runs_are_equal_and_dropout_works_only_while_training() -> None:
    dropout = dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), 0.2)
    for attention in ("eager", "sdpa"):
        model, ids = ours(attention=attention, **dropout), random_ids(70)
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_saved_and_loaded_is_the_same(tmp_path: Path, name: str) -> None:
    model, ids = ours(name, local_attention=20, num_labels=3), random_ids(70)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.sliding_window == 10
    assert torch.equal(
        main_output(loaded.eval()(ids)), main_output(type(model).from_pretrained(tmp_path)(ids))
    )
    assert error(main_output(loaded(ids)), main_output(model(ids))) < TOLERANCE
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        expected = model.config.to_architecture(HEADS[name]).tensor_shapes()
        prefix = "model." if name == "Model" else ""
        assert {prefix + key for key in file.keys()} == set(expected)  # noqa: SIM118


def test_bare_models_and_heads_load_each_others_checkpoints(tmp_path: Path) -> None:
    model, ids = ours(attention="sdpa"), random_ids(70)
    states = model.model(ids).last_hidden_state
    model.save_pretrained(tmp_path / "lm")
    bare = wing.ModernBertDecoderModel.from_pretrained(tmp_path / "lm")
    assert error(bare(ids).last_hidden_state, states) < TOLERANCE
    bare.save_pretrained(tmp_path / "bare")
    headed = wing.ModernBertDecoderForCausalLM.from_pretrained(tmp_path / "bare")
    assert error(headed.model(ids).last_hidden_state, states) < TOLERANCE
    assert headed.decoder.weight is headed.model.embeddings.tok_embeddings.weight


def test_a_classifier_can_start_from_the_head_of_a_language_model(tmp_path: Path) -> None:
    model = ours()
    model.save_pretrained(tmp_path / "lm")
    load = wing.ModernBertDecoderForSequenceClassification.from_pretrained
    reused, info = load(tmp_path / "lm", reuse_lm_head=True, num_labels=4, output_loading_info=True)
    assert torch.equal(reused.head.dense.weight, model.lm_head.dense.weight)
    assert torch.equal(reused.head.norm.weight, model.lm_head.norm.weight)
    assert set(info["missing_keys"]) == {"classifier.weight"}
    assert reused.classifier.weight.shape == (4, 32)
    assert not torch.equal(load(tmp_path / "lm").head.dense.weight, model.lm_head.dense.weight)
    reused.save_pretrained(tmp_path / "classifier")
    again = load(tmp_path / "classifier")
    assert all(torch.equal(value, reused.state_dict()[name]) for name, value in again.state_dict().items())
    model.model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no lm_head to start from"):
        load(tmp_path / "bare", reuse_lm_head=True)


def test_loading_in_bfloat16_keeps_the_angles_in_float32(tmp_path: Path) -> None:
    ours().save_pretrained(tmp_path)
    expected = wing.ModernBertDecoderForCausalLM.from_pretrained(tmp_path).model.rotary_emb
    loaded = wing.ModernBertDecoderForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    emptied = wing.ModernBertDecoderForCausalLM.from_pretrained(tmp_path).to("meta").to_empty(device="cpu")
    for rotary in (loaded.model.rotary_emb, emptied.model.rotary_emb):
        assert all(map(torch.equal, rotary.buffers(), expected.buffers()))


def test_resizing_keeps_the_tie_and_the_logits_of_old_tokens() -> None:
    model, ids = ours(attention="sdpa"), random_ids(70)
    before = model(ids).logits
    model.resize_token_embeddings(110)
    assert model.config.vocab_size == 110
    assert model.decoder.weight is model.model.embeddings.tok_embeddings.weight
    assert error(model(ids).logits[..., :96], before) < TOLERANCE
    assert model.config.to_architecture().tensor_shapes()["decoder.bias"] == (110,)


def test_an_untied_model_has_a_projection_of_its_own(tmp_path: Path) -> None:
    model, ids = ours(tie_word_embeddings=False), random_ids(70)
    assert model.decoder.weight is not model.model.embeddings.tok_embeddings.weight
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert error(loaded(ids).logits, model(ids).logits) < TOLERANCE
    model.resize_token_embeddings(110)
    assert model.decoder.weight.shape == model.model.embeddings.tok_embeddings.weight.shape == (110, 32)


@pytest.mark.filterwarnings("ignore")
def test_a_tied_checkpoint_loaded_untied_starts_from_its_embedding(tmp_path: Path) -> None:
    model, ids = ours(), random_ids(70)
    model.save_pretrained(tmp_path / "tied")
    load = wing.ModernBertDecoderForCausalLM.from_pretrained
    untied, info = load(tmp_path / "tied", tie_word_embeddings=False, output_loading_info=True)
    assert untied.decoder.weight is not untied.get_input_embeddings().weight
    assert error(untied(ids).logits, model(ids).logits) < TOLERANCE
    assert not info["missing_keys"]
    untied.save_pretrained(tmp_path / "untied")
    assert error(load(tmp_path / "untied")(ids).logits, model(ids).logits) < TOLERANCE
    model.model.save_pretrained(tmp_path / "bare")  # no head to complete: the projection is new as well
    fresh = load(tmp_path / "bare", tie_word_embeddings=False)
    assert not torch.equal(fresh.decoder.weight, fresh.get_input_embeddings().weight)


@pytest.mark.parametrize("cutoff", [2.0, 1.0, None])
def test_initialization_has_the_documented_distributions(cutoff: float | None) -> None:
    config = ModernBertDecoderConfig(
        **{**CONFIG, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 1000},
        initializer_cutoff_factor=cutoff,
        tie_word_embeddings=False,
        norm_bias=True,
        attention_bias=True,
    )
    model = wing.ModernBertDecoderForCausalLM(config)
    classifier = wing.ModernBertDecoderForSequenceClassification(config)
    into, out = 0.02, 0.02 / math.sqrt(2 * config.num_hidden_layers)
    stds = {"q_proj": into, "k_proj": into, "v_proj": into, "Wi": into, "tok_embeddings": into}
    stds |= {"Wo": out, "dense": out, "decoder": out, "classifier": 64**-0.5}
    limit = 3.0 if cutoff is None else cutoff
    # the standard deviation of a normal distribution cut off at +-limit
    density = math.exp(-(limit**2) / 2) / math.sqrt(2 * math.pi)
    shrinkage = math.sqrt(1 - 2 * limit * density / math.erf(limit / math.sqrt(2)))
    for name, parameter in [*model.named_parameters(), *classifier.named_parameters()]:
        module, kind = name.split(".")[-2:]
        if kind == "bias":
            assert not parameter.any(), name
        elif "norm" in module:
            assert bool((parameter == 1).all()), name
        else:
            std = stds[module]
            values = parameter.detach().numpy()
            assert np.abs(values).max() <= limit * std * 1.0001, name
            # a sample's deviation from the distribution's, within five of its standard errors
            assert abs(values.std() / (std * shrinkage) - 1) < 5 / math.sqrt(2 * values.size), name


@pytest.mark.parametrize("name", ["ForCausalLM", "ForSequenceClassification"])
def test_initialization_has_the_distributions_of_upstream(name: str) -> None:
    sizes = {**CONFIG, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 1000}
    sizes |= {"norm_bias": True, "attention_bias": True, "tie_word_embeddings": False}
    mine = getattr(wing, f"ModernBertDecoder{name}")(ModernBertDecoderConfig(**sizes))
    theirs = dict(getattr(upstream, f"ModernBertDecoder{name}")(UpstreamConfig(**sizes)).named_parameters())
    assert theirs.keys() == dict(mine.named_parameters()).keys()
    for key, parameter in mine.named_parameters():
        a, b = parameter.detach(), theirs[key].detach()
        if parameter.ndim == 1:
            assert torch.equal(a, b), key
            continue
        # two samples of one distribution: within five standard errors of each other
        assert abs(a.std() / b.std() - 1) < 5 / math.sqrt(a.numel()), key
        assert abs(a.mean() - b.mean()) < 5 * b.std() * math.sqrt(2 / a.numel()), key
        if a.numel() > 1000:  # both are cut off at the same place
            assert abs(a.abs().max() / b.abs().max() - 1) < 0.02, key


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_does_not_change_the_gradients(use_reentrant: bool) -> None:
    model, batch = ours(attention="sdpa").train(), padded_batch(130, "right")
    plain = gradients(model, model(**batch).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert worst(gradients(model, model(**batch).loss), plain) < TOLERANCE
    with pytest.raises(ValueError, match="Leave out past_key_values"):
        model(batch["input_ids"], past_key_values=DynamicCache(config=model.config))


def test_training_reaches_every_parameter_and_lowers_the_loss() -> None:
    model, ids = ours(attention="sdpa").train(), random_ids(130)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = []
    for _ in range(5):
        loss = model(ids, labels=ids, skip_logits=True).loss
        assert all(bool(g.any()) for g in gradients(model, loss).values())
        optimizer.step()
        seen.append(loss.item())
    assert seen == sorted(seen, reverse=True)


def test_the_network_knows_nothing_of_hugging_face() -> None:
    tree = ast.parse(Path(network.__file__).read_text(encoding="utf-8"))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {name for name in imported if name.startswith("transformers")}
