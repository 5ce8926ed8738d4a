"""Compression on GPUs: the entries that a step's tokens could complete, each pooled by one program per some dims.

How many entries a step completes is known to the device alone. One that is not complete is pooled of what there is, and
written where nobody looks until a later step has completed it. Knows no norms and no layers.

Shape suffixes: T tokens of the step, C = D * series, S slots of an entry, N entries of the step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.compression import CompressionPlan
from atom_cluster.ops.triton.paged_store import store_entries
from atom_cluster.ops.triton.runtime import room_for, varying
from atom_cluster.units import ceil_div

_PLAN_ENTRIES = 128


class PagedCompression:
    """Compression of one step."""

    def __init__(
        self, tokens: AttentionMetadata, entries: AttentionMetadata, tokens_per_entry: int, num_series: int
    ) -> None:
        self._tokens, self._entries = tokens, entries
        self._tokens_per_entry, self._num_series = tokens_per_entry, num_series
        starts, device = tokens.query_start_cpu, tokens.context_len.device
        num_entries = sum(ceil_div(end - start, tokens_per_entry) for start, end in zip(starts, starts[1:]))
        self._first_positions = torch.empty(num_entries, dtype=torch.int64, device=device)
        self._row_N, self._slot_N = (
            torch.empty(num_entries, dtype=kind, device=device) for kind in (torch.int32, torch.int64)
        )
        entries_per_page = ceil_div(entries.block_size, tokens_per_entry)
        if num_entries:
            _plan_kernel[(triton.cdiv(num_entries, _PLAN_ENTRIES),)](
                tokens.query_start,
                tokens.context_len,
                entries.block_table,
                self._row_N,
                self._first_positions,
                self._slot_N,
                len(starts) - 1,
                num_entries,
                entries.block_table.stride(0),
                BLOCK_SIZE=entries.block_size,
                ENTRIES_PER_PAGE=entries_per_page,
                SIZE=tokens_per_entry,
                BLOCK=_PLAN_ENTRIES,
                ROW_BLOCK=min(128, room_for(len(starts) - 1)),
                num_warps=4,
            )
        self._entries_per_page = entries_per_page

    @property
    def first_positions(self) -> torch.Tensor:
        """Of the entries' groups."""
        return self._first_positions

    def pool(
        self, value_TC: torch.Tensor, gate_TC: torch.Tensor, bias_SD: torch.Tensor, inputs: KvLayerCache
    ) -> torch.Tensor:
        """Write values and gates, then pool."""
        tokens, block_size = self._tokens, self._tokens.block_size
        gates = KvLayerCache(inputs.value, inputs.value)
        store_entries(value_TC, KvLayerCache(inputs.key, inputs.value), tokens.slot, block_size=block_size)
        store_entries(gate_TC, gates, tokens.slot, block_size=block_size)
        num_slots, dim = bias_SD.shape
        entry_ND = torch.empty(len(self._row_N), dim, dtype=bias_SD.dtype, device=bias_SD.device)
        slot_block = triton.next_power_of_2(num_slots)
        dim_block = min(triton.next_power_of_2(dim), max(16, 4096 // slot_block))
        if len(entry_ND):
            _pool_kernel[(len(entry_ND), triton.cdiv(dim, dim_block))](
                inputs.key,
                inputs.value,
                bias_SD,
                entry_ND,
                tokens.block_table,
                tokens.context_len,
                self._row_N,
                self._first_positions,
                *inputs.key.stride()[:2],
                *inputs.value.stride()[:2],
                tokens.block_table.stride(0),
                bias_SD.stride(0),
                D=dim,
                SLOTS=num_slots,
                SIZE=self._tokens_per_entry,
                BLOCK_SIZE=block_size,
                HAS_OVERLAP=self._num_series == 2,
                SLOT_BLOCK=slot_block,
                DIM_BLOCK=dim_block,
                num_warps=4,
            )
        return entry_ND

    def store(self, entry_ND: torch.Tensor, entries: KvLayerCache) -> None:
        """Write entries to their places."""
        store_entries(entry_ND, entries, self._slot_N, block_size=self._entries_per_page)


def plan_compression(
    tokens: AttentionMetadata, entries: AttentionMetadata, *, tokens_per_entry: int, num_series: int
) -> CompressionPlan:
    """The plan of one step."""
    return PagedCompression(tokens, entries, tokens_per_entry, num_series)


@triton.jit(
    **varying("query_start_ptr", "context_len_ptr", "row_ptr", "slot_ptr", "num_rows", "num_entries", "table_stride")
)
def _plan_kernel(
    query_start_ptr,
    context_len_ptr,
    table_ptr,
    row_ptr,
    first_position_ptr,
    slot_ptr,
    num_rows,
    num_entries,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    ENTRIES_PER_PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    """One program: rows, numbers and places of some entries; it counts those of all rows before."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.zeros([BLOCK], tl.int32)
    first_of_row = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([], tl.int32)
    for first in range(0, num_rows, ROW_BLOCK):
        candidate = first + tl.arange(0, ROW_BLOCK)
        is_row = candidate < num_rows
        begin = tl.load(query_start_ptr + candidate, is_row, other=0)
        num_tokens = tl.load(query_start_ptr + candidate + 1, is_row, other=0) - begin
        end = count + tl.cumsum((num_tokens + SIZE - 1) // SIZE, axis=0)
        is_before = is_row[None, :] & (end[None, :] <= at[:, None])
        row += tl.sum(is_before.to(tl.int32), axis=1)
        first_of_row = tl.maximum(first_of_row, tl.max(tl.where(is_before, end[None, :], 0), axis=1))
        count = tl.max(end, axis=0)
    is_entry = at < num_entries
    num_new = tl.load(query_start_ptr + row + 1, is_entry, other=0) - tl.load(query_start_ptr + row, is_entry, other=0)
    context_len = tl.load(context_len_ptr + row, is_entry, other=1)
    entry = (context_len - num_new) // SIZE + at - first_of_row
    last = entry * SIZE + SIZE - 1
    # An incomplete entry's page may not be there yet: the page of the newest token then has an entry to spare.
    column = tl.minimum(last, context_len - 1) // BLOCK_SIZE
    page = tl.load(table_ptr + row.to(tl.int64) * table_stride + column, is_entry, other=0).to(tl.int64)
    tl.store(row_ptr + at, row, is_entry)
    tl.store(first_position_ptr + at, (entry * SIZE).to(tl.int64), is_entry)
    tl.store(slot_ptr + at, page * ENTRIES_PER_PAGE + last % BLOCK_SIZE // SIZE, is_entry)


@triton.jit(**varying("context_len_ptr", "row_ptr", "table_stride"))
def _pool_kernel(
    value_ptr,
    gate_ptr,
    bias_ptr,
    out_ptr,
    table_ptr,
    context_len_ptr,
    row_ptr,
    first_position_ptr,
    value_page_stride,
    value_entry_stride,
    gate_page_stride,
    gate_entry_stride,
    table_stride,
    bias_stride,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """One program: some dims of an entry, all its slots at once."""
    at = tl.program_id(0)
    row = tl.load(row_ptr + at)
    newest = tl.load(context_len_ptr + row) - 1
    slot = tl.arange(0, SLOT_BLOCK)
    position = tl.load(first_position_ptr + at).to(tl.int32) + SIZE - SLOTS + slot
    is_there = (slot < SLOTS) & (position >= 0)
    position = tl.minimum(position, newest)
    page = tl.load(table_ptr + row.to(tl.int64) * table_stride + position // BLOCK_SIZE, is_there, other=0).to(tl.int64)
    offset = position % BLOCK_SIZE
    dim = tl.program_id(1) * DIM_BLOCK + tl.arange(0, DIM_BLOCK)
    is_inside = is_there[:, None] & (dim < D)[None, :]
    column = dim[None, :]
    if HAS_OVERLAP:
        # The slots of the group before are of the first series, its own of the second.
        column = column + tl.where(slot >= SIZE, D, 0)[:, None]
    gate_place = page * gate_page_stride + offset * gate_entry_stride
    value_place = page * value_page_stride + offset * value_entry_stride
    gate = tl.load(gate_ptr + gate_place[:, None] + column, is_inside, other=0.0).to(tl.float32)
    gate += tl.load(bias_ptr + (slot * bias_stride)[:, None] + dim[None, :], is_inside, other=0.0)
    gate = tl.where(is_there[:, None], gate, float("-inf"))
    value = tl.load(value_ptr + value_place[:, None] + column, is_inside, other=0.0).to(tl.float32)
    weight = tl.exp(gate - tl.max(gate, axis=0)[None, :])
    pooled = tl.sum(value * weight, axis=0) / tl.sum(weight, axis=0)
    tl.store(out_ptr + at.to(tl.int64) * D + dim, pooled, dim < D)
