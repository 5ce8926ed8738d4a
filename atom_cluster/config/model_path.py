"""From the `model:` of a configuration to a local directory: one that exists, the fetched demo model, or a download
from the hub. Knows nothing of what is in it beyond which files a model needs."""

from __future__ import annotations

from pathlib import Path

from atom_cluster.config.env import read_environment
from atom_cluster.errors import ConfigError

DEMO_PREFIX = "demo:"
DEMO_MODEL = "smollm2-135m-instruct"

_TEXT_FILES = ("*.json", "tokenizer*", "*.jinja")
_WEIGHT_FILES = ("*.safetensors",)


def demo_model_dir() -> Path:
    """Where `atom-cluster get-demo-model` puts the demo model; whether it is there is not checked."""
    return read_environment().cache_dir / DEMO_MODEL


def resolve_model_path(model: str, revision: str | None = None, *, with_weights: bool = True) -> Path:
    """The local directory of a model; downloads one that is named by its hub id, at `revision` or its main branch.

    with_weights: of the hub; without, what its texts take is fetched: configuration, tokenizer and template.
    Raises ConfigError naming `model` when it is nowhere to be found. May take long: call it off the event loop.
    """
    if model.startswith(DEMO_PREFIX):
        return _demo_model(model.removeprefix(DEMO_PREFIX))
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ConfigError(f"model `{model}`: there is no such directory")
    return _download(model, revision, (*_TEXT_FILES, *_WEIGHT_FILES) if with_weights else _TEXT_FILES)


def fetch_model_config(model: str, revision: str | None = None) -> Path:
    """config.json of a model of the hub, and nothing else of it. Raises ConfigError naming `model`."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(model, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"config.json of model `{model}` cannot be had from the hub: {error}") from error


def _demo_model(name: str) -> Path:
    if name != DEMO_MODEL:
        raise ConfigError(f"model `{DEMO_PREFIX}{name}`: the only demo model is `{DEMO_PREFIX}{DEMO_MODEL}`")
    path = demo_model_dir()
    if not path.is_dir():
        raise ConfigError(f"model `{DEMO_PREFIX}{name}` is not in {path}: run `atom-cluster get-demo-model` first")
    return path


def _download(model: str, revision: str | None, files: tuple[str, ...]) -> Path:
    # Slow to import, and needed only for models that are not local.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"model `{model}` is no local directory and cannot be had from the hub: {error}") from error
