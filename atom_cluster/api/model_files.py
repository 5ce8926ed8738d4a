"""What the API has to know of a model, read from the JSON files of its directory. Knows nothing of weights."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from atom_cluster.errors import ConfigError

JsonObject = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling values the model's authors recommend, used where a request names none. None: the usual default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The one model that clients see."""

    name: str
    """Name clients use."""
    max_model_len: int
    """Most tokens of prompt plus output."""
    vocab_size: int
    """Token ids in prompts are below this."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end an output."""
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    created: int = 0
    """Unix seconds, shown at /v1/models."""

    @classmethod
    def from_directory(
        cls, directory: str | Path, *, served_name: str | None = None, max_model_len: int | None = None
    ) -> ServedModel:
        """Read `config.json` and, if present, `generation_config.json`.

        `served_name` None: the directory's name. `max_model_len` None: the checkpoint's limit.
        Raises `ConfigError` naming the file and key.
        """
        path = Path(directory)
        config = _text_config(read_json(path / "config.json"))
        generation = read_json(path / "generation_config.json", default={})
        return cls(
            name=served_name or path.name,
            max_model_len=max_model_len or _required_int(config, "max_position_embeddings", path),
            vocab_size=_required_int(config, "vocab_size", path),
            eos_token_ids=_eos_token_ids(generation, config),
            defaults=_defaults(generation, path),
            created=int(time.time()),
        )


def read_json(path: Path, *, default: JsonObject | None = None) -> JsonObject:
    """The object in a JSON file; `default` if there is no such file. Raises `ConfigError` naming the file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as exc:
        if default is not None:
            return default
        raise ConfigError(f"{path}: not found") from exc
    try:
        return msgspec.json.decode(content, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def _text_config(config: JsonObject) -> JsonObject:
    """Multimodal checkpoints keep the language model's values one level down."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def _required_int(config: JsonObject, key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{path / 'config.json'}: `{key}` is {value!r}, expected a positive integer")
    return value


def _eos_token_ids(*configs: JsonObject) -> tuple[int, ...]:
    """End tokens of all files, in order: chat models often add theirs to `generation_config.json` only."""
    found: dict[int, None] = {}
    for config in configs:
        value = config.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if isinstance(token_id, int):
                found[token_id] = None
    return tuple(found)


def _defaults(generation: JsonObject, path: Path) -> GenerationDefaults:
    # `do_sample: false` makes the recommended temperature meaningless, and is the default of the file format. Files
    # that recommend values set it to true.
    if generation.get("do_sample") is not True:
        return GenerationDefaults()
    known = {name: generation[name] for name in GenerationDefaults.__slots__ if generation.get(name) is not None}
    try:
        return msgspec.convert(known, GenerationDefaults)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{path / 'generation_config.json'}: {exc}") from exc
