"""Multi-head latent attention by AITER: rows with one query, in the absorbed form, by its persistent decode kernel.

Other rows, selections of positions, and whatever the kernel is not made for go to the backend that this one stands
before, which also writes the latents. Shape suffixes as in `ops.mla`; W rows with one query.

The kernel reads single tokens: it is given the size of pages, and takes them for tokens. So a list of all cached tokens
is made for it, in which our pages are tokens far apart. And it computes addresses in 32 bits. (Both are seen in the
machine code of its gfx942 variant, in AITER 0.1.7 and still in August 2026.) It is meant for layers whose tokens are
together, while our pages hold all layers, which spreads a layer over the whole memory. Memory of more than `MAX_SPAN`
is left to the backend behind; to do without, each layer would have to be in memory of its own.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from atom_cluster.ops.aiter.binding import AiterFunction
from atom_cluster.ops.aiter.rows import PageList, decode_rows, list_tokens, other_rows
from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache, Rotation
from atom_cluster.ops.mla import LatentNorm, LatentWeights, MlaDims, MlaPlan, PlanMla
from atom_cluster.units import GiB, MiB

SIZES = AiterFunction(
    "aiter.ops.attention",
    "get_mla_metadata_info_v1",
    "batch_size",
    "max_seqlen_qo",
    "num_head_qo",
    "q_dtype",
    "kv_dtype",
    "is_sparse",
    "fast_mode",
)
PLAN = AiterFunction(
    "aiter.ops.attention",
    "get_mla_metadata_v1",
    "seqlens_qo_indptr",
    "seqlens_kv_indptr",
    "kv_last_page_lens",
    "num_heads_per_head_k",
    "num_heads_k",
    "is_causal",
    "work_metadata_ptrs",
    "work_info_set",
    "work_indptr",
    "reduce_indptr",
    "reduce_final_map",
    "reduce_partial_map",
    "page_size",
    "kv_granularity",
    "max_seqlen_qo",
    "uni_seqlen_qo",
    "fast_mode",
    "dtype_q_nope",
    "dtype_kv_nope",
)
DECODE = AiterFunction(
    "aiter.mla",
    "mla_decode_fwd",
    "q",
    "kv_buffer",
    "o",
    "qo_indptr",
    "kv_indptr",
    "kv_indices",
    "kv_last_page_lens",
    "max_seqlen_q",
    "page_size",
    "nhead_kv",
    "sm_scale",
    "work_meta_data",
    "work_indptr",
    "work_info_set",
    "reduce_indptr",
    "reduce_final_map",
    "reduce_partial_map",
)
FUNCTIONS = (SIZES, PLAN, DECODE)

LATENT_DIM, ROPE_DIM = 512, 64
"""The kernel was built for these."""
HEAD_COUNTS = tuple(range(16, 129, 16))
MAX_SPAN = 4 * GiB - MiB
"""Bytes from a layer's first page to its last."""
MAX_LISTED = 1 << 22
"""Cached tokens, as many as the block tables have room for."""


