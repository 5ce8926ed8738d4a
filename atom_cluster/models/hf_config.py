"""HfConfig: a parsed config.json, read key by key with its types checked. Knows no models.

A key that is null counts as absent. Errors name the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from atom_cluster.config.hf_values import language_model_values
from atom_cluster.errors import ConfigError

_DTYPES = ("float32", "bfloat16", "float16", "float64")


class HfConfig:
    """One configuration, or a section of one."""

    def __init__(self, values: Mapping[str, object], *, where: str = "config.json") -> None:
        self.values = values
        self._where = where

    @classmethod
    def read(cls, model_dir: Path) -> HfConfig:
        """The configuration of the model in `model_dir`. Raises ConfigError when it is absent or damaged."""
        path = model_dir / "config.json"
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as exc:
            raise ConfigError(f"cannot read {path}: {exc}") from exc
        if not isinstance(values, dict):
            raise ConfigError(f"{path} is not an object")
        return cls(values)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str) -> object:
        """Whatever is there; None when absent."""
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer of at least `least`; `default` when absent, unless that is None."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise self.error(key, f"must be {wanted}, got {value!r}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """A positive integer, or None when absent."""
        return self.integer(key) if key in self else None

    def number(self, key: str, default: float | None = None) -> float:
        """A number; `default` when absent, unless that is None."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"must be a number, got {value!r}")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false; `default` when absent."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, got {value!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; `default` when absent, unless that is None."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, got {value!r}")
        return value

    def strings(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, or None when absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, f"must be a list of strings, got {value!r}")
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers, or a single one; empty when absent."""
        value = self.values.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise self.error(key, f"must be an integer or a list of integers, got {value!r}")
        return tuple(items)

    def section(self, key: str) -> HfConfig | None:
        """An object, or None when absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, f"is not an object: {value!r}")
        return HfConfig(value, where=f"{self._where}: {key}")

    def language_model(self) -> HfConfig:
        """The language model's part, at one level: see `language_model_values`."""
        return HfConfig(language_model_values(self.values), where=self._where)

    def require(self, key: str, *supported: object, default: object = None) -> None:
        """Raise ConfigError unless the key's value, or `default` when absent, is one of those that are supported."""
        value = self.values.get(key)
        value = default if value is None else value
        if value not in supported:
            raise self.error(key, f"{value!r} is not supported (supported: {', '.join(map(str, supported))})")

    def error(self, key: str, message: str) -> ConfigError:
        """An error about a key."""
        return ConfigError(f"{self._where}: {key} {message}")

    # --- what all models have

    @property
    def architecture(self) -> str:
        """The one entry of `architectures`."""
        names = self.values.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise self.error("architectures", f"must be a list with one name, got {names!r}")
        return names[0]

    @property
    def dtype(self) -> str | None:
        """`dtype` (new) or `torch_dtype` (old), without the `torch.` that some files have."""
        key = "dtype" if "dtype" in self else "torch_dtype"
        if key not in self:
            return None
        name = str(self.values[key]).removeprefix("torch.")
        if name not in _DTYPES:
            raise self.error(key, f"{name!r} is not one of {', '.join(_DTYPES)}")
        return name
