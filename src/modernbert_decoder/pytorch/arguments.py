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
from modernbert_decoder.pytorch.masks import KeySpan, Mask

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


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, position_ids: Tensor | None) -> None:
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
    if position_ids is not None:
        rows, length = tokens.shape[:2]
        if (
            position_ids.ndim != 2
            or position_ids.shape[1] != length
            or position_ids.shape[0] not in (1, rows)
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
    options: Mapping[str, Any], *, implementation: str, is_positioned: bool, is_paged: bool
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
    if stated and not is_positioned and "flash" not in implementation:
        raise InputError(
            f"{stated[0]} is for FlashAttention; {implementation!r} separates packed sequences by "
            "position_ids. Pass position_ids that start anew in each sequence, and no attention_mask."
        )


def check_padding(
    attention_mask: Tensor,
    *,
    batch_size: int,
    past: int | Tensor,
    num_queries: int,
    spans: Iterable[KeySpan],
) -> None:
    """Refuse a 2-D mask unless it has B rows and a column for every cached and every new token.

    Only where the cache's buffer is longer than what it holds, more columns are allowed: as many as the
    buffer has.

    Raises:
        InputError: a `ValueError` that says how many rows or columns there are and should be.
    """
    rows, columns = attention_mask.shape
    if rows != batch_size:
        raise InputError(f"attention_mask has {rows} rows, but the batch has {batch_size}.")
    if isinstance(past, Tensor):
        return
    longest = max([past + num_queries, *(span.first + span.length for span in spans)])
    if not past + num_queries <= columns <= longest:
        raise InputError(
            f"attention_mask has {columns} columns, but {past} cached and {num_queries} new tokens need one "
            "each. Keep the mask of the earlier tokens and append that of the new ones."
        )


def given_masks(
    attention_mask: Tensor | Mapping[str, Any],
    layer_kinds: Iterable[LayerKind],
    *,
    implementation: str,
    batch_size: int,
) -> dict[LayerKind, Mask]:
    """Masks that the caller made: one (B or 1, H or 1, T, S) for every layer, or one per layer kind.

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
        if mask is None and implementation in ("eager", "flex_attention"):
            raise InputError(
                f"attention_mask[{kind.value!r}] is None, with which {implementation!r} would see later "
                "tokens. Pass a causal mask, or no attention_mask at all."
            )
        masks[kind] = _meaningful(mask, implementation, batch_size) if isinstance(mask, Tensor) else mask
    return masks


def _meaningful(mask: Tensor, implementation: str, batch_size: int) -> Mask:
    """A mask of four dimensions in the form that this implementation takes; others as they are."""
    if mask.ndim != 4:
        return mask
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(
            f"attention_mask of four dimensions is of type {mask.dtype}, but must be boolean (True where a "
            "key is seen) or floating point (added to the scores). Pass mask.bool() if it holds 0 and 1."
        )
    if implementation != "flex_attention":
        return mask
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        raise InputError(
            f"attention_mask is of type {mask.dtype} for {mask.shape[1]} heads, but FlexAttention takes a "
            "boolean one for all heads, (batch or 1, 1, queries, keys). Convert it, or use 'sdpa'."
        )
    return _block_mask(mask[:, 0].expand(batch_size, -1, -1).contiguous())


def _block_mask(visible: Tensor) -> BlockMask:
    """Booleans (B, T, S) as FlexAttention evaluates them."""

    def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible[b, q, k]

    mask_mod: Callable[..., Any] = is_visible
    rows, queries, keys = visible.shape
    return create_block_mask(mask_mod, rows, None, queries, keys, device=str(visible.device))
