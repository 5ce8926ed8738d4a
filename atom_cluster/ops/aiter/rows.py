"""Parts of a step, and its pages or cached tokens as AITER wants them: one list for all rows. Knows no attention.

Shape suffixes: R rows, B blocks per row (padded), C tokens of so many blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from atom_cluster.ops.attention import AttentionMetadata


@dataclass(frozen=True, slots=True)
class PageList:
    """Which pages each row has."""

    start: torch.Tensor
    """[R + 1] int32: the row's first entry in `page`."""
    page: torch.Tensor
    """int32: pages of all rows, one row's behind another's; what is behind the last row's is arbitrary, and valid."""
    last_len: torch.Tensor
    """[R] int32: tokens in each row's last page."""


def decode_rows(metadata: AttentionMetadata) -> AttentionMetadata | None:
    """The rows with one query token, which come first; None: there are none."""
    num = metadata.num_decode_rows
    if num == 0:
        return None
    if num == len(metadata.context_len_cpu):
        return metadata
    return replace(
        metadata,
        query_start=metadata.query_start[: num + 1],
        context_len=metadata.context_len[:num],
        block_table=metadata.block_table[:num],
        slot=metadata.slot[:num],
        query_start_cpu=metadata.query_start_cpu[: num + 1],
        context_len_cpu=metadata.context_len_cpu[:num],
    )


def other_rows(metadata: AttentionMetadata) -> AttentionMetadata | None:
    """The rows behind those, as a step of their own; None: there are none."""
    num = metadata.num_decode_rows
    if num == 0:
        return metadata
    if num == len(metadata.context_len_cpu):
        return None
    return replace(
        metadata,
        num_decode_rows=0,
        query_start=metadata.query_start[num:] - num,
        context_len=metadata.context_len[num:],
        block_table=metadata.block_table[num:],
        slot=metadata.slot[num:],
        query_start_cpu=tuple(start - num for start in metadata.query_start_cpu[num:]),
        context_len_cpu=metadata.context_len_cpu[num:],
    )


def list_pages(metadata: AttentionMetadata) -> PageList:
    """The pages that rows use, by what the device knows of their lengths; does not wait for it."""
    block_size = metadata.block_size
    num_pages_R = (metadata.context_len + (block_size - 1)) // block_size
    start, page = _join(metadata.block_table, num_pages_R)
    last_len_R = metadata.context_len - (num_pages_R - 1) * block_size
    return PageList(start, page, last_len_R.to(torch.int32))


def list_tokens(metadata: AttentionMetadata, tokens_per_page: int) -> PageList:
    """The same, of pages of one token: of memory in which a page begins so many tokens behind the one before it."""
    offset = torch.arange(metadata.block_size, dtype=torch.int32, device=metadata.block_table.device)
    token_RC = (metadata.block_table[..., None] * tokens_per_page + offset).flatten(1)
    start, token = _join(token_RC, metadata.context_len)
    return PageList(start, token, torch.ones_like(metadata.context_len))


def _join(item_RC: torch.Tensor, count_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first items of each row, one row's behind another's, and where each row's begin."""
    device = item_RC.device
    start = torch.zeros(len(count_R) + 1, dtype=torch.int32, device=device)
    torch.cumsum(count_R, 0, dtype=torch.int32, out=start[1:])
    column_C = torch.arange(item_RC.shape[1], dtype=torch.int32, device=device)
    # Columns behind a row's last item all go to the one entry behind the list.
    target_RC = torch.where(column_C < count_R[:, None], start[:-1, None] + column_C, item_RC.numel())
    # Zero is a valid item: kernels look some entries further than they use.
    joined = torch.zeros(item_RC.numel() + 1, dtype=torch.int32, device=device)
    joined.scatter_(0, target_RC.flatten().long(), item_RC.flatten().to(torch.int32))
    return start, joined
