"""The bare model: what Hugging Face expects around the network.

Responsible for arguments, caches, masks, outputs and the conventions of `PreTrainedModel` (initialization,
embeddings, gradient checkpointing). The arithmetic is in `network.py`; the heads are in `causal_lm.py` and
`classification.py`; widths, kinds and bases come from `DecoderArchitecture` alone.

Shapes: B batch, T query tokens, S key tokens, H heads, C model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from modernbert_decoder.architecture import Head, LayerKind
from modernbert_decoder.errors import InputError
from modernbert_decoder.pytorch import network
from modernbert_decoder.pytorch.arguments import (
    LIBRARY_OPTIONS,
    check_options,
    check_tokens,
    checked_padding,
    given_masks,
)
from modernbert_decoder.pytorch.attention import BackEnd
from modernbert_decoder.pytorch.caches import (
    CACHE_FIELD,
    AnyCache,
    chosen_cache,
    key_spans,
    new_cache,
    seen_tokens,
)
from modernbert_decoder.pytorch.configuration import ModernBertDecoderConfig
from modernbert_decoder.pytorch.masks import (
    Mask,
    MaskRequest,
    build_masks,
    check_flash,
    sequence_positions,
    sequence_starts,
)

AttentionMask: TypeAlias = Tensor | Mapping[str, Any] | None
"""(B, past + T), 1 where there is a token; or (B or 1, H or 1, T, S), used as it is in every layer; or one of
the latter per layer kind, as `generate` prepares them for static caches. S counts every slot of the cache and
the new tokens: layers whose cache has dropped some take the columns of the others."""

_LOGGER: Final = logging.get_logger(__name__)


class ModernBertDecoderPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What the three models share: initialization, and what the library may do with them."""

    config_class = ModernBertDecoderConfig
    config: ModernBertDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]  # noqa: RUF012 (Hugging Face's form)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        network.initialize(
            module,
            initializer_range=self.config.initializer_range,
            cutoff_factor=self.config.initializer_cutoff_factor,
        )


