"""A stand-in for AITER: its signatures as published, and what its functions are documented to compute, in torch.

Layouts are undone as AITER's own tests describe them. Nothing here was run next to the real package: tests with it show
that our calls fit the signatures, and that our layouts are the ones that we read.
"""

# Parameters have AITER's names.
# ruff: noqa: N803

from __future__ import annotations

import enum
import math
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from atom_cluster.ops.number_formats import (
    e8m0_codes,
    e8m0_values,
    float4_codes,
    float4_values,
    pack_nibbles,
    scale_for,
    to_float8,
    unpack_nibbles,
)
from tests.published_signatures import read_signatures, with_signature

SIGNATURES = read_signatures(Path(__file__).parent / "signatures.json")
HEAD = "ROCm/aiter e4048607a535"
WHEEL = "amd-aiter 0.1.7.post2.dev18"
PARTITION = 256


class QuantType(enum.Enum):
    No = 0
    per_Token = 2  # noqa: N815
    per_1x32 = 3
    per_128x128 = 5


class ActivationType(enum.Enum):
    Silu = 0


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def install(monkeypatch: pytest.MonkeyPatch, version: str = HEAD) -> list[str]:
    """Put it in the place of the package; the list gets the names of the functions called."""
    calls: list[str] = []
    package = ModuleType("aiter")
    package.__spec__ = ModuleSpec("aiter", None)
    package.QuantType, package.ActivationType = QuantType, ActivationType  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aiter", package)
    for name, signature in SIGNATURES[version].items():
        path, _, function = name.partition(":")
        parts = path.split(".")
        for length in range(2, len(parts) + 1):
            module = ".".join(parts[:length])
            if module not in sys.modules or getattr(sys.modules[module], "version", None) != version:
                made = ModuleType(module)
                made.version = version  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, module, made)
        checked = with_signature(recorded(name, calls), signature)
        monkeypatch.setattr(sys.modules[path], function, checked, raising=False)
    return calls


def recorded(name: str, calls: list[str]) -> Callable[..., Any]:
    def call(**kwargs: Any) -> Any:
        calls.append(name.partition(":")[2])
        return IMPLEMENTATIONS[name](**kwargs)

    return call


