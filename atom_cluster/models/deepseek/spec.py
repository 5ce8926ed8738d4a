"""Reads the configuration of DeepSeek-V2, V3 (R1, Kimi-K2) and V3.2, GLM-4.7-Flash and GLM-5. Knows no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atom_cluster.layers.indexer import IndexerSpec
from atom_cluster.layers.mla import MlaSpec, SelectionSpec
from atom_cluster.layers.moe import MoeSpec
from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.layers.router import RouterSpec
from atom_cluster.models.appended_mtp import read_num_appended_layers
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.rope_config import read_rope, read_score_factor
from atom_cluster.models.spec import ModelSpec, common_fields

_LATENT_NORM_EPS = 1e-6
"""Of the norms of latents, whatever `rms_norm_eps` says of the others."""

_KINDS_OF_MLP = {"dense": True, "sparse": False}
_KINDS_OF_INDEXER = {"full": True, "shared": False, "F": True, "S": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekSpec(ModelSpec):
    """A pre-norm decoder of latent attention and experts. Per-layer facts cover the layers for drafting, too."""

    attention: MlaSpec
    rope: RopeSpec
    selections: tuple[SelectionSpec | None, ...]
    """Of each layer: whose selection of positions it attends to; None: all positions."""
    dense_layers: frozenset[int]
    """Layers that have a gated MLP instead of experts."""
    dense_size: int
    """Intermediate dims of that."""
    moe: MoeSpec


def read_deepseek_v2_spec(config: HfConfig) -> DeepseekSpec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    config.require("scoring_func", "softmax", default="softmax")
    config.require("topk_method", "greedy", "group_limited_greedy", default="greedy")
    has_groups = config.get("topk_method") == "group_limited_greedy"
    # Configurations have norm_topk_prob, which these models do without.
    router = RouterSpec(
        experts_per_token=config.integer("num_experts_per_tok"),
        score="softmax",
        scale=config.number("routed_scaling_factor", 1.0),
        num_groups=config.integer("n_group") if has_groups else 1,
        topk_groups=config.integer("topk_group") if has_groups else 1,
        group_score="max",
    )
    return _read(config, router, first_dense=0, is_rope_interleaved=True)


def read_deepseek_v3_spec(config: HfConfig) -> DeepseekSpec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    router = _read_biased_router(config, num_groups=8, topk_groups=4)
    return _read(config, router, is_rope_interleaved=config.flag("rope_interleave", default=True))


def read_glm4_moe_lite_spec(config: HfConfig) -> DeepseekSpec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    return _read(
        config,
        _read_biased_router(config, num_groups=1, topk_groups=1),
        is_rope_interleaved=config.flag("rope_interleave", default=True),
        first_dense=1,
        norm_eps=1e-5,
    )


def read_deepseek_v32_spec(config: HfConfig) -> DeepseekSpec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    indexer = _read_indexer(config, num_heads=64, is_rope_interleaved=False)
    router = _read_biased_router(config, num_groups=8, topk_groups=4)
    return _read(config, router, is_rope_interleaved=True, selections=_selections(indexer, _num_all_layers(config)))


def read_glm_moe_dsa_spec(config: HfConfig) -> DeepseekSpec:
    """Raises ConfigError naming the key that is missing, wrong or unsupported."""
    indexer = _read_indexer(config, num_heads=32, is_rope_interleaved=True)
    selections = _selections(indexer, _num_all_layers(config), _read_selecting_layers(config))
    return _read(
        config,
        _read_biased_router(config, num_groups=1, topk_groups=1),
        is_rope_interleaved=True,
        norm_eps=1e-5,
        selections=selections,
    )


def _read(
    config: HfConfig,
    router: RouterSpec,
    *,
    is_rope_interleaved: bool,
    first_dense: int = 3,
    norm_eps: float = 1e-6,
    selections: tuple[SelectionSpec | None, ...] | None = None,
) -> DeepseekSpec:
    """What the families have in common; keyword arguments are their defaults."""
    config.require("hidden_act", "silu", default="silu")
    rope = read_rope(config, config.integer("qk_rope_head_dim"))
    num_shared, expert_size = config.integer("n_shared_experts", 1, least=0), config.integer("moe_intermediate_size")
    return DeepseekSpec(
        **common_fields(config, default_norm_eps=norm_eps),
        attention=_read_attention(config, is_rope_interleaved=is_rope_interleaved),
        rope=rope,
        selections=(None,) * _num_all_layers(config) if selections is None else selections,
        dense_layers=_read_dense_layers(config, first_dense),
        dense_size=config.integer("intermediate_size"),
        moe=MoeSpec(
            hidden_size=config.integer("hidden_size"),
            num_experts=config.integer("n_routed_experts"),
            expert_size=expert_size,
            router=router,
            shared_size=num_shared * expert_size or None,
        ),
        num_draft_layers=read_num_appended_layers(config),
    )


def _read_attention(config: HfConfig, *, is_rope_interleaved: bool) -> MlaSpec:
    nope_dim, rope_dim = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    return MlaSpec(
        hidden_size=config.integer("hidden_size"),
        num_heads=config.integer("num_attention_heads"),
        query_rank=config.optional_integer("q_lora_rank"),
        latent_dim=config.integer("kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=config.integer("v_head_dim"),
        scale=(nope_dim + rope_dim) ** -0.5 * read_score_factor(config),
        norm_eps=_LATENT_NORM_EPS,
        has_bias=config.flag("attention_bias"),
        is_rope_interleaved=is_rope_interleaved,
    )


def _read_biased_router(config: HfConfig, *, num_groups: int, topk_groups: int) -> RouterSpec:
    """The router of V3 and later, whose choice a bias per expert corrects."""
    config.require("scoring_func", "sigmoid", default="sigmoid")
    config.require("topk_method", "noaux_tc", default="noaux_tc")
    return RouterSpec(
        experts_per_token=config.integer("num_experts_per_tok"),
        score="sigmoid",
        renormalize=config.flag("norm_topk_prob", default=True),
        renorm_eps=1e-20,
        scale=config.number("routed_scaling_factor"),
        num_groups=config.integer("n_group", num_groups),
        topk_groups=config.integer("topk_group", topk_groups),
        bias_name="gate.e_score_correction_bias",
    )


def _read_dense_layers(config: HfConfig, first_dense: int) -> frozenset[int]:
    """`mlp_layer_types`, or the first so many layers, and behind them all but every `moe_layer_freq`-th."""
    num_layers = config.integer("num_hidden_layers")
    kinds = config.strings("mlp_layer_types")
    if kinds is not None:
        is_dense = _per_layer(config, "mlp_layer_types", kinds, _KINDS_OF_MLP)
    else:
        first, step = config.integer("first_k_dense_replace", first_dense, least=0), config.integer("moe_layer_freq", 1)
        is_dense = [index < first or index % step != 0 for index in range(num_layers)]
    return frozenset(index for index, dense in enumerate(is_dense) if dense)


def _read_indexer(config: HfConfig, *, num_heads: int, is_rope_interleaved: bool) -> IndexerSpec:
    return IndexerSpec(
        hidden_size=config.integer("hidden_size"),
        query_rank=config.integer("q_lora_rank"),
        num_heads=config.integer("index_n_heads", num_heads),
        head_dim=config.integer("index_head_dim", 128),
        num_selected=config.integer("index_topk", 2048),
        is_rope_interleaved=config.flag("indexer_rope_interleave", default=is_rope_interleaved),
    )


def _read_selecting_layers(config: HfConfig) -> Sequence[bool]:
    """Whether each layer selects for itself: a list, a pattern such as `FSSF`, or every so many layers."""
    num_layers = config.integer("num_hidden_layers")
    for key in ("indexer_types", "index_topk_pattern"):
        if key in config:
            kinds = tuple(config.text(key)) if isinstance(config.get(key), str) else config.strings(key) or ()
            is_selecting = _per_layer(config, key, kinds, _KINDS_OF_INDEXER)
            if not is_selecting[0]:
                raise config.error(key, "has no layer before the first that it could share with")
            return is_selecting
    step, offset = config.integer("index_topk_freq", 1), config.integer("index_skip_topk_offset", 2, least=0)
    return [max(index - offset + 1, 0) % step == 0 for index in range(num_layers)]


def _selections(
    indexer: IndexerSpec, num_layers: int, is_selecting: Sequence[bool] = ()
) -> tuple[SelectionSpec | None, ...]:
    """Of each layer; those that nothing is said of, such as layers for drafting, select for themselves."""
    selections: list[SelectionSpec] = []
    for index in range(num_layers):
        selects = index >= len(is_selecting) or is_selecting[index]
        source = index if selects else selections[-1].source
        selections.append(SelectionSpec(source=source, indexer=indexer if selects else None))
    return tuple(selections)


def _per_layer(config: HfConfig, key: str, kinds: Sequence[str], meaning: dict[str, bool]) -> list[bool]:
    num_layers = config.integer("num_hidden_layers")
    if len(kinds) != num_layers:
        raise config.error(key, f"must name {num_layers} layers, got {len(kinds)}")
    if unknown := sorted(set(kinds) - set(meaning)):
        raise config.error(key, f"{unknown[0]!r} is not supported (supported: {', '.join(meaning)})")
    return [meaning[kind] for kind in kinds]


def _num_all_layers(config: HfConfig) -> int:
    return config.integer("num_hidden_layers") + read_num_appended_layers(config)
