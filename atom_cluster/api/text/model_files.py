"""What the API has to know of a model, read from the JSON files of its directory. Knows nothing of weights."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from atom_cluster.config.hf_values import language_model_values, longest_context
from atom_cluster.errors import ConfigError

JsonObject = dict[str, object]

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling values the model's authors recommend, used where a request names none. None: the usual one."""

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
        cls,
        directory: str | Path,
        *,
        served_name: str | None = None,
        max_model_len: int | None = None,
        uses_recommendations: bool = True,
    ) -> ServedModel:
        """Read `config.json` and, if present, `generation_config.json` and the tokenizer's end token.

        `served_name` None: the directory's name. `max_model_len` None: the checkpoint's limit. `uses_recommendations`
        False: no sampling values are taken from `generation_config.json`; its end tokens are.
        Raises `ConfigError` naming the file and key.
        """
        path = Path(directory)
        outer_config = read_json(path / "config.json")
        config = language_model_values(outer_config)
        generation = read_json(path / "generation_config.json", default={})
        from_tokenizer: JsonObject = {"eos_token_id": _tokenizer_eos_id(path)}
        return cls(
            name=served_name or path.name,
            max_model_len=max_model_len
            or longest_context(config)
            or _required_int(config, "max_position_embeddings", path),
            vocab_size=_required_int(config, "vocab_size", path),
            eos_token_ids=_eos_token_ids(generation, config, outer_config, from_tokenizer),
            defaults=_defaults(generation, path) if uses_recommendations else GenerationDefaults(),
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


def special_tokens(directory: str | Path) -> dict[str, str]:
    """Texts of the tokens that have a name (`eos_token`), from `tokenizer_config.json`, or older repositories' file.

    With those that a model's processor names itself. Raises `ConfigError` naming the file.
    """
    config = read_json(Path(directory) / "tokenizer_config.json", default={})
    older = read_json(Path(directory) / "special_tokens_map.json", default={})
    extra = config.get("extra_special_tokens")
    values = {name: config.get(name, older.get(name)) for name in SPECIAL_TOKEN_NAMES}
    values |= extra if isinstance(extra, dict) else {}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _tokenizer_eos_id(directory: Path) -> int | None:
    """Chat models made from base models often have their end token nowhere but in the tokenizer."""
    text = special_tokens(directory).get("eos_token")
    path = directory / "tokenizer.json"
    if text is None or not path.is_file():
        return None
    try:
        added = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile).added_tokens
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"{path}: not a tokenizer: {exc}") from exc
    return next((token.id for token in added if token.content == text), None)


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    """The part of `tokenizer.json` that lists special tokens."""

    added_tokens: list[_AddedToken] = []


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
    known = {name: generation[name] for name in GenerationDefaults.__slots__ if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        # Greedy decoding is recommended, and what else is there is left over. Clients who want it say temperature 0:
        # that much of an answer is theirs to choose. A penalty acts on greedy decoding too.
        known = {name: value for name, value in known.items() if name == "repetition_penalty"}
    try:
        return msgspec.convert(known, GenerationDefaults)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{path / 'generation_config.json'}: {exc}") from exc
