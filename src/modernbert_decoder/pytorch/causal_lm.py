"""The language model: the decoder, a head, and a projection on the vocabulary.

Responsible for logits, their loss and `generate`. How the decoder runs is the bare model's business, how a
loss is computed that of `losses.py`.

Shapes: B batch, T query tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from modernbert_decoder.architecture import Head
from modernbert_decoder.errors import CheckpointError, InputError
from modernbert_decoder.pytorch import losses, network
from modernbert_decoder.pytorch.arguments import check_labels
from modernbert_decoder.pytorch.caches import CACHE_FIELD, AnyCache, chosen_cache
from modernbert_decoder.pytorch.configuration import ModernBertDecoderConfig
from modernbert_decoder.pytorch.modeling import (
    AttentionMask,
    ModernBertDecoderModel,
    ModernBertDecoderPreTrainedModel,
)
from modernbert_decoder.pytorch.packing import Packing


class ModernBertDecoderForCausalLM(  # type: ignore[no-untyped-call]
    ModernBertDecoderPreTrainedModel, GenerationMixin
):
    """The decoder with a language-modeling head: token ids to the logits of the next token.

    Attributes:
        skip_logits: what `forward` does while training when its argument of the same name is None.
    """

    _tied_weights_keys = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ModernBertDecoderConfig) -> None:
        super().__init__(config)
        self.skip_logits = False
        self.model = ModernBertDecoderModel(config)
        architecture = config.to_architecture(Head.CAUSAL_LM)
        self.lm_head = network.PredictionHead(architecture)
        self.decoder = network.vocabulary_projection(architecture)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load as `PreTrainedModel.from_pretrained` does.

        A tied checkpoint loaded with `tie_word_embeddings=False` starts from a copy of its embedding. An
        untied one loaded with `tie_word_embeddings=True` keeps its embedding alone.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            *model_args: for the library.
            **kwargs: for the library.

        Raises:
            CheckpointError: a `ValueError`: there is such a copy to make, but of weights that are not in
                memory.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        missing = info["missing_keys"]
        has_head = not any(key.startswith("lm_head.") for key in missing)
        if has_head and "decoder.weight" in missing and not model.config.tie_word_embeddings:
            source, target = model.get_input_embeddings().weight, model.decoder.weight
            if source.is_meta or target.is_meta:
                raise CheckpointError(
                    f"{pretrained_model_name_or_path} has no decoder.weight of its own, and its embedding is "
                    "offloaded. Load it in memory to untie it, or leave out tie_word_embeddings=False."
                )
            with torch.no_grad():
                target.copy_(source)
            info["missing_keys"] = type(missing)(key for key in missing if key != "decoder.weight")
        elif kwargs.get("tie_word_embeddings"):
            _tie(model)
        return (model, info) if wants_info else model

    def get_output_embeddings(self) -> nn.Module:
        """The projection on the vocabulary."""
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the projection on the vocabulary."""
        assert isinstance(new_embeddings, nn.Linear)
        self.decoder = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: AttentionMask = None,
        position_ids: Tensor | None = None,
        past_key_values: AnyCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        return_dict: bool | None = None,
        cache: AnyCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the decoder and predict the token after each position.

        Args:
            input_ids: (B, T).
            attention_mask: as in `ModernBertDecoderModel`.
            position_ids: as in `ModernBertDecoderModel`.
            past_key_values: as in `ModernBertDecoderModel`.
            inputs_embeds: (B, T, C).
            labels: (B, T), the input ids themselves: they are shifted here. -100 does not count.
            use_cache: as in `ModernBertDecoderModel`.
            cache_position: as in `ModernBertDecoderModel`.
            logits_to_keep: compute logits of the last so many positions only, or of the positions in this
                tensor; 0: of all. The loss counts every position all the same.
            skip_logits: with labels, compute the loss chunk by chunk and return no logits (None in their
                place): the (B * T, V) logits never exist at once. With SDPA the padding of a batch is left
                out too, where the loss is all that is returned. None: the attribute of this name while
                training, else False.
            return_dict: as in `ModernBertDecoderModel`.
            cache: as in `ModernBertDecoderModel`.
            **kwargs: `num_items_in_batch`, the number of tokens to average the loss over; `shift_labels`,
                labels already shifted; the others go to the bare model.

        Raises:
            InputError: a `ValueError`: arguments that do not fit together.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        shifted = kwargs.pop("shift_labels", None)
        if shifted is None and labels is not None:
            shifted = losses.next_token_labels(labels)
        if shifted is not None:
            check_labels(shifted, input_ids if inputs_embeds is None else inputs_embeds)
        if skip_logits is None:
            skip_logits = self.skip_logits and self.training and shifted is not None
        is_alone = all(each is None for each in (position_ids, cache_position, past_key_values, cache))
        if skip_logits and shifted is not None and is_alone and self._returns_loss_only(use_cache, kwargs):
            packing = _packing(attention_mask, shifted)
            if packing is not None:
                input_ids, inputs_embeds, shifted = (
                    None if each is None else packing.select(each)
                    for each in (input_ids, inputs_embeds, shifted)
                )
                attention_mask, position_ids = None, packing.position_ids
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache_position=cache_position,
            return_dict=True,
            **{CACHE_FIELD: chosen_cache(past_key_values, cache)},
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss, logits = self._loss_and_logits(hidden, shifted, logits_to_keep, skip_logits, num_items)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
        )
        as_output = self.config.return_dict if return_dict is None else return_dict
        return output if as_output else output.to_tuple()

    def _loss_and_logits(
        self,
        hidden: Tensor,
        targets: Tensor | None,
        logits_to_keep: int | Tensor,
        skip_logits: bool,
        num_items: losses.NumItems,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss over all positions, if there are targets, and the logits of those asked for."""
        if skip_logits:
            return self._fused_loss(hidden, targets, num_items), None
        kept: Tensor | slice = slice(None)
        if isinstance(logits_to_keep, Tensor):
            kept = logits_to_keep
        elif logits_to_keep > 0:
            kept = slice(-logits_to_keep, None)
        if targets is None:
            return None, self.decoder(self.lm_head(hidden[:, kept]))
        if self._learns_directly(hidden):
            decoder = self.decoder
            loss, logits = losses.causal_lm_loss_and_logits(
                hidden, targets, decoder.weight, decoder.bias, transform=self.lm_head, num_items=num_items
            )
            return loss, logits[:, kept]
        logits = self.decoder(self.lm_head(hidden))
        return losses.causal_lm_loss(logits, targets, num_items=num_items), logits[:, kept]

    def _fused_loss(self, hidden: Tensor, targets: Tensor | None, num_items: losses.NumItems) -> Tensor:
        if targets is None:
            raise InputError("skip_logits=True without labels would compute nothing. Pass labels.")
        decoder = self.decoder
        if not _is_plain(decoder):
            kind, weight = type(decoder), type(decoder.weight).__name__
            raise InputError(
                "skip_logits reads the weight of `decoder` without calling it, but that is no plain Linear "
                f"without hooks: it is a {kind.__module__}.{kind.__qualname__}, its weight a {weight}. "
                "Set skip_logits=False, or leave the vocabulary projection out of adapters, quantization and "
                "hooks."
            )
        return losses.fused_causal_lm_loss(
            hidden,
            targets,
            decoder.weight,
            decoder.bias,
            transform=self.lm_head,
            num_items=num_items,
        )

    def _learns_directly(self, hidden: Tensor) -> bool:
        """Whether the loss beside the logits may be computed with its gradients: a step of plain training."""
        decoder = self.decoder
        if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return False
        if torch._C._are_functorch_transforms_active() or torch.is_autocast_enabled(hidden.device.type):
            return False
        is_wide = hidden.dtype == decoder.weight.dtype == torch.float32
        return is_wide and hidden.device == decoder.weight.device and _is_plain(decoder)

    def _returns_loss_only(self, use_cache: bool | None, options: Mapping[str, Any]) -> bool:
        """Whether no states, weights or cache were asked for, under a back end that separates sequences."""
        config = self.config
        if use_cache or (use_cache is None and config.use_cache and not self.training):
            return False
        for name in ("output_hidden_states", "output_attentions"):
            chosen = options.get(name)
            if getattr(config, name) if chosen is None else chosen:
                return False
        return bool(config._attn_implementation == "sdpa")


def _tie(model: ModernBertDecoderForCausalLM) -> None:
    """Make one matrix of two that transformers 5 leaves apart because a checkpoint holds both."""
    source, target = model.get_input_embeddings().weight, model.decoder.weight
    if source is not target and not (source.is_meta or target.is_meta):
        model.tie_weights()
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys()


def _is_plain(decoder: nn.Module) -> bool:
    """Whether reading the weight of a projection is all that calling it would do."""
    d = decoder
    if type(d) is not nn.Linear or type(d.weight) not in (nn.Parameter, Tensor) or "forward" in vars(d):
        return False  # an adapter, or a quantized weight, which is a subclass of Tensor
    return not (d._forward_hooks or d._forward_pre_hooks or d._backward_hooks or d._backward_pre_hooks)


def _packing(attention_mask: AttentionMask, targets: Tensor) -> Packing | None:
    """How to leave out the padding that a 2-D mask states, if it states any."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or torch.compiler.is_compiling():
        return None
    return Packing.of(attention_mask, targets, ignored=losses.IGNORED)
