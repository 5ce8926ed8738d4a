"""Reference paged attention: row by row, softmax written out. Any device; clarity over speed."""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata, AttentionPlan, HeadNorms, KvLayerCache, Rotation
from atom_cluster.ops.torch_ref.norm import rms_norm
from atom_cluster.ops.torch_ref.rotary import rotary
from atom_cluster.units import ceil_div


class RowByRowAttention:
    """Attention of one step."""

    def __init__(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata

    def store(
        self,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        kv: KvLayerCache,
        *,
        norms: HeadNorms | None = None,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """Norm and rotate queries and keys, and write keys and values to their slots."""
        if norms is not None:
            query_THD = rms_norm(query_THD, norms.query_D, norms.eps)
            key_TKD = rms_norm(key_TKD, norms.key_D, norms.eps)
        if rotation is not None:
            query_THD, key_TKD = rotary(query_THD, key_TKD, rotation.cos_T1P, rotation.sin_T1P)
        place_T = places(self._metadata)
        kv.key[place_T] = as_stored(key_TKD, kv.key.dtype, kv.key_scale)
        kv.value[place_T] = as_stored(value_TKD, kv.value.dtype, kv.value_scale)
        return query_THD

    def attend(
        self, query_THD: torch.Tensor, kv: KvLayerCache, *, scale: float, sink_H: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Causal attention of the step's queries over their rows' KV."""
        starts = self._metadata.query_start_cpu
        outputs = []
        for row in range(len(starts) - 1):
            query = query_THD[starts[row] : starts[row + 1]]
            key, value = (self._gather(row, paged) for paged in (kv.key, kv.value))
            is_visible = visible(self._metadata, row)
            outputs.append(_attend_row(query, key, value, scale * kv.key_scale, is_visible, sink_H))
        return torch.cat(outputs) * kv.value_scale

    def _gather(self, row: int, paged: torch.Tensor) -> torch.Tensor:
        """The row's entries up to its end, [positions, K, D]; what is behind its window is not its own."""
        context_len = self._metadata.context_len_cpu[row]
        columns = slice(ceil_div(context_len, self._metadata.block_size))
        return paged[self._metadata.block_table[row, columns].long()].flatten(0, 1)[:context_len]


def places(metadata: AttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and entry of each token, [T] both."""
    return metadata.slot // metadata.block_size, metadata.slot % metadata.block_size


def visible(metadata: AttentionMetadata, row: int, queries: slice = slice(None)) -> torch.Tensor:
    """Which of a row's positions some of its queries see, [Q, C] bool; C is what the host knows as the row's length."""
    device = metadata.context_len.device
    num_queries = metadata.query_start_cpu[row + 1] - metadata.query_start_cpu[row]
    position_Q1 = metadata.context_len[row] + torch.arange(-num_queries, 0, device=device)[queries, None]
    position_C = torch.arange(metadata.context_len_cpu[row], device=device)
    is_visible = position_C <= position_Q1
    return is_visible if metadata.window is None else is_visible & (position_C > position_Q1 - metadata.window)


def as_stored(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """x / scale in `dtype`: rounded, and in eight bits kept within what they hold."""
    scaled = x if scale == 1.0 else x / scale
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        scaled = scaled.clamp(-limit, limit)
    return scaled.to(dtype)


def plan_attention(metadata: AttentionMetadata) -> AttentionPlan:
    """The plan of one step."""
    return RowByRowAttention(metadata)


def _attend_row(
    query_QHD: torch.Tensor,
    key_CKD: torch.Tensor,
    value_CKD: torch.Tensor,
    scale: float,
    is_visible_QC: torch.Tensor,
    sink_H: torch.Tensor | None,
) -> torch.Tensor:
    """Q queries attend to what they see of C positions."""
    wide = torch.promote_types(query_QHD.dtype, torch.float32)
    group = query_QHD.shape[1] // key_CKD.shape[1]
    key = key_CKD.to(wide).repeat_interleave(group, dim=1)
    value = value_CKD.to(wide).repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,chd->hqc", query_QHD.to(wide), key) * scale
    scores = scores.masked_fill(~is_visible_QC, float("-inf"))
    if sink_H is not None:
        scores = torch.cat((scores, sink_H.to(wide)[:, None, None].expand(-1, len(query_QHD), 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(key)]
    return torch.einsum("hqc,chd->qhd", weights, value).to(query_QHD.dtype)
