"""Reads the configuration of DeepSeek-V4, as its makers spell it and as transformers does. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atom_cluster.layers.compressed_attention import CompressedAttentionSpec
from atom_cluster.layers.compressed_index import CompressedIndexSpec
from atom_cluster.layers.compressor import CompressorSpec
from atom_cluster.layers.hyper_connection import HyperConnectionSpec
from atom_cluster.layers.moe import MoeSpec
from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.layers.router import RouterSpec
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.rope_config import read_rope
from atom_cluster.models.spec import ModelSpec, common_fields
from atom_cluster.ops.moe import ExpertActivation

_SLIDING, _SPARSE, _HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_RATES = {_SPARSE: 4, _HEAVY: 128}
_KIND_OF_RATIO = {0: _SLIDING, 4: _SPARSE, 128: _HEAVY}
_RATE_KEYS = {_SPARSE: "compress_rate_csa", _HEAVY: "compress_rate_hca"}
_ROPE_DIM_SHARE = 64 / 512
_NUM_HASH_LAYERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV4Spec(ModelSpec):
    """A decoder on several residual streams. Layers for drafting that its checkpoints have are not built."""

    attentions: tuple[CompressedAttentionSpec, ...]
    """Of each layer."""
    window_rope: RopeSpec
    """Of layers without compressed entries."""
    compressed_rope: RopeSpec
    """Of the others, and of entries."""
    moes: tuple[MoeSpec, ...]
    """Of each layer."""
    streams: HyperConnectionSpec


def read_deepseek_v4_spec(config: HfConfig) -> DeepseekV4Spec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    config.require("hidden_act", "silu", default="silu")
    config.require("scoring_func", "sqrtsoftplus", default="sqrtsoftplus")
    config.require("num_key_value_heads", 1, default=1)
    for key in ("attention_bias", "mlp_bias"):
        config.require(key, False, default=False)  # noqa: FBT003
    window_rope, compressed_rope = _read_ropes(config)
    common = common_fields(config)
    return DeepseekV4Spec(
        **common,
        attentions=_read_attentions(config, common["norm_eps"]),
        window_rope=window_rope,
        compressed_rope=compressed_rope,
        moes=_read_moes(config),
        streams=HyperConnectionSpec(
            hidden_size=config.integer("hidden_size"),
            num_streams=config.integer("hc_mult", 4),
            norm_eps=common["norm_eps"],
            eps=config.number("hc_eps", 1e-6),
            num_iterations=config.integer("hc_sinkhorn_iters", 20),
        ),
    )


def _read_ropes(config: HfConfig) -> tuple[RopeSpec, RopeSpec]:
    """(of window layers, of compressed layers). One that is scaled is so without a temperature, unless it is told."""
    head_dim = config.integer("head_dim")
    share = config.number("partial_rotary_factor", config.integer("qk_rope_head_dim", 64) / head_dim)
    stored = config.section("rope_parameters") or config.section("rope_scaling")
    values = {} if stored is None else dict(stored.values)
    if "main" not in values or "compress" not in values:
        scaled = {"attention_factor": 1.0, **values, "rope_theta": config.number("compress_rope_theta", 160000.0)}
        values = {"main": {"rope_theta": config.number("rope_theta", 10000.0)}, "compress": scaled}
    positions = {"max_position_embeddings": config.get("max_position_embeddings")}
    nested = HfConfig({**positions, "rope_parameters": values})
    return (
        read_rope(nested, head_dim, label="main", default_partial=share),
        read_rope(nested, head_dim, label="compress", default_partial=share),
    )


def _read_attentions(config: HfConfig, norm_eps: float) -> tuple[CompressedAttentionSpec, ...]:
    by_kind = {kind: _read_attention(config, kind, norm_eps) for kind in (_SLIDING, _SPARSE, _HEAVY)}
    kinds = _read_layer_kinds(config)
    if set(kinds) == {_SLIDING}:
        raise config.error("layer_types", "has no compressed layers, and a model of windows alone is not supported")
    return tuple(by_kind[kind] for kind in kinds)


def _read_attention(config: HfConfig, kind: str, norm_eps: float) -> CompressedAttentionSpec:
    hidden_size, query_rank = config.integer("hidden_size"), config.integer("q_lora_rank")
    compressor: CompressorSpec | None = None
    index: CompressedIndexSpec | None = None
    if kind != _SLIDING:
        compressor = CompressorSpec(
            hidden_size=hidden_size,
            entry_dim=config.integer("head_dim"),
            tokens_per_entry=_read_rate(config, kind),
            has_overlap=kind == _SPARSE,
            norm_eps=norm_eps,
        )
    if kind == _SPARSE and compressor is not None:
        index = CompressedIndexSpec(
            query_rank=query_rank,
            num_heads=config.integer("index_n_heads", 64),
            num_selected=config.integer("index_topk", 512),
            compressor=replace(compressor, entry_dim=config.integer("index_head_dim", 128)),
        )
    num_heads, num_groups = config.integer("num_attention_heads"), config.integer("o_groups", 8)
    if num_heads % num_groups != 0:
        raise config.error("o_groups", f"must divide the {num_heads} attention heads, got {num_groups}")
    return CompressedAttentionSpec(
        hidden_size=hidden_size,
        num_heads=num_heads,
        head_dim=config.integer("head_dim"),
        query_rank=query_rank,
        window=config.integer("sliding_window", 128),
        num_output_groups=num_groups,
        output_rank=config.integer("o_lora_rank", 1024),
        norm_eps=norm_eps,
        compressor=compressor,
        index=index,
    )


def _read_rate(config: HfConfig, kind: str) -> int:
    rates = config.section("compress_rates") or HfConfig({})
    return config.integer(_RATE_KEYS[kind], rates.integer(kind, _RATES[kind]))


def _read_layer_kinds(config: HfConfig) -> tuple[str, ...]:
    """`layer_types`; or `compress_ratios`, which may go on for further layers; or two heavy ones, then both in turn."""
    num_layers = config.integer("num_hidden_layers")
    kinds = config.strings("layer_types")
    if kinds is None and "compress_ratios" in config:
        ratios = config.integers("compress_ratios")
        if unknown := sorted(set(ratios) - set(_KIND_OF_RATIO)):
            raise config.error("compress_ratios", f"{unknown[0]} is not supported (supported: 0, 4, 128)")
        kinds = tuple(_KIND_OF_RATIO[ratio] for ratio in ratios)[:num_layers]
        return _checked(config, "compress_ratios", kinds, (_SLIDING, _SPARSE, _HEAVY))
    if kinds is None:
        kinds = tuple(_SPARSE if index % 2 and index > 2 else _HEAVY for index in range(num_layers))
    return _checked(config, "layer_types", kinds, (_SLIDING, _SPARSE, _HEAVY))


def _read_moes(config: HfConfig) -> tuple[MoeSpec, ...]:
    """The experts of the first layers are told by a table of token ids."""
    num_layers, expert_size = config.integer("num_hidden_layers"), config.integer("moe_intermediate_size")
    kinds = config.strings("mlp_layer_types")
    if kinds is None:
        num_hash = config.integer("num_hash_layers", _NUM_HASH_LAYERS, least=0)
        kinds = tuple("hash_moe" if index < num_hash else "moe" for index in range(num_layers))
    kinds = _checked(config, "mlp_layer_types", kinds, ("hash_moe", "moe"))
    by_scores = RouterSpec(
        experts_per_token=config.integer("num_experts_per_tok"),
        score="sqrt_softplus",
        renormalize=True,
        renorm_eps=1e-20,
        scale=config.number("routed_scaling_factor", 1.5),
        bias_name="gate.bias",
    )
    by_table = replace(by_scores, bias_name=None, table_name="gate.tid2eid", vocab_size=config.integer("vocab_size"))
    config.require("n_shared_experts", 1, default=1)
    moe = MoeSpec(
        hidden_size=config.integer("hidden_size"),
        num_experts=config.integer("n_routed_experts"),
        expert_size=expert_size,
        activation=ExpertActivation(limit=config.number("swiglu_limit", 10.0)),
        projection_names=("w1", "w3", "w2"),
        router=by_scores,
        shared_size=expert_size,
    )
    return tuple(replace(moe, router=by_table) if kind == "hash_moe" else moe for kind in kinds)


def _checked(config: HfConfig, key: str, kinds: tuple[str, ...], supported: tuple[str, ...]) -> tuple[str, ...]:
    num_layers = config.integer("num_hidden_layers")
    if len(kinds) != num_layers:
        raise config.error(key, f"must name {num_layers} layers, got {len(kinds)}")
    if unknown := sorted(set(kinds) - set(supported)):
        raise config.error(key, f"{unknown[0]!r} is not supported (supported: {', '.join(supported)})")
    return kinds
