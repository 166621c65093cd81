"""Telling transformers' Auto classes and pipelines to use these classes for "modernbert-decoder".

Nothing happens on import: the library's registries are global, so changing them is the caller's decision.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from modernbert_decoder.architecture import MODEL_TYPE
from modernbert_decoder.pytorch.causal_lm import ModernBertDecoderForCausalLM
from modernbert_decoder.pytorch.classification import ModernBertDecoderForSequenceClassification
from modernbert_decoder.pytorch.configuration import ModernBertDecoderConfig
from modernbert_decoder.pytorch.modeling import ModernBertDecoderModel


def register_auto_classes() -> None:
    """Make `AutoConfig`, the three `AutoModel` classes and `pipeline(...)` choose this package's classes.

    May be called more than once. It replaces the library's own classes of the same names for the rest of the
    process; models that were built before keep theirs.
    """
    config = ModernBertDecoderConfig
    AutoConfig.register(MODEL_TYPE, config, exist_ok=True)
    AutoModel.register(config, ModernBertDecoderModel, exist_ok=True)
    AutoModelForCausalLM.register(config, ModernBertDecoderForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        config, ModernBertDecoderForSequenceClassification, exist_ok=True
    )
    AutoTokenizer.register(  # type: ignore[no-untyped-call]
        config, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True
    )
