"""The classifier: the decoder, a head, and a small projection, on the last token of each sequence.

Responsible for pooling, the loss of each problem type, and starting from a language model's head. How the
decoder runs is the bare model's business.

Shapes: B batch, T query tokens, C model width.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import logging

from modernbert_decoder.architecture import Head
from modernbert_decoder.errors import CheckpointError, InputError
from modernbert_decoder.pytorch import losses, network
from modernbert_decoder.pytorch.caches import CACHE_FIELD, AnyCache, chosen_cache, seen_tokens
from modernbert_decoder.pytorch.configuration import ModernBertDecoderConfig
from modernbert_decoder.pytorch.modeling import (
    AttentionMask,
    ModernBertDecoderModel,
    ModernBertDecoderPreTrainedModel,
)

_LOGGER: Final = logging.get_logger(__name__)


class ModernBertDecoderForSequenceClassification(  # type: ignore[no-untyped-call]
    ModernBertDecoderPreTrainedModel
):
    """The decoder with a classification head on the last token of each sequence."""

    def __init__(self, config: ModernBertDecoderConfig) -> None:
        super().__init__(config)
        architecture = config.to_architecture(Head.SEQUENCE_CLASSIFICATION)
        self.num_labels: int = architecture.num_labels
        self.model = ModernBertDecoderModel(config)
        self.head = network.PredictionHead(architecture)
        self.drop = nn.Dropout(architecture.classifier_dropout)
        self.classifier = network.label_projection(architecture)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, reuse_lm_head: bool = False, **kwargs: Any
    ) -> Any:
        """Load as `PreTrainedModel.from_pretrained` does.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            *model_args: for the library.
            reuse_lm_head: start from the transformation of a language model's head (`lm_head.*` becomes
                `head.*`) instead of a random one; only `classifier` is then new. A checkpoint that is a
                classifier's already keeps its own head.
            **kwargs: for the library.

        Raises:
            CheckpointError: a `ValueError`: `reuse_lm_head`, but the checkpoint has no such head.
        """
        if not reuse_lm_head:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        key_mapping = {**(kwargs.pop("key_mapping", None) or {}), r"^lm_head\.": "head."}
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            key_mapping=key_mapping,
            output_loading_info=True,
            **kwargs,
        )
        model, info = loaded
        if missing := sorted(key for key in info["missing_keys"] if key.startswith("head.")):
            raise CheckpointError(
                f"{pretrained_model_name_or_path} has no lm_head to start from: {', '.join(missing)} would "
                "be random. Use the checkpoint of a language model, or leave out reuse_lm_head."
            )
        # transformers 5 would undo the renaming when it saves, and nobody would find the head again.
        if conversions := getattr(model, "_weight_conversions", None):
            model._weight_conversions = [each for each in conversions if "head." not in each.target_patterns]
        return (model, info) if wants_info else model

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
        return_dict: bool | None = None,
        cache: AnyCache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Classify B sequences by their last token.

        The last token is the rightmost one that a 2-D `attention_mask` keeps; without such a mask, the
        rightmost one that is not `pad_token_id`; for `inputs_embeds` without a mask, the last position.

        Args:
            input_ids: (B, T).
            attention_mask: as in `ModernBertDecoderModel`.
            position_ids: as in `ModernBertDecoderModel`.
            past_key_values: as in `ModernBertDecoderModel`.
            inputs_embeds: (B, T, C).
            labels: (B,) class ids; (B,) or (B, labels) numbers for regression; (B, labels) of 0.0 and 1.0 for
                several labels at once.
            use_cache: as in `ModernBertDecoderModel`.
            cache_position: as in `ModernBertDecoderModel`.
            return_dict: as in `ModernBertDecoderModel`.
            cache: as in `ModernBertDecoderModel`.
            **kwargs: `num_items_in_batch`, the number of labels to average the loss over; the others go to
                the bare model.

        Raises:
            InputError: a `ValueError`: arguments that do not fit together.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        chosen = chosen_cache(past_key_values, cache)
        past = seen_tokens(chosen)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache_position=cache_position,
            return_dict=True,
            **{CACHE_FIELD: chosen},
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        last = self._last_tokens(hidden, input_ids, attention_mask, past)
        pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]  # (B, C)
        logits = self.classifier(self.drop(self.head(pooled)))
        loss = None
        if labels is not None:
            problem_type = self.config.problem_type
            if problem_type is None:
                problem_type = losses.problem_type_of(labels, self.num_labels)
                self.config.problem_type = problem_type  # pipelines read it from the saved configuration
            loss = losses.classification_loss(logits, labels, problem_type=problem_type, num_items=num_items)
        output = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
        )
        as_output = self.config.return_dict if return_dict is None else return_dict
        return output if as_output else output.to_tuple()

    def _last_tokens(
        self,
        hidden: Tensor,
        input_ids: Tensor | None,
        attention_mask: AttentionMask,
        past: int | Tensor,
    ) -> Tensor | int:
        """The position of the last token of each sequence: (B,), or -1 where it is the last of all."""
        num_tokens = hidden.shape[1]
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            columns = torch.arange(num_tokens, device=attention_mask.device) + past
            is_token = attention_mask.index_select(1, columns) != 0
        elif input_ids is None:
            if attention_mask is not None and hidden.shape[0] > 1:
                _LOGGER.warning_once(
                    "The last position of every row is pooled, since neither input_ids nor a 2-D "
                    "attention_mask say where padding is."
                )
            return -1
        elif self.config.pad_token_id is None:
            if hidden.shape[0] > 1:
                raise InputError(
                    "The last token of each sequence in a batch is not known: pass a 2-D attention_mask, or "
                    "state pad_token_id in the configuration."
                )
            return -1
        else:
            is_token = input_ids != self.config.pad_token_id
        positions = torch.arange(num_tokens, device=hidden.device)
        return (positions * is_token.to(hidden.device)).argmax(dim=-1)