def implements(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        IMPLEMENTATIONS[name] = function
        return function

    return register


@implements("aiter.ops.shuffle:shuffle_weight")
def shuffle_weight(x: torch.Tensor, layout: tuple[int, int]) -> torch.Tensor:
    assert layout == (16, 16)
    raw = x.view(torch.uint8) if x.dtype == torch.float4_e2m1fn_x2 else x
    per_load = 16 // raw.element_size()
    num_out, num_in = raw.shape[-2:]
    assert num_out % 16 == 0 and num_in % 32 == 0
    tiles = raw.view(-1, num_out // 16, 16, num_in // 32, 32 // per_load, per_load)
    shuffled = tiles.permute(0, 1, 3, 4, 2, 5).contiguous().view(raw.shape).view(x.dtype)
    shuffled.is_shuffled = True  # type: ignore[attr-defined]
    return shuffled


def unshuffle_weight(x: torch.Tensor) -> torch.Tensor:
    assert x.is_shuffled, "the attribute was lost"  # type: ignore[attr-defined]
    raw = x.view(torch.uint8) if x.dtype == torch.float4_e2m1fn_x2 else x
    per_load = 16 // raw.element_size()
    num_out, num_in = raw.shape[-2:]
    tiles = raw.view(-1, num_out // 16, num_in // 32, 32 // per_load, 16, per_load)
    return tiles.permute(0, 1, 4, 2, 3, 5).contiguous().view(raw.shape)


@implements("aiter.utility.fp4_utils:e8m0_shuffle")
def e8m0_shuffle(scale: torch.Tensor) -> torch.Tensor:
    rows, columns = scale.shape
    padded = torch.zeros(-(-rows // 256) * 256, -(-columns // 8) * 8, dtype=torch.uint8)
    padded[:rows, :columns] = scale.view(torch.uint8)
    tiles = padded.view(len(padded) // 32, 2, 16, padded.shape[1] // 8, 2, 4)
    return tiles.permute(0, 3, 5, 2, 4, 1).contiguous().view(padded.shape).view(scale.dtype)


def unshuffle_scale(scale: torch.Tensor) -> torch.Tensor:
    raw = scale.view(torch.uint8)
    tiles = raw.view(len(raw) // 32, raw.shape[1] // 8, 4, 16, 2, 2)
    return tiles.permute(0, 5, 3, 1, 4, 2).contiguous().view(raw.shape)


def float4_numbers(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    values = float4_values(unpack_nibbles(codes.view(torch.uint8)), torch.float32)
    return values * e8m0_values(scale, torch.float32).repeat_interleave(32, -1)


def block_numbers(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    spread = scale.repeat_interleave(128, -2).repeat_interleave(128, -1)
    return codes.float() * spread[..., : codes.shape[-2], : codes.shape[-1]]


@implements("aiter.ops.quant:per_group_quant_hip")
def per_group_quant(
    x: torch.Tensor, quant_dtype: torch.dtype, group_size: int, *, transpose_scale: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = x.float().view(len(x), -1, group_size)
    scale = scale_for(groups.abs().amax(-1), torch.finfo(quant_dtype).max)
    codes = to_float8(groups / scale[..., None], quant_dtype).view(x.shape)
    return codes, scale.T.contiguous().view(scale.shape) if transpose_scale else scale


@implements("aiter.ops.quant:per_token_quant_hip")
def per_token_quant(x: torch.Tensor, quant_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = per_group_quant(x, quant_dtype, x.shape[-1], transpose_scale=False)
    return codes, scale


@implements("aiter.ops.quant:per_1x32_f4_quant_hip")
def per_1x32_quant(x: torch.Tensor, quant_dtype: torch.dtype, *, shuffle: bool) -> tuple[torch.Tensor, torch.Tensor]:
    assert quant_dtype == torch.float4_e2m1fn_x2 and shuffle
    groups = x.float().view(len(x), -1, 32)
    scale = scale_for(groups.abs().amax(-1), 6.0, "e8m0")
    codes = pack_nibbles(float4_codes(groups / scale[..., None]).view(x.shape))
    return codes.view(quant_dtype), e8m0_shuffle(e8m0_codes(scale).view(torch.float8_e8m0fnu))


@implements("aiter.ops.gemm_op_a8w8:gemm_a8w8_blockscale_bpreshuffle")
def gemm_blocks(
    XQ: torch.Tensor, WQ: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    assert XQ.shape[1] % 128 == 0 and w_scale.dtype == torch.float32
    x_scale = x_scale.reshape(x_scale.shape[1], x_scale.shape[0]).T
    x = XQ.float() * x_scale.repeat_interleave(128, -1)
    return (x @ block_numbers(unshuffle_weight(WQ), w_scale).T).to(dtype)


@implements("aiter.ops.gemm_op_a8w8:gemm_a8w8_bpreshuffle")
def gemm_tokens(
    XQ: torch.Tensor, WQ: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    assert x_scale.shape == (len(XQ), 1) and w_scale.shape == (len(WQ), 1)
    return ((XQ.float() * x_scale) @ (unshuffle_weight(WQ).float() * w_scale).T).to(dtype)


@implements("aiter.ops.gemm_op_a4w4:gemm_a4w4")
def gemm_float4(
    A: torch.Tensor,
    B: torch.Tensor,
    A_scale: torch.Tensor,
    B_scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    bpreshuffle: bool,
) -> torch.Tensor:
    assert bpreshuffle
    num_in = A.shape[1] * 2
    x = float4_numbers(A, unshuffle_scale(A_scale)[: len(A), : num_in // 32])
    w = float4_numbers(unshuffle_weight(B), unshuffle_scale(B_scale)[: len(B), : num_in // 32])
    return (x @ w.T).to(dtype)


@implements("aiter.tuned_gemm:gemm_a16w16")
def gemm_half(A: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None, otype: torch.dtype) -> torch.Tensor:
    assert A.is_contiguous() and B.is_contiguous()
    return F.linear(A, B, bias).to(otype)


@implements("aiter.fused_moe:fused_moe")
def fused_moe(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weight: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_mask: torch.Tensor,
    activation: ActivationType,
    quant_type: QuantType,
    w1_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
) -> torch.Tensor:
    assert activation is ActivationType.Silu
    assert topk_ids.dtype == expert_mask.dtype == torch.int32 and topk_weight.dtype == torch.float32
    num_experts = len(w1)
    matrices = [moe_numbers(w, scale, quant_type) for w, scale in ((w1, w1_scale), (w2, w2_scale))]
    local = torch.cumsum(expert_mask, 0) - 1
    out = torch.zeros(hidden_states.shape, dtype=torch.float32)
    for token, experts in enumerate(topk_ids.tolist()):
        for choice, expert in enumerate(experts):
            assert 0 <= expert < len(expert_mask)
            if not expert_mask[expert]:
                continue
            index = int(local[expert])
            assert index < num_experts
            x = moe_input(hidden_states[token : token + 1].float(), w1, quant_type)
            gate, up = (x @ matrices[0][index].T).chunk(2, -1)
            middle = moe_input(F.silu(gate) * up, w2, quant_type)
            out[token] += topk_weight[token, choice] * (middle @ matrices[1][index].T)[0]
    return out.to(hidden_states.dtype)


def moe_numbers(weight: torch.Tensor, scale: torch.Tensor | None, kind: QuantType) -> torch.Tensor:
    codes = unshuffle_weight(weight)
    if kind is QuantType.No:
        assert scale is None
        return codes.float()
    assert scale is not None
    if kind is QuantType.per_Token:
        assert scale.shape == (*weight.shape[:2], 1) and scale.dtype == torch.float32
        return codes.float() * scale
    if kind is QuantType.per_128x128:
        return block_numbers(codes, scale)
    return float4_numbers(codes, unshuffle_scale(scale).view(*weight.shape[:2], -1))


def moe_input(x: torch.Tensor, weight: torch.Tensor, kind: QuantType) -> torch.Tensor:
    if kind is QuantType.No:
        return x
    if kind is QuantType.per_Token:
        codes, scale = per_token_quant(x, weight.dtype)
        return codes.float() * scale
    if kind is QuantType.per_128x128:
        codes, scale = per_group_quant(x, weight.dtype, 128, transpose_scale=False)
        return codes.float() * scale.repeat_interleave(128, -1)
    codes, scale = per_1x32_quant(x, weight.dtype, shuffle=True)
    return float4_numbers(codes, unshuffle_scale(scale)[: len(x), : x.shape[1] // 32])


@implements("aiter.ops.rmsnorm:rmsnorm2d_fwd")
def rmsnorm(input: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    assert input.dim() == 2 and input.is_contiguous() and weight.dtype == input.dtype
    return (F.rms_norm(input.float(), weight.shape, eps=epsilon) * weight.float()).to(input.dtype)


@implements("aiter.ops.rmsnorm:rmsnorm2d_fwd_with_add")
def rmsnorm_with_add(
    out: torch.Tensor,
    input: torch.Tensor,
    residual_in: torch.Tensor,
    residual_out: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
) -> None:
    total = input + residual_in
    residual_out.copy_(total)
    out.copy_(rmsnorm(total, weight, epsilon))


@implements("aiter.ops.activation:silu_and_mul")
def silu_and_mul(out: torch.Tensor, input: torch.Tensor) -> None:
    gate, up = input.float().chunk(2, -1)
    out.copy_(F.silu(gate) * up)


@implements("aiter.ops.activation:gelu_tanh_and_mul")
def gelu_tanh_and_mul(out: torch.Tensor, input: torch.Tensor) -> None:
    gate, up = input.float().chunk(2, -1)
    out.copy_(F.gelu(gate, approximate="tanh") * up)


@implements("aiter.ops.moe_op:topk_softmax")
def topk_softmax(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    *,
    need_renorm: bool,
) -> None:
    assert topk_indices.dtype == token_expert_indices.dtype == torch.int32
    values, indices = gating_output.softmax(-1).topk(topk_weights.shape[1])
    topk_indices.copy_(indices)
    topk_weights.copy_(values / values.sum(-1, keepdim=True) if need_renorm else values)


@implements("aiter.ops.topk:biased_grouped_topk")
def biased_grouped_topk(
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    *,
    need_renorm: bool,
) -> None:
    assert need_renorm and topk_ids.dtype == torch.int32
    scores = gating_output.sigmoid()
    ranked = (scores + correction_bias).view(len(scores), num_expert_group, -1)
    groups = ranked.topk(2, -1).values.sum(-1).topk(topk_group).indices
    is_in = torch.zeros(len(scores), num_expert_group, dtype=torch.bool).scatter_(1, groups, value=True)
    indices = ranked.masked_fill(~is_in[..., None], float("-inf")).flatten(1).topk(topk_ids.shape[1]).indices
    values = scores.gather(1, indices)
    topk_ids.copy_(indices)
    topk_weights.copy_(values / values.sum(-1, keepdim=True) * routed_scaling_factor)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    """The last queries of a row, [Q, H, D], over its keys and values, [C, K, D]."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = torch.einsum("qhd,chd->hqc", query.double(), key) * scale
    position = torch.arange(len(key))
    own = position[len(key) - len(query) :, None]
    is_seen = position <= own
    if window is not None:
        is_seen &= position > own - window
    weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
    return torch.einsum("hqc,chd->qhd", weights, value).to(query.dtype)


@implements("aiter.ops.attention:paged_attention_v1")
def paged_attention(
    out: torch.Tensor,
    workspace_buffer: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    scale: float,
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor | None,
    context_lens: torch.Tensor,
    max_context_len: int,
    alibi_slopes: torch.Tensor | None,
    kv_cache_dtype: str,
    kv_cache_layout: str,
    logits_soft_cap: float,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    assert kv_cache_layout == "NHD" and kv_cache_dtype == "auto" and logits_soft_cap == 0 and alibi_slopes is None
    assert cu_query_lens is None and k_scale.dtype == v_scale.dtype == torch.float32
    assert block_tables.dtype == context_lens.dtype == torch.int32 and block_tables.is_contiguous()
    assert key_cache.stride() == value_cache.stride() and query.stride()[1:] == (query.shape[2], 1)
    block_size = key_cache.shape[1]
    assert block_tables.shape[1] * block_size >= max_context_len >= int(context_lens.max())
    partials = query.shape[0] * query.shape[1] * math.ceil(max_context_len / PARTITION)
    assert workspace_buffer.nbytes >= partials * (query.shape[2] * query.element_size() + 8)
    for row, length in enumerate(context_lens.tolist()):
        pages = block_tables[row, : -(-length // block_size)].long()
        key, value = (cache[pages].flatten(0, 1)[:length] for cache in (key_cache, value_cache))
        out[row] = attend(query[row : row + 1], key, value, scale)[0]


@implements("aiter.ops.mha:mha_batch_prefill_func")
def batch_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_page_indices: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    window_size: tuple[int, int],
    kv_last_page_lens: torch.Tensor,
    sink_size: int,
    *,
    causal: bool,
) -> torch.Tensor:
    assert causal and sink_size == 0 and window_size[1] == 0 and k.dim() == v.dim() == 4
    for tensor in (cu_seqlens_q, kv_indptr, kv_page_indices, kv_last_page_lens):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    outputs = []
    for row in range(len(cu_seqlens_q) - 1):
        query = q[int(cu_seqlens_q[row]) : int(cu_seqlens_q[row + 1])]
        key, value = (pages_of(cache, kv_indptr, kv_page_indices, kv_last_page_lens, row) for cache in (k, v))
        assert len(query) <= max_seqlen_q and len(key) <= max_seqlen_k
        window = None if window_size[0] < 0 else window_size[0] + 1
        outputs.append(attend(query, key, value, softmax_scale, window))
    return torch.cat(outputs)


def pages_of(
    cache: torch.Tensor, start: torch.Tensor, page: torch.Tensor, last_len: torch.Tensor, row: int
) -> torch.Tensor:
    pages = page[int(start[row]) : int(start[row + 1])].long()
    rows = cache[pages].flatten(0, 1)
    return rows[: len(rows) - cache.shape[1] + int(last_len[row])]


WORK = ("work_meta_data", "work_indptr", "work_info_set", "reduce_indptr", "reduce_final_map", "reduce_partial_map")


@implements("aiter.ops.attention:get_mla_metadata_info_v1")
def mla_sizes(
    batch_size: int,
    max_seqlen_qo: int,
    num_head_qo: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    *,
    is_sparse: bool,
    fast_mode: bool,
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    assert num_head_qo % 8 == 0 and max_seqlen_qo == 1 and fast_mode and not is_sparse
    return tuple(((index + 2, batch_size), torch.int32) for index in range(len(WORK)))


@implements("aiter.ops.attention:get_mla_metadata_v1")
def mla_plan(**kwargs: Any) -> None:
    """Marks the tensors, by their place in the list of sizes, so that the decode call can tell them apart."""
    assert kwargs["num_heads_k"] == 1 and kwargs["is_causal"] and kwargs["uni_seqlen_qo"] == 1
    assert kwargs["kv_granularity"] >= max(16, kwargs["page_size"])
    for index, name in enumerate(("work_metadata_ptrs", *WORK[1:])):
        assert kwargs[name].shape[0] == index + 2, name
        kwargs[name].fill_(index)


@implements("aiter.mla:mla_decode_fwd")
def mla_decode(
    q: torch.Tensor,
    kv_buffer: torch.Tensor,
    o: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_lens: torch.Tensor,
    max_seqlen_q: int,
    page_size: int,
    nhead_kv: int,
    sm_scale: float,
    **work: torch.Tensor,
) -> None:
    # The machine code takes pages for tokens, multiplies 24 bits, and adds up 32.
    assert page_size == nhead_kv == max_seqlen_q == 1 and kv_buffer.shape[1:] == (1, 1, q.shape[2])
    assert kv_buffer.is_contiguous() and len(kv_buffer) < 1 << 24 and kv_buffer.nbytes < 1 << 32
    assert qo_indptr.tolist() == list(range(len(q) + 1)) and o.is_contiguous()
    assert [int(work[name].unique()) for name in WORK] == list(range(len(WORK)))
    for row in range(len(q)):
        stored = pages_of(kv_buffer, kv_indptr, kv_indices, kv_last_page_lens, row)
        o[row] = attend(q[row : row + 1], stored, stored[..., : o.shape[2]], sm_scale)[0]
