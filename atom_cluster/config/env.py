"""The only reader of environment variables in the library. They carry secrets and facts about one machine, never
behaviour: that belongs into the YAML. Variables of other libraries (HF_HOME, RAY_ADDRESS) are left to those, but for
a few that such a library takes in no other way."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from atom_cluster.errors import ConfigError

SECRET = "ATOM_CLUSTER_SECRET"
SECRET_FILE = "ATOM_CLUSTER_SECRET_FILE"
API_KEYS_FILE = "ATOM_CLUSTER_API_KEYS_FILE"
CACHE = "ATOM_CLUSTER_CACHE"

MIN_SECRET_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Our environment variables, checked."""

    secret: bytes | None = field(repr=False)
    """Shared by all processes of one cluster, at least `MIN_SECRET_BYTES`; None: the cluster makes one up at start."""
    api_keys_file: Path | None
    """Absolute path of the file of API keys, where the configuration names none."""
    cache_dir: Path
    """Where fetched models are kept. Absolute; need not exist."""


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read our variables from `variables`, or from this process's environment.

    Raises ConfigError for a bad value, naming the variable and never the secret.
    """
    values = os.environ if variables is None else variables
    return Environment(
        secret=_secret(values),
        api_keys_file=None if API_KEYS_FILE not in values else _absolute(values[API_KEYS_FILE], API_KEYS_FILE),
        cache_dir=_cache_dir(values.get(CACHE)),
    )


def is_variable_set(name: str) -> bool:
    """Whether the operator, or `default_variable`, has set a variable of another library."""
    return name in os.environ


def default_variable(name: str, value: str) -> None:
    """Set a variable of another library, in this process and its children, unless it is set already."""
    os.environ.setdefault(name, value)


def _secret(values: Mapping[str, str]) -> bytes | None:
    text, file_name = values.get(SECRET), values.get(SECRET_FILE)
    if text is not None and file_name is not None:
        raise ConfigError(f"set {SECRET} or {SECRET_FILE}, not both")
    if text is not None:
        return _checked_secret(text.encode("utf-8", "surrogateescape"), SECRET)
    if file_name is None:
        return None
    try:
        # Editors and `echo` end a file with a newline that nobody means to be part of the secret.
        return _checked_secret(Path(file_name).expanduser().read_bytes().rstrip(b"\r\n"), SECRET_FILE)
    except OSError as error:
        raise ConfigError(f"{SECRET_FILE}: cannot read {file_name}: {error.strerror}") from error


def _checked_secret(secret: bytes, variable: str) -> bytes:
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"{variable}: the secret has {len(secret)} bytes, at least {MIN_SECRET_BYTES} are needed")
    return secret


def _cache_dir(text: str | None) -> Path:
    return Path.home() / ".cache" / "atom_cluster" if text is None else _absolute(text, CACHE)


def _absolute(text: str, variable: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_absolute():
        # Processes of one cluster have different working directories.
        raise ConfigError(f"{variable}: `{text}` is not an absolute path")
    return path
