"""Attention of long whole prompts by the vendor's library (cuDNN, through torch), where it was measured to be faster.

It wants contiguous keys and values, so a prompt's are copied out of their pages, which costs a few hundredths of the
time. It prepares itself for each length it has not seen for tens of milliseconds: lengths are rounded up.
"""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.triton import runtime
from atom_cluster.units import ceil_div

ARCH = "sm_90"
"""The chip that it was measured on."""

MIN_TOKENS = 4096
"""Of a prompt; shorter ones are all but one launch of ours together, and not much faster there."""

LENGTHS_PER_OCTAVE = 16
"""That prompts are rounded up to."""

DIMS = (128, 256)
"""Of heads for which it was measured."""


def serves(query_THD: torch.Tensor, kv: KvLayerCache, metadata: AttentionMetadata, sink_H: torch.Tensor | None) -> bool:
    """Whether the library is the faster one for a layer's long whole prompts, and can do it."""
    return (
        runtime.arch() == ARCH
        and torch.backends.cudnn.is_available()
        and query_THD.dtype == kv.key.dtype
        and query_THD.dtype in (torch.bfloat16, torch.float16)
        and query_THD.shape[-1] == kv.value.shape[-1]
        and query_THD.shape[-1] in DIMS
        and metadata.window is None
        and sink_H is None
    )


def long_whole_prompts(metadata: AttentionMetadata, first_row: int) -> tuple[int, ...]:
    """Rows from `first_row` on with nothing cached and many tokens."""
    starts = metadata.query_start_cpu
    return tuple(
        row
        for row, context_len in enumerate(metadata.context_len_cpu)
        if row >= first_row and context_len == starts[row + 1] - starts[row] >= MIN_TOKENS
    )


def attend_prompt(
    row: int,
    query_THD: torch.Tensor,
    kv: KvLayerCache,
    metadata: AttentionMetadata,
    out_THD: torch.Tensor,
    *,
    scale: float,
) -> None:
    """Fill in a row's part of `out_THD`."""
    tokens = slice(metadata.query_start_cpu[row], metadata.query_start_cpu[row + 1])
    length = tokens.stop - tokens.start
    padded = padded_length(length)
    pages = metadata.block_table[row, : ceil_div(length, metadata.block_size)]
    key, value = (_contiguous(paged, pages, length, padded) for paged in (kv.key, kv.value))
    query = query_THD[tokens]
    if padded > length:
        query = torch.cat((query, query.new_zeros(padded - length, *query.shape[1:])))
    # Queries see no key behind their own, so what is padded is not seen.
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    out_THD[tokens] = causal_attention(query, key, value, scale)[0].transpose(0, 1)[:length]


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """The library's, of [1, heads, length, D] each; there may be fewer key than query heads."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, attn_bias=None, compute_log_sumexp=False, is_causal=True, scale=scale
    )
    output: torch.Tensor = found[0]
    return output


def padded_length(length: int) -> int:
    """The next length that the library is asked for, at most a sixteenth more."""
    step = max(1, (1 << (length.bit_length() - 1)) // LENGTHS_PER_OCTAVE)
    return ceil_div(length, step) * step


def _contiguous(paged: torch.Tensor, pages: torch.Tensor, length: int, padded: int) -> torch.Tensor:
    """[padded, K, D]: what pages hold, and zeros behind `length`."""
    block_size = paged.shape[1]
    room = max(padded, len(pages) * block_size)
    copied = torch.empty(room, *paged.shape[2:], dtype=paged.dtype, device=paged.device)
    torch.index_select(paged, 0, pages, out=copied[: len(pages) * block_size].unflatten(0, (-1, block_size)))
    copied[length:].zero_()
    return copied[:padded]
