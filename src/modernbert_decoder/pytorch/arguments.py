"""What a caller may pass to `forward`: shapes that fit together, masks in a form that means what it says.

Every check here is about an argument that PyTorch would broadcast, slice or add without a word, or refuse in
words of its own. Must not know the network.

Shapes: B batch, T query tokens, S key tokens, C model width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from modernbert_decoder.architecture import LayerKind
from modernbert_decoder.errors import InputError
from modernbert_decoder.pytorch.masks import Mask, MaskRequest, is_implied

LIBRARY_OPTIONS: Final = ("num_items_in_batch", "seq_idx", "token_type_ids")
"""What trainers, collators and tokenizers of transformers pass to any model; attention needs none of it."""

# They say where packed sequences begin: FlashAttention reads them, other implementations read position_ids.
_PACKING: Final = (
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seq_idx"),
)
_PAGED: Final = (
    *("read_index", "write_index", "block_table", "is_causal"),
    *("logits_indices", "logits_processor_args"),
)
_OPTIONS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "eager": (),
    "sdpa": (),
    "flex_attention": ("kernel_options",),
    "flash_attention_2": ("deterministic", "target_dtype", "use_top_left_mask"),
}


def check_tokens(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
    cache_position: Tensor | None,
) -> None:
    """Refuse anything but one of ids (B, T) and embeddings (B, T, C), and positions of another length.

    Raises:
        InputError: a `ValueError`.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("Pass exactly one of input_ids and inputs_embeds.")
    tokens, name, ndim = (
        (input_ids, "input_ids", 2) if inputs_embeds is None else (inputs_embeds, "inputs_embeds", 3)
    )
    assert tokens is not None
    if tokens.ndim != ndim or tokens.shape[1] == 0:
        form = "(batch, tokens)" if ndim == 2 else "(batch, tokens, width)"
        raise InputError(
            f"{name} has the shape {tuple(tokens.shape)}, but must be {form}, with a token at least."
        )
    rows, length = tokens.shape[:2]
    if cache_position is not None and cache_position.shape != (length,):
        raise InputError(
            f"cache_position has the shape {tuple(cache_position.shape)}, but must be ({length},), as {name}."
        )
    if position_ids is not None and (
        position_ids.ndim != 2 or position_ids.shape[1] != length or position_ids.shape[0] not in (1, rows)
    ):
        raise InputError(
            f"position_ids has the shape {tuple(position_ids.shape)}, but must be ({rows}, {length}) or "
            f"(1, {length}), as {name}."
        )


def check_labels(labels: Tensor, tokens: Tensor | None) -> None:
    """Refuse labels of a language model whose shape is not that of the tokens (B, T, ...).

    Raises:
        InputError: a `ValueError` with both shapes.
    """
    if tokens is not None and labels.shape != tokens.shape[:2]:
        raise InputError(
            f"labels have the shape {tuple(labels.shape)}, but the tokens {tuple(tokens.shape[:2])}. Pass "
            "one label per token; -100 where a token does not count."
        )


def check_options(
    options: Mapping[str, Any],
    *,
    implementation: str,
    is_positioned: bool,
    is_masked: bool,
    is_paged: bool,
) -> None:
    """Refuse names that nobody reads, and values that nobody would heed.

    An attention function that somebody else registered may read any name.

    Raises:
        InputError: a `ValueError`: an unknown name; lengths of packed sequences where nothing would separate
            the sequences; token types.
    """
    known = {*LIBRARY_OPTIONS, *_PACKING, *_OPTIONS_OF.get(implementation, ()), *(_PAGED if is_paged else ())}
    unknown = sorted(options.keys() - known)
    if unknown and implementation in _OPTIONS_OF:
        raise InputError(
            f"{', '.join(unknown)}: no such argument of this model. Beside those in the signature, "
            f"{implementation!r} takes {', '.join(sorted(known))}."
        )
    types = options.get("token_type_ids")
    if types is not None and not torch.compiler.is_compiling() and bool(types.any()):
        raise InputError(
            "token_type_ids other than 0 have no meaning here: this model has no token types. Leave them out."
        )
    stated = [name for name in _PACKING if options.get(name) is not None]
    is_heeded = is_positioned or "flash" in implementation
    if stated and not is_paged and (is_masked or not is_heeded):
        raise InputError(
            f"{stated[0]} is for FlashAttention; {implementation!r} separates packed sequences by "
            "position_ids. Pass position_ids that start anew in each sequence, and no attention_mask."
        )


def checked_padding(attention_mask: Tensor, request: MaskRequest) -> Tensor | None:
    """A 2-D mask as booleans, True where a slot holds a token; None if all do.

    It must have B rows and a column for every cached and every new token. Only where the cache's buffer is
    longer than what it holds, more columns are allowed: as many as the buffer has.

    Raises:
        InputError: a `ValueError` that says how many dimensions, rows or columns there are and should be.
    """
    if attention_mask.ndim != 2:
        raise InputError(f"attention_mask has {attention_mask.ndim} dimensions, but must have 2 or 4.")
    rows, columns = attention_mask.shape
    if rows != request.batch_size:
        raise InputError(f"attention_mask has {rows} rows, but the batch has {request.batch_size}.")
    past, num_queries = request.past, request.num_queries
    if not isinstance(past, Tensor) and not past + num_queries <= columns <= request.num_slots():
        raise InputError(
            f"attention_mask has {columns} columns, but {past} cached and {num_queries} new tokens need one "
            "each. Keep the mask of the earlier tokens and append that of the new ones."
        )
    if not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    return attention_mask.to(device=request.device, dtype=torch.bool)


