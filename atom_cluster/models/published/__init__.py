"""What the config.json of published models says, as data beside this file: enough to plan without the checkpoint.

Each file has the hub ids that it stands for, where its values are from, how many parameters the publisher names, and
the values of config.json that this project reads. A checkpoint's own config.json is what counts when it is served.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_DIRECTORY = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """One file of this directory."""

    key: str
    """The file's name, without its suffix."""
    names: tuple[str, ...]
    """Values of `model` in a configuration that it stands for."""
    source: str
    num_parameters: float
    """As the publisher says, without layers for drafting; rounded."""
    config: dict[str, object]
    """As a parsed config.json."""


def published_models() -> tuple[PublishedModel, ...]:
    """All of them, by file name."""
    return tuple(_read(path) for path in sorted(_DIRECTORY.glob("*.json")))


def published_model(name: str) -> PublishedModel | None:
    """The model that a configuration calls `name`; None: it is not among them."""
    return next((model for model in published_models() if name in model.names), None)


def _read(path: Path) -> PublishedModel:
    values = json.loads(path.read_text(encoding="utf-8"))
    return PublishedModel(
        key=path.stem,
        names=tuple(values["names"]),
        source=values["source"],
        num_parameters=values["num_parameters"],
        config=values["config"],
    )