class ModernBertDecoderModel(ModernBertDecoderPreTrainedModel):  # type: ignore[no-untyped-call]
    """The bare decoder: token ids to the normalized states of the last layer."""

    def __init__(self, config: ModernBertDecoderConfig) -> None:
        super().__init__(config)
        architecture = config.to_architecture(Head.NONE)
        self.architecture = architecture
        self.embeddings = network.Embeddings(architecture)
        self.layers = nn.ModuleList(
            network.Layer(architecture, layer_idx) for layer_idx in range(architecture.num_hidden_layers)
        )
        self.final_norm = nn.LayerNorm(
            architecture.hidden_size, eps=architecture.norm_eps, bias=architecture.norm_bias
        )
        self.rotary_emb = network.RotaryEmbedding(architecture)
        for layer in self.layers:
            assert isinstance(layer, network.Layer)
            layer.attn.config = self.config  # the library's FlashAttention looks for it there
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embeddings.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        assert isinstance(value, nn.Embedding)
        self.embeddings.tok_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: AttentionMask = None,
        position_ids: Tensor | None = None,
        past_key_values: AnyCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: AnyCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run the decoder on B sequences of T new tokens.

        Without `attention_mask`, positions that start anew within `position_ids` separate packed sequences,
        with a cache as without.

        Args:
            input_ids: (B, T).
            attention_mask: see `AttentionMask`; None: no padding.
            position_ids: (B, T) or (1, T); None: slots count from the first cached token.
            past_key_values: earlier keys and values; they are extended in place.
            inputs_embeds: (B, T, C) instead of `input_ids`; they pass through the embedding's norm as well.
            use_cache: return a cache, created if none was given; None: as the configuration says, but not
                while training.
            cache_position: (T,), the slots of the new tokens; the cache knows them, so this only replaces
                unstated `position_ids`.
            output_attentions: return the attention weights of every layer; eager attention only.
            output_hidden_states: return the input of every layer, and the final states.
            return_dict: False for a tuple of the fields that are not None.
            cache: the name of `past_key_values` from transformers 5.24 on.
            **kwargs: options of the attention function, such as FlashAttention's cumulative lengths; see
                `check_options`.

        Raises:
            InputError: a `ValueError`: arguments that do not fit together.
        """
        check_tokens(input_ids, inputs_embeds, position_ids, cache_position)
        implementation = self.config._attn_implementation
        output_attentions = self._choice(output_attentions, "output_attentions")
        output_hidden_states = self._choice(output_hidden_states, "output_hidden_states")
        if output_attentions and implementation != "eager":
            raise InputError(
                f"output_attentions needs attn_implementation='eager', but it is {implementation!r}: other "
                "implementations never hold the weights."
            )
        chosen = chosen_cache(past_key_values, cache)
        is_paged = isinstance(chosen, PagedAttentionCache)
        check_options(
            kwargs,
            implementation=implementation,
            is_positioned=position_ids is not None,
            is_masked=attention_mask is not None,
            is_paged=is_paged,
        )
        cache = self._cache_for(chosen, use_cache)
        x = self.embeddings(input_ids, inputs_embeds)
        past = seen_tokens(cache)
        slots = torch.arange(x.shape[1], device=x.device) + past
        is_packable = position_ids is not None and attention_mask is None
        if position_ids is None:
            position_ids = (slots if cache_position is None else cache_position)[None]
        request = self._request(x, attention_mask, position_ids if is_packable else None, cache, past)
        masks = self._masks(request, attention_mask, cache)
        # FlashAttention reads positions to separate sequences, also where a mask says that there is only one.
        is_flash = "flash" in implementation and not is_paged
        told = sequence_positions(request) if is_flash else position_ids
        for name in LIBRARY_OPTIONS:
            kwargs.pop(name, None)
        back_end = BackEnd(
            implementation=implementation,
            masks=masks,
            cache=cache,
            slots=slots,
            spans=request.spans,
            options={"position_ids": told.expand(x.shape[0], -1), **kwargs},
        )
        states: list[Tensor] | None = [] if output_hidden_states else None
        weights: list[Tensor] | None = [] if output_attentions else None
        x = self._layers(x, self.rotary_emb(position_ids), back_end, states, weights)
        returned: dict[str, Any] = {CACHE_FIELD: cache}
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=None if states is None else tuple(states),
            attentions=None if weights is None else tuple(weights),
            **returned,
        )
        return output if self._choice(return_dict, "return_dict") else output.to_tuple()

    def _layers(
        self,
        x: Tensor,
        rotations: Mapping[LayerKind, network.Rotation],
        back_end: BackEnd,
        states: list[Tensor] | None,
        weights: list[Tensor] | None,
    ) -> Tensor:
        """The final states (B, T, C); fills the lists that are asked for.

        `states` gets the input of every layer and the final states, `weights` every layer's attention.
        """
        for layer in self.layers:
            assert isinstance(layer, network.Layer)
            if states is not None:
                states.append(x)
            arguments = (x, rotations[layer.attn.kind], back_end)
            if self.gradient_checkpointing and self.training:
                x, weights_of_layer = self._gradient_checkpointing_func(layer.__call__, *arguments)
            else:
                x, weights_of_layer = layer(*arguments)
            if weights is not None:
                weights.append(weights_of_layer)
        x = self.final_norm(x)
        if states is not None:
            states.append(x)
        return x

    def _cache_for(self, cache: AnyCache | None, use_cache: bool | None) -> AnyCache | None:
        if self.gradient_checkpointing and self.training:
            if cache is not None:
                raise InputError(
                    "Gradient checkpointing runs every layer twice and would add each token to the cache "
                    "twice. Leave out past_key_values, or call gradient_checkpointing_disable()."
                )
            if use_cache:
                _LOGGER.warning_once("use_cache=True has no effect together with gradient checkpointing.")
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return new_cache(self.config) if use_cache and cache is None else cache

    def _request(
        self,
        x: Tensor,
        attention_mask: AttentionMask,
        position_ids: Tensor | None,
        cache: AnyCache | None,
        past: int | Tensor,
    ) -> MaskRequest:
        """What decides which keys are seen; `position_ids` are those that may separate packed sequences."""
        batch_size, num_queries, device = *x.shape[:2], x.device
        kinds = self.architecture.layer_kinds
        request = MaskRequest(
            batch_size=batch_size,
            num_queries=num_queries,
            past=past,
            spans=key_spans(cache, kinds, num_queries=num_queries, past=past, device=device),
            window=self.architecture.window,
            padding=None,
            starts=None,
            dtype=x.dtype,
            device=device,
        )
        if _is_made(attention_mask) or isinstance(cache, PagedAttentionCache):
            return request
        if isinstance(attention_mask, Tensor):
            return replace(request, padding=checked_padding(attention_mask, request))
        if position_ids is not None:
            starts = sequence_starts(position_ids.to(device), past)
            if torch.compiler.is_compiling() or bool((starts > 0).any()):
                return replace(request, starts=starts)
        return request

    def _masks(
        self, request: MaskRequest, attention_mask: AttentionMask, cache: AnyCache | None
    ) -> dict[LayerKind, Mask]:
        """One mask per layer kind."""
        kinds, implementation = self.rotary_emb.parameters_of, self.config._attn_implementation
        is_paged = isinstance(cache, PagedAttentionCache)
        if "flash" in implementation and not is_paged:
            check_flash(request)
        if _is_made(attention_mask):
            num_heads = self.architecture.num_attention_heads
            return given_masks(
                attention_mask, kinds, request, implementation=implementation, num_heads=num_heads
            )
        if is_paged:
            return dict.fromkeys(kinds)  # FlashAttention: lengths among the options separate the requests
        return build_masks(request, implementation)

    def _choice(self, argument: bool | None, name: str) -> bool:
        """An argument of `forward`, or what the configuration says where it is None."""
        return bool(getattr(self.config, name) if argument is None else argument)


def _is_made(attention_mask: AttentionMask) -> TypeGuard[Tensor | Mapping[str, Any]]:
    """Whether a mask says which query sees which key, not just where padding is."""
    if isinstance(attention_mask, Tensor):
        return attention_mask.ndim == 4
    return attention_mask is not None