def given_masks(
    attention_mask: Tensor | Mapping[str, Any],
    layer_kinds: Iterable[LayerKind],
    request: MaskRequest,
    *,
    implementation: str,
    num_heads: int,
) -> dict[LayerKind, Mask]:
    """Masks that the caller made: one (B or 1, H or 1, T, S) for every layer, or one per layer kind.

    S is a column for every slot, or for those alone that a layer of this kind attends to.

    Raises:
        InputError: a `ValueError`: a kind has none, or one in a form that would mean something else.
    """
    masks: dict[LayerKind, Mask] = {}
    for kind in layer_kinds:
        if isinstance(attention_mask, Tensor):
            mask: Any = attention_mask
        elif kind.value in attention_mask:
            mask = attention_mask[kind.value]
        else:
            stated = ", ".join(map(str, attention_mask)) or "nothing"
            raise InputError(f"attention_mask states {stated}, but this model needs {kind.value} as well.")
        if mask is None and not _means_causal(request, kind, implementation):
            raise InputError(
                f"attention_mask[{kind.value!r}] is None, with which {implementation!r} would see later "
                "tokens, or none before the new ones, or more than the window. Pass a causal mask, or no "
                "attention_mask at all."
            )
        masks[kind] = mask
        if isinstance(mask, Tensor):
            mask = _of_known_form(mask, kind, request, implementation=implementation, num_heads=num_heads)
            is_flex = implementation == "flex_attention"
            masks[kind] = _block_mask(mask[:, 0].expand(request.batch_size, -1, -1)) if is_flex else mask
    return masks


def _means_causal(request: MaskRequest, kind: LayerKind, implementation: str) -> bool:
    """Whether a back end without a mask sees what causality and the window say."""
    if implementation in ("eager", "flex_attention"):
        return False
    return implementation != "sdpa" or torch.compiler.is_compiling() or is_implied(request, kind)


def _of_known_form(
    mask: Tensor, kind: LayerKind, request: MaskRequest, *, implementation: str, num_heads: int
) -> Tensor:
    """A caller's mask for one layer kind, cut to the keys of that kind: (B or 1, H or 1, T, S)."""
    if not request.spans:
        return mask  # of a paged cache: who fills it knows what a row and a column are
    if "flash" in implementation:
        if mask.ndim != 2 or mask.shape[0] != request.batch_size:
            raise InputError(
                f"attention_mask for {kind.value} has the shape {tuple(mask.shape)}, but FlashAttention "
                f"takes the padding alone, ({request.batch_size}, keys). Use attn_implementation='sdpa'."
            )
        return _cut(mask, kind, request)
    if mask.ndim != 4:
        if implementation not in _OPTIONS_OF:
            return mask  # of an attention function that somebody else registered
        raise InputError(
            f"attention_mask for {kind.value} has {mask.ndim} dimensions, but must have 4: (batch or 1, "
            "heads or 1, queries, keys)."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(
            f"attention_mask of four dimensions is of type {mask.dtype}, but must be boolean (True where a "
            "key is seen) or floating point (added to the scores). Pass mask.bool() if it holds 0 and 1."
        )
    if implementation == "flex_attention" and (mask.dtype != torch.bool or mask.shape[1] != 1):
        raise InputError(
            f"attention_mask is of type {mask.dtype} for {mask.shape[1]} heads, but FlexAttention takes a "
            "boolean one for all heads, (batch or 1, 1, queries, keys). Convert it, or use 'sdpa'."
        )
    rows, heads, queries = mask.shape[:3]
    batch_size, num_queries = request.batch_size, request.num_queries
    if rows not in (1, batch_size) or heads not in (1, num_heads) or queries != num_queries:
        raise InputError(
            f"attention_mask has the shape {tuple(mask.shape)}, but must be ({batch_size} or 1, {num_heads} "
            f"or 1, {num_queries}, keys): PyTorch would repeat it over the others."
        )
    return _cut(mask, kind, request)


def _cut(mask: Tensor, kind: LayerKind, request: MaskRequest) -> Tensor:
    """The columns (..., S) of the keys of a layer kind, from those of all slots, or those S already."""
    first, length = request.spans[kind]
    columns = mask.shape[-1]
    if columns == length:
        return mask
    if columns != request.num_slots():
        raise InputError(
            f"attention_mask for {kind.value} has {columns} columns, but there are {request.num_slots()} "
            f"slots of keys, of which these layers attend to {length}. Pass a column for each slot."
        )
    return mask[..., first : first + length]


def _block_mask(visible: Tensor) -> BlockMask:
    """Booleans (B, T, S) as FlexAttention evaluates them."""
    visible = visible.contiguous()

    def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible[b, q, k]

    mask_mod: Callable[..., Any] = is_visible
    rows, queries, keys = visible.shape
    return create_block_mask(mask_mod, rows, None, queries, keys, device=str(visible.device))
