"""The language model: the decoder, a head, and a projection on the vocabulary.

Responsible for logits, their loss and `generate`. How the decoder runs is the bare model's business, how a
loss is computed that of `losses.py`.

Shapes: B batch, T query tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from modernbert_decoder.architecture import Head
from modernbert_decoder.errors import InputError
from modernbert_decoder.pytorch import losses, network
from modernbert_decoder.pytorch.caches import CACHE_FIELD, chosen_cache
from modernbert_decoder.pytorch.configuration import ModernBertDecoderConfig
from modernbert_decoder.pytorch.modeling import (
    AttentionMask,
    ModernBertDecoderModel,
    ModernBertDecoderPreTrainedModel,
)


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
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
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
                place): the (B * T, V) logits never exist at once. None: the attribute of this name while
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
        if shifted is None and labels is not None:
            shifted = losses.next_token_labels(labels)
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
        skip_logits: bool | None,
        num_items: losses.NumItems,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss over all positions, if there are targets, and the logits of those asked for."""
        if skip_logits is None:
            skip_logits = self.skip_logits and self.training and targets is not None
        if skip_logits:
            return self._fused_loss(hidden, targets, num_items), None
        kept: Tensor | slice = slice(None)
        if isinstance(logits_to_keep, Tensor):
            kept = logits_to_keep
        elif logits_to_keep > 0:
            kept = slice(-logits_to_keep, None)
        if targets is None:
            return None, self.decoder(self.lm_head(hidden[:, kept]))
        logits = self.decoder(self.lm_head(hidden))
        return losses.causal_lm_loss(logits, targets, num_items=num_items), logits[:, kept]

    def _fused_loss(self, hidden: Tensor, targets: Tensor | None, num_items: losses.NumItems) -> Tensor:
        if targets is None:
            raise InputError("skip_logits=True without labels would compute nothing. Pass labels.")
        decoder = self.decoder
        if type(decoder) is not nn.Linear or decoder._forward_hooks or decoder._forward_pre_hooks:
            raise InputError(
                "skip_logits reads the weight of `decoder` without calling it, but that is no plain Linear "
                f"without hooks: it is a {type(decoder).__name__}. Set skip_logits=False, or leave the "
                "vocabulary projection out of adapters, quantization and hooks."
            )
        return losses.fused_causal_lm_loss(
            hidden,
            targets,
            decoder.weight,
            decoder.bias,
            transform=self.lm_head,
            num_items=num_items,
        )