class AiterMla:
    """Latent attention of one step."""

    def __init__(self, metadata: AttentionMetadata, dims: MlaDims, fallback: PlanMla) -> None:
        self._metadata, self._dims = metadata, dims
        self._plan_fallback = fallback
        self._fallback = fallback(metadata, dims)
        self._decode, self._other = decode_rows(metadata), other_rows(metadata)
        self._tokens: PageList | None = None
        self._tokens_per_page = 0
        self._work: dict[str, torch.Tensor] | None = None

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
        """Norm, rotate, and write latents and keys: by the backend behind."""
        return self._fallback.store(
            latent_TL, key_TP, query_THP, kv, norm=norm, rotation=rotation, is_interleaved=is_interleaved
        )

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
        if self._decode is None or selected_TK is not None or not self._can_decode(query_THN, kv):
            return self._fallback.attend(query_THN, rope_THP, weights, kv, scale=scale, selected_TK=selected_TK)
        num_decoded = self._metadata.num_decode_rows
        decoded = self._attend_decode(query_THN[:num_decoded], rope_THP[:num_decoded], weights, kv, scale)
        if self._other is None:
            return decoded
        others = self._other_fallback.attend(query_THN[num_decoded:], rope_THP[num_decoded:], weights, kv, scale=scale)
        return torch.cat((decoded, others))

    def _can_decode(self, query_THN: torch.Tensor, kv: KvLayerCache) -> bool:
        dims, page = self._dims, kv.key
        stored_dim = dims.latent_dim + dims.rope_dim
        num_listed = self._metadata.num_decode_rows * self._metadata.block_table.shape[1] * self._metadata.block_size
        return (
            query_THN.dtype == page.dtype == torch.bfloat16
            and kv.key_scale == 1.0
            and (dims.latent_dim, dims.rope_dim) == (LATENT_DIM, ROPE_DIM)
            and dims.num_heads in HEAD_COUNTS
            and page.stride(0) % stored_dim == 0
            and (page.stride(1), page.stride(3)) == (stored_dim, 1)
            and page.shape[0] * page.stride(0) * page.dtype.itemsize <= MAX_SPAN
            and num_listed <= MAX_LISTED
        )

    def _attend_decode(
        self,
        query_WHN: torch.Tensor,
        rope_WHP: torch.Tensor,
        weights: LatentWeights,
        kv: KvLayerCache,
        scale: float,
    ) -> torch.Tensor:
        query_WHS = torch.cat((weights.absorb(query_WHN), rope_WHP), dim=-1)
        mixed_WHL = query_WHS.new_empty(*query_WHS.shape[:2], self._dims.latent_dim)
        tokens = self._list_tokens(kv)
        DECODE(
            q=query_WHS,
            kv_buffer=_as_tokens(kv.key),
            o=mixed_WHL,
            qo_indptr=self._query_start,
            kv_indptr=tokens.start,
            kv_indices=tokens.page,
            kv_last_page_lens=tokens.last_len,
            max_seqlen_q=1,
            page_size=1,
            nhead_kv=1,
            sm_scale=scale,
            **self._plan_work(tokens),
        )
        return weights.project_values(mixed_WHL).contiguous()

    @cached_property
    def _query_start(self) -> torch.Tensor:
        return self._decode_rows.query_start.contiguous()

    def _list_tokens(self, kv: KvLayerCache) -> PageList:
        """Made once for all layers: their pages are parts of the same."""
        tokens_per_page = kv.key.stride(0) // kv.key.shape[-1]
        if self._tokens is None or self._tokens_per_page != tokens_per_page:
            self._tokens, self._tokens_per_page = list_tokens(self._decode_rows, tokens_per_page), tokens_per_page
        return self._tokens

    def _plan_work(self, tokens: PageList) -> dict[str, torch.Tensor]:
        """How the rows are divided among the chip's units, made on the device once for all layers."""
        if self._work is None:
            self._work = self._make_work(tokens)
        return self._work

    def _make_work(self, tokens: PageList) -> dict[str, torch.Tensor]:
        num_heads, num_rows = self._dims.num_heads, self._metadata.num_decode_rows
        device, dtype = self._metadata.context_len.device, torch.bfloat16
        sizes: Any = SIZES(
            batch_size=num_rows,
            max_seqlen_qo=1,
            num_head_qo=num_heads,
            q_dtype=dtype,
            kv_dtype=dtype,
            is_sparse=False,
            fast_mode=True,
        )
        names = (
            "work_meta_data",
            "work_indptr",
            "work_info_set",
            "reduce_indptr",
            "reduce_final_map",
            "reduce_partial_map",
        )
        work = {name: torch.empty(size, dtype=kind, device=device) for name, (size, kind) in zip(names, sizes)}
        PLAN(
            seqlens_qo_indptr=self._query_start,
            seqlens_kv_indptr=tokens.start,
            kv_last_page_lens=tokens.last_len,
            num_heads_per_head_k=num_heads,
            num_heads_k=1,
            is_causal=True,
            work_metadata_ptrs=work["work_meta_data"],
            work_info_set=work["work_info_set"],
            work_indptr=work["work_indptr"],
            reduce_indptr=work["reduce_indptr"],
            reduce_final_map=work["reduce_final_map"],
            reduce_partial_map=work["reduce_partial_map"],
            page_size=1,
            kv_granularity=16,
            max_seqlen_qo=1,
            uni_seqlen_qo=1,
            fast_mode=True,
            dtype_q_nope=dtype,
            dtype_kv_nope=dtype,
        )
        return work

    @cached_property
    def _decode_rows(self) -> AttentionMetadata:
        assert self._decode is not None, "no rows with one query"
        return self._decode

    @cached_property
    def _other_fallback(self) -> MlaPlan:
        assert self._other is not None, "no rows with several queries"
        return self._plan_fallback(self._other, self._dims)


def _as_tokens(page: torch.Tensor) -> torch.Tensor:
    """[N, block_size, 1, S] with a stride over pages -> all that lies between, as pages of one token, [n, 1, 1, S]."""
    stored_dim = page.shape[-1]
    num_tokens = (page.shape[0] - 1) * (page.stride(0) // stored_dim) + page.shape[1]
    return page.as_strided((num_tokens, 1, 1, stored_dim), (stored_dim, stored_dim, stored_dim, 1))


def mla_planner(fallback: PlanMla) -> PlanMla:
    """Plans that attend by AITER where it has a kernel, and by `fallback` where it has not."""

    def plan_mla(metadata: AttentionMetadata, dims: MlaDims) -> MlaPlan:
        return AiterMla(metadata, dims, fallback)

    return plan_mla
