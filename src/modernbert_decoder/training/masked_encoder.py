"""transformers' encoder with the masked next-token objective, as the trainer of decoders drives it.

Responsible for the loss alone: the network is the library's `ModernBertForMaskedLM`. Knows nothing of data.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import ModernBertForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput

from modernbert_decoder.pytorch.losses import NumItems, causal_lm_loss, fused_causal_lm_loss


class MaskedNextTokenEncoder(ModernBertForMaskedLM):  # type: ignore[no-untyped-call]
    """The library's encoder; the head at each position tells the token that follows it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # Units of shards: not the embeddings, whose matrix is the decoder's as well.
        self._no_split_modules = ["ModernBertEncoderLayer"]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: NumItems = None,
        skip_logits: bool = True,
        use_cache: bool = False,
    ) -> MaskedLMOutput:
        """The loss of a batch.

        Args:
            input_ids: (B, T), some of them hidden.
            attention_mask: (B, T), 1 where there is a token; None: everywhere.
            shift_labels: (B, T), the hidden token that follows each position, -100 elsewhere.
            num_items_in_batch: see `NumItems`.
            skip_logits: compute the head only where there is a label, and return no logits.
            use_cache: an encoder has none.
        """
        assert shift_labels is not None
        assert not use_cache
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        if skip_logits:
            loss = fused_causal_lm_loss(
                hidden,
                shift_labels,
                self.decoder.weight,
                self.decoder.bias,
                transform=self.head,
                num_items=num_items_in_batch,
            )
            return MaskedLMOutput(loss=loss)
        logits = self.decoder(self.head(hidden))
        loss = causal_lm_loss(logits, shift_labels, num_items=num_items_in_batch)
        return MaskedLMOutput(loss=loss, logits=logits)


def plain_encoder(config: Any, state: dict[str, Tensor]) -> ModernBertForMaskedLM:
    """The library's own class with these weights, to be saved."""
    model = ModernBertForMaskedLM(config)
    result = model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    assert set(result.missing_keys) <= {"decoder.weight"}, result.missing_keys
    model.tie_weights()
    return model
