"""ModelSpec: an HF config.json as the numbers our layers are built from, checked. Knows no tensors and no devices.

Values that a config may leave out get the default that the model's own definition gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atom_cluster.errors import ConfigError
from atom_cluster.layers.rope_spec import RopeSpec
from atom_cluster.models.rope_config import read_rope

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A dense decoder-only model of the Llama family."""

    architecture: str
    """First entry of `architectures`, a key of the registry."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    max_positions: int
    """Longest context, prompt plus output, that the model was made for."""
    has_tied_embeddings: bool
    has_qkv_bias: bool
    has_attention_output_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    """RMS norm over each query and key head before rotation."""
    checkpoint_dtype: str | None
    """What the configuration says its weights are stored in; None when it does not say."""
    eos_token_ids: tuple[int, ...]
    """From config.json; generation_config.json may have more."""
    bos_token_id: int | None

    @classmethod
    def from_config(cls, hf_config: Mapping[str, object]) -> ModelSpec:
        """Read a parsed config.json. Raises ConfigError naming the key that is missing, wrong or unsupported."""
        _refuse_unsupported(hf_config)
        num_heads = _integer(hf_config, "num_attention_heads")
        hidden_size = _integer(hf_config, "hidden_size")
        architecture = _architecture(hf_config)
        is_qwen2, is_qwen3 = architecture.startswith("Qwen2"), architecture.startswith("Qwen3")
        has_attention_bias = not is_qwen2 and _flag(hf_config, "attention_bias")
        head_dim = _integer(hf_config, "head_dim", default=128 if is_qwen3 else hidden_size // num_heads)
        rope = read_rope(hf_config, head_dim)
        return cls(
            architecture=architecture,
            vocab_size=_integer(hf_config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(hf_config, "intermediate_size"),
            num_layers=_integer(hf_config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_integer(hf_config, "num_key_value_heads", default=num_heads),
            head_dim=head_dim,
            norm_eps=_norm_eps(hf_config),
            rope=rope,
            max_positions=_max_positions(hf_config, rope),
            has_tied_embeddings=_flag(hf_config, "tie_word_embeddings"),
            has_qkv_bias=is_qwen2 or has_attention_bias,
            has_attention_output_bias=has_attention_bias,
            has_mlp_bias=_flag(hf_config, "mlp_bias"),
            has_qk_norm=is_qwen3,
            checkpoint_dtype=_dtype(hf_config),
            eos_token_ids=_token_ids(hf_config, "eos_token_id"),
            bos_token_id=next(iter(_token_ids(hf_config, "bos_token_id")), None),
        )


def _refuse_unsupported(hf_config: Mapping[str, object]) -> None:
    if hf_config.get("quantization_config") is not None:
        raise ConfigError("config.json: quantization_config is present, and quantized checkpoints are not supported")
    activation = hf_config.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"config.json: hidden_act {activation!r} is not supported (supported: silu)")
    layer_types = hf_config.get("layer_types")
    has_window = hf_config.get("use_sliding_window") is True or (
        isinstance(layer_types, list) and any(kind != "full_attention" for kind in layer_types)
    )
    if has_window:
        raise ConfigError("config.json: sliding window attention is not supported")


def _architecture(hf_config: Mapping[str, object]) -> str:
    names = hf_config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ConfigError(f"config.json: architectures must be a list with one name, got {names!r}")
    return names[0]


def _integer(hf_config: Mapping[str, object], key: str, *, default: int | None = None) -> int:
    value = hf_config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def _flag(hf_config: Mapping[str, object], key: str) -> bool:
    value = hf_config.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be true or false, got {value!r}")
    return value


def _norm_eps(hf_config: Mapping[str, object]) -> float:
    value = hf_config.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"config.json: rms_norm_eps must be a number, got {value!r}")
    return float(value)


def _max_positions(hf_config: Mapping[str, object], rope: RopeSpec) -> int:
    """Yarn configurations of the old spelling state the length before extension."""
    stated = _integer(hf_config, "max_position_embeddings")
    extended = int(rope.factor * rope.original_max_positions) if rope.kind == "yarn" else 0
    return max(stated, extended)


def _dtype(hf_config: Mapping[str, object]) -> str | None:
    """`dtype` (new) or `torch_dtype` (old), without the `torch.` that some files have."""
    value = hf_config.get("dtype", hf_config.get("torch_dtype"))
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(f"config.json: dtype {name!r} is not one of {', '.join(_DTYPES)}")
    return name


def _token_ids(hf_config: Mapping[str, object], key: str) -> tuple[int, ...]:
    value = hf_config.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) for item in values):
        raise ConfigError(f"config.json: {key} must be an integer or a list of integers, got {value!r}")
    return tuple(values)
