"""The documented Hugging Face classes, for training, research and everything built on `PreTrainedModel`.

Needs the extra `torch`. This room knows the floor; it and the engine never import each other.
"""

from modernbert_decoder.pytorch.auto import register_auto_classes
from modernbert_decoder.pytorch.causal_lm import ModernBertDecoderForCausalLM
from modernbert_decoder.pytorch.classification import ModernBertDecoderForSequenceClassification
from modernbert_decoder.pytorch.configuration import ModernBertDecoderConfig
from modernbert_decoder.pytorch.modeling import ModernBertDecoderModel, ModernBertDecoderPreTrainedModel

__all__ = [
    "ModernBertDecoderConfig",
    "ModernBertDecoderForCausalLM",
    "ModernBertDecoderForSequenceClassification",
    "ModernBertDecoderModel",
    "ModernBertDecoderPreTrainedModel",
    "register_auto_classes",
]
