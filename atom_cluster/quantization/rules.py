"""What readers of quantization configs take and give. Knows no formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from atom_cluster.errors import ConfigError
from atom_cluster.quantization.names import is_listed
from atom_cluster.quantization.quantized import QuantizedScheme


class ConfigSection(Protocol):
    """An object of a JSON file, read key by key. Errors are ConfigErrors that name file and key; null is absent."""

    @property
    def values(self) -> Mapping[str, object]:
        """All of it."""
        ...

    def __contains__(self, key: str) -> bool: ...

    def get(self, key: str) -> object:
        """Whatever is there; None when absent."""
        ...

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer of at least `least`."""
        ...

    def number(self, key: str, default: float | None = None) -> float:
        """A number."""
        ...

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false."""
        ...

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        ...

    def strings(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, or None when absent."""
        ...

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers; empty when absent."""
        ...

    def section(self, key: str) -> ConfigSection | None:
        """An object, or None when absent."""
        ...

    def require(self, key: str, *supported: object, default: object = None) -> None:
        """Raise ConfigError unless the value is supported."""
        ...

    def error(self, key: str, message: str) -> ConfigError:
        """An error about a key."""
        ...


@dataclass(frozen=True, slots=True)
class SchemeRules:
    """What a quantization config says."""

    choose: Callable[[str], QuantizedScheme | None]
    """The scheme of the layer with this name; None: plain floats."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that the format may add and that carry nothing needed."""


def all_but(scheme: QuantizedScheme, excluded: tuple[str, ...]) -> SchemeRules:
    """One scheme for all layers that are not listed."""
    return SchemeRules(lambda name: None if is_listed(name, excluded) else scheme)


def excluded_by(section: ConfigSection, *keys: str) -> tuple[str, ...]:
    """The lists under these keys, together."""
    return tuple(pattern for key in keys for pattern in section.strings(key) or ())


def require_flag(section: ConfigSection, key: str, *, is_set: bool) -> None:
    """Raise ConfigError when the flag is there and says otherwise."""
    if section.flag(key, default=is_set) != is_set:
        raise section.error(key, f"{not is_set} is not supported")
