"""`atom-cluster make-key`: a new API key, and the line that makes it valid in a file of keys."""

from __future__ import annotations

from pydantic import ValidationError

from atom_cluster.api.protection.keys import hash_key, make_key
from atom_cluster.config.protection import ApiKeyEntry, RateLimits
from atom_cluster.errors import ConfigError


def new_key(name: str, *, role: str, limits: RateLimits, most_urgent_priority: int | None = None) -> tuple[str, str]:
    """A key, which is nowhere else, and its line for the file. Raises `ConfigError` that names what cannot be."""
    key = make_key()
    fields = {"name": name, "sha256": hash_key(key), "role": role} | limits.model_dump(exclude_none=True)
    if most_urgent_priority is not None:
        fields["most_urgent_priority"] = most_urgent_priority
    try:
        ApiKeyEntry.model_validate(fields)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ConfigError(f"{first['loc'][0]}: {first['msg']}") from None
    return key, "- {" + ", ".join(f"{field}: {value}" for field, value in fields.items()) + "}"
