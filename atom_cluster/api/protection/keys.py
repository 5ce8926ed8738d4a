"""API keys: their form, their file's text, and which one a request presents.

Keys themselves are nowhere in the cluster, only their SHA-256. A hash that is fast is right here: keys are 256 random
bits, so that nobody can try enough of them, and every request is checked. Knows nothing of HTTP or of files.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence

import yaml
from pydantic import ValidationError

from atom_cluster.config.protection import ApiKeyEntry, ApiKeyFile
from atom_cluster.errors import ConfigError

PREFIX = "atom-"
"""Of every key that `make_key` makes, so that scanners for leaked secrets can know them."""
MAX_KEY_CHARS = 256
"""Longer ones are not hashed: they are none of ours."""
_NUM_RANDOM_BYTES = 32


def make_key() -> str:
    """A new key."""
    return PREFIX + secrets.token_urlsafe(_NUM_RANDOM_BYTES)


def hash_key(key: str) -> str:
    """What a file of keys has of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class KeyRing:
    """The valid keys."""

    def __init__(self, entries: Sequence[ApiKeyEntry]) -> None:
        self.entries = tuple(entries)
        self._digests = tuple((bytes.fromhex(entry.sha256), entry) for entry in entries)

    def find(self, key: str) -> ApiKeyEntry | None:
        """The entry of a key, or None. Takes as long for one as for any other key, right or wrong."""
        if len(key) > MAX_KEY_CHARS:
            return None
        digest = bytes.fromhex(hash_key(key))
        found: ApiKeyEntry | None = None
        for known, entry in self._digests:
            if hmac.compare_digest(known, digest):
                found = entry
        return found


def parse_keys(text: str, *, source: str) -> KeyRing:
    """The keys of a file's text. Raises `ConfigError` that names `source` and the entry, and no value: somebody may
    have written a key where its hash belongs."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        raise ConfigError(f"{source}: not valid YAML{where}") from None
    except (ValueError, RecursionError):
        # What the library raises for days that no month has, and for what is nested too deeply.
        raise ConfigError(f"{source}: not valid YAML") from None
    try:
        return KeyRing(ApiKeyFile.model_validate({"keys": document} if isinstance(document, list) else document).keys)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        path = ".".join(str(step) for step in first["loc"])
        raise ConfigError(f"{source}: {path}: {first['msg']}" if path else f"{source}: {first['msg']}") from None
