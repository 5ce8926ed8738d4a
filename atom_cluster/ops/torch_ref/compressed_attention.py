"""Reference attention over tokens and compressed entries: row by row, softmax written out. Any device."""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.compressed_attention import CompressedAttentionPlan
from atom_cluster.ops.torch_ref.paged import PagedRows, selected_mask


class RowByRowCompressedAttention:
    """Attention of one step. Further shape suffixes: Q queries of a row, C tokens and entries that it looks at."""

    def __init__(self, tokens: AttentionMetadata, entries: AttentionMetadata, tokens_per_entry: int) -> None:
        self._tokens = PagedRows(tokens)
        self._entries = PagedRows(entries, tokens_per_entry)

    def store(self, key_TD: torch.Tensor, tokens: KvLayerCache) -> None:
        """Write the step's keys to their slots."""
        self._tokens.store(key_TD, tokens)

    def attend(
        self,
        query_THD: torch.Tensor,
        tokens: KvLayerCache,
        entries: KvLayerCache,
        *,
        scale: float,
        sink_H: torch.Tensor,
        selected_TK: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the step's queries over their rows' tokens and entries."""
        wide = torch.promote_types(query_THD.dtype, torch.float32)
        outputs = []
        for row, at in enumerate(self._tokens.tokens):
            is_visible_QE = self._entries.visible(row)
            if selected_TK is not None:
                is_visible_QE = is_visible_QE & selected_mask(selected_TK[at], is_visible_QE.shape[1])
            is_visible_QC = torch.cat((self._tokens.visible(row), is_visible_QE), dim=1)
            key_CD = torch.cat((self._tokens.gather(row, tokens, wide), self._entries.gather(row, entries, wide)))
            output_QHD = _attend_row(query_THD[at].to(wide), key_CD, is_visible_QC, scale, sink_H.to(wide))
            outputs.append(output_QHD.to(query_THD.dtype))
        return torch.cat(outputs)


def plan_compressed_attention(
    tokens: AttentionMetadata, entries: AttentionMetadata, *, tokens_per_entry: int
) -> CompressedAttentionPlan:
    """The plan of one step."""
    return RowByRowCompressedAttention(tokens, entries, tokens_per_entry)


def _attend_row(
    query_QHD: torch.Tensor, key_CD: torch.Tensor, is_visible_QC: torch.Tensor, scale: float, sink_H: torch.Tensor
) -> torch.Tensor:
    """Keys are values, too."""
    score_QHC = torch.matmul(query_QHD, key_CD.T) * scale
    score_QHC = score_QHC.masked_fill(~is_visible_QC[:, None], float("-inf"))
    sink_QH1 = sink_H[None, :, None].expand(len(query_QHD), -1, 1)
    weight_QHC = torch.cat((score_QHC, sink_QH1), dim=-1).softmax(dim=-1)[..., :-1]
    return torch.matmul(weight_QHC, key_CD)
