"""Reference latent attention: row by row, keys and values expanded, softmax written out. Any device."""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache, Rotation
from atom_cluster.ops.mla import LatentNorm, LatentWeights, MlaDims, MlaPlan
from atom_cluster.ops.torch_ref.norm import rms_norm
from atom_cluster.ops.torch_ref.paged import PagedRows, selected_mask
from atom_cluster.ops.torch_ref.rotary import rotary


class PlainLatentWeights:
    """Views of one weight, in the dtype of the activations."""

    def __init__(self, weight_HOL: torch.Tensor, nope_dim: int) -> None:
        self._key_HNL, self._value_HVL = weight_HOL[:, :nope_dim], weight_HOL[:, nope_dim:]

    def absorb(self, query_THN: torch.Tensor) -> torch.Tensor:
        """W_K^T q of each head."""
        return torch.matmul(query_THN.transpose(0, 1), self._key_HNL).transpose(0, 1)

    def expand(self, latent_CL: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(W_K c, W_V c) of some heads."""
        key_HCN = torch.matmul(latent_CL, self._key_HNL[heads].transpose(1, 2))
        value_HCV = torch.matmul(latent_CL, self._value_HVL[heads].transpose(1, 2))
        return key_HCN.transpose(0, 1), value_HCV.transpose(0, 1)

    def project_values(self, mixed_THL: torch.Tensor) -> torch.Tensor:
        """W_V of each head times its mixture of latents."""
        return torch.matmul(mixed_THL.transpose(0, 1), self._value_HVL.transpose(1, 2)).transpose(0, 1)


class RowByRowMla:
    """Latent attention of one step."""

    def __init__(self, metadata: AttentionMetadata, dims: MlaDims) -> None:
        self._rows = PagedRows(metadata)
        self._latent_dim = dims.latent_dim

    def store(
        self,
        latent_TL: torch.Tensor,
        key_TP: torch.Tensor,
        query_THP: torch.Tensor,
        kv: KvLayerCache,
        *,
        norm: LatentNorm,
        rotation: Rotation,
        is_interleaved: bool,
    ) -> torch.Tensor:
        """Norm, rotate, and write latents and keys to their slots."""
        query_THP, key_T1P = rotary(
            query_THP, key_TP[:, None], rotation.cos_T1P, rotation.sin_T1P, is_interleaved=is_interleaved
        )
        latent_TL = rms_norm(latent_TL, norm.weight_L, norm.eps)
        self._rows.store(torch.cat((latent_TL, key_T1P[:, 0]), dim=-1), kv)
        return query_THP

    def attend(
        self,
        query_THN: torch.Tensor,
        rope_THP: torch.Tensor,
        weights: LatentWeights,
        kv: KvLayerCache,
        *,
        scale: float,
        selected_TK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of the step's queries over their rows' latents."""
        outputs = []
        for row, tokens in enumerate(self._rows.tokens):
            stored_CS = self._rows.gather(row, kv, query_THN.dtype)
            latent_CL, rope_CP = stored_CS.tensor_split([self._latent_dim], dim=-1)
            key_CHN, value_CHV = weights.expand(latent_CL, slice(None))
            query_QHN, rope_QHP = query_THN[tokens], rope_THP[tokens]
            wide = torch.promote_types(query_THN.dtype, torch.float32)
            scores = torch.einsum("qhn,chn->hqc", query_QHN.to(wide), key_CHN.to(wide))
            scores = (scores + torch.einsum("qhp,cp->hqc", rope_QHP.to(wide), rope_CP.to(wide))) * scale
            is_visible_QC = self._rows.visible(row)
            if selected_TK is not None:
                is_visible_QC = is_visible_QC & selected_mask(selected_TK[tokens], is_visible_QC.shape[1])
            weight_HQC = scores.masked_fill(~is_visible_QC, float("-inf")).softmax(dim=-1)
            outputs.append(torch.einsum("hqc,chv->qhv", weight_HQC, value_CHV.to(wide)).to(query_THN.dtype))
        return torch.cat(outputs)


def prepare_latent_weights(weight_HOL: torch.Tensor, dims: MlaDims, *, dtype: torch.dtype) -> LatentWeights:
    """Convert to `dtype`."""
    return PlainLatentWeights(weight_HOL.to(dtype), dims.nope_dim)


def plan_mla(metadata: AttentionMetadata, dims: MlaDims) -> MlaPlan:
    """The plan of one step."""
    return RowByRowMla(metadata, dims)
