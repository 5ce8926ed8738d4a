"""Where `check-config` has a model's config.json from: never more of the model than that."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from atom_cluster.config.model_path import DEMO_PREFIX, demo_model_dir, fetch_model_config
from atom_cluster.errors import ConfigError
from atom_cluster.models.published import published_model


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A parsed config.json."""

    values: dict[str, object]
    where: str
    """Where it is from, for people."""


def find_model(model: str, revision: str | None = None, *, file: Path | None = None) -> ModelSource:
    """The config.json of `model:` of a configuration.

    `file` if given; else that of a local directory; else what is known of published models; else the hub's.
    Raises ConfigError when there is none, or it is damaged.
    """
    if file is not None:
        path = file / "config.json" if file.is_dir() else file
        return ModelSource(_read(path), f"by {path}")
    directory = demo_model_dir() if model.startswith(DEMO_PREFIX) else Path(model).expanduser()
    if directory.is_dir():
        return ModelSource(_read(directory / "config.json"), f"in {directory.resolve()}")
    known = published_model(model)
    if known is not None:
        return ModelSource(known.config, f"{model} as published (the checkpoint's own config.json counts in the end)")
    if directory.is_absolute() or model.startswith((".", "~", DEMO_PREFIX)) or model.count("/") > 1:
        raise ConfigError(f"model `{model}`: there is no such directory; --model-config FILE names its config.json")
    return ModelSource(_read(fetch_model_config(model, revision)), f"{model} of the hub")


def _read(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return values
