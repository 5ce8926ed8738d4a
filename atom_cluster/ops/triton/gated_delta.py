"""Gated DeltaNet: which rows are stepped through token by token and which go in chunks. Knows no layers.

Rows of one token, and rows that keep the state behind every token, are stepped; all others go in chunks of 64 tokens.
A step that is captured in a graph has only rows that are stepped, and needs nothing from the host.
"""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata
from atom_cluster.ops.gated_delta import GatedDeltaPlan, Gates, StateMetadata
from atom_cluster.ops.triton.gated_delta_chunks import CHUNK_TOKENS, Chunks, run_chunks
from atom_cluster.ops.triton.gated_delta_conv import convolve_chunks, convolve_steps
from atom_cluster.ops.triton.gated_delta_step import SteppedRows, run_steps


class SteppedAndChunked:
    """The recurrences of one step."""

    def __init__(self, rows: AttentionMetadata, states: StateMetadata) -> None:
        starts = rows.query_start_cpu
        lengths = [end - start for start, end in zip(starts, starts[1:])]
        is_stepped = [length <= 1 or keeps for length, keeps in zip(lengths, states.keeps_all_cpu)]
        stepped = [row for row, steps in enumerate(is_stepped) if steps and lengths[row]]
        chunked = [row for row, steps in enumerate(is_stepped) if not steps]
        self._states = states
        listed: list[int] = []
        if stepped != list(range(len(stepped))):
            listed += stepped
        for row in chunked:
            for start in range(starts[row], starts[row + 1], CHUNK_TOKENS):
                listed += (row, start, starts[row], starts[row + 1])
        first = len(listed)
        num_chunks = 0
        for row in chunked:
            listed += (row, num_chunks, starts[row], starts[row + 1])
            num_chunks += -(-lengths[row] // CHUNK_TOKENS)
        device = states.read_page.device
        on_device = _send(listed, device) if listed else None
        num_listed = first - 4 * num_chunks
        self._stepped = SteppedRows(
            num_rows=len(stepped),
            rows=on_device[:num_listed] if on_device is not None and num_listed else None,
            query_start=rows.query_start,
            has_one_token=all(lengths[row] == 1 for row in stepped) and stepped == list(range(len(stepped))),
        )
        self._chunks: Chunks | None = None
        if on_device is not None and chunked:
            self._chunks = Chunks(
                num_chunks=num_chunks,
                num_rows=len(chunked),
                chunks=on_device[num_listed:first],
                rows=on_device[first:],
            )

    def convolve(self, x_TC: torch.Tensor, weight_CW: torch.Tensor, past_NCJ: torch.Tensor) -> torch.Tensor:
        """A causal convolution per channel, then silu."""
        y_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device)
        if x_TC.stride(1) != 1:
            x_TC = x_TC.contiguous()
        if self._stepped.num_rows:
            convolve_steps(x_TC, weight_CW, past_NCJ, y_TC, self._stepped, self._states)
        if self._chunks is not None:
            convolve_chunks(x_TC, weight_CW, past_NCJ, y_TC, self._chunks, self._states)
        return y_TC

    def delta_rule(
        self,
        query_TGK: torch.Tensor,
        key_TGK: torch.Tensor,
        value_THV: torch.Tensor,
        gates: Gates,
        state_NHKV: torch.Tensor,
    ) -> torch.Tensor:
        """The gated delta rule."""
        output_THV = torch.empty(value_THV.shape, dtype=value_THV.dtype, device=value_THV.device)
        query_TGK, key_TGK, value_THV = (
            x if x.stride(2) == 1 else x.contiguous() for x in (query_TGK, key_TGK, value_THV)
        )
        tensors = (query_TGK, key_TGK, value_THV, gates, state_NHKV, output_THV)
        if self._stepped.num_rows:
            run_steps(*tensors, self._stepped, self._states)
        if self._chunks is not None:
            run_chunks(*tensors, self._chunks, self._states)
        return output_THV


def plan_gated_delta(rows: AttentionMetadata, states: StateMetadata) -> GatedDeltaPlan:
    """The plan of one step."""
    return SteppedAndChunked(rows, states)


def _send(numbers: list[int], device: torch.device) -> torch.Tensor:
    """To the device, without waiting for what it is doing."""
    host = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
