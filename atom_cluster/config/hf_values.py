"""A parsed config.json as one level of values: those of the language model in it. Takes no decisions.

For everybody who reads one before or without the model's own reader.
"""

from __future__ import annotations

from collections.abc import Mapping

_GEMMA3: dict[str, object] = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "eos_token_id": 1,
    "bos_token_id": 2,
}

_DEFAULTS = {"Gemma3ForCausalLM": _GEMMA3, "Gemma3ForConditionalGeneration": _GEMMA3}
"""By architecture: values that published files leave out where they are the definition's own."""

_WHOLE_MODEL_KEYS = ("architectures", "tie_word_embeddings")


def language_model_values(config: Mapping[str, object]) -> dict[str, object]:
    """The values of a configuration without those that are null, and with defaults that files of its kind leave out.

    Of a model for more than text, its `text_config` stands above the rest; but the architecture, and whether
    embeddings are tied, are the whole model's.
    """
    stated = {key: value for key, value in config.items() if value is not None}
    text = config.get("text_config")
    if isinstance(text, Mapping):
        stated |= {key: value for key, value in text.items() if value is not None}
        stated |= {key: config[key] for key in _WHOLE_MODEL_KEYS if config.get(key) is not None}
    names = stated.get("architectures")
    defaults = _DEFAULTS.get(names[0], {}) if isinstance(names, list) and names else {}
    return {**defaults, **stated}


def longest_context(values: Mapping[str, object]) -> int | None:
    """Tokens that a model was made for; None when nothing says so.

    Yarn configurations of the old spelling state the length before the extension.
    """
    stated = values.get("max_position_embeddings")
    if not isinstance(stated, int) or isinstance(stated, bool) or stated < 1:
        return None
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key)
        if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) == "yarn":
            original = rope.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
            factor = rope.get("factor")
            if isinstance(factor, (int, float)):
                return max(stated, int(factor * (original if isinstance(original, (int, float)) else stated)))
    return stated
