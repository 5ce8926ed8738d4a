"""Who may use the HTTP API and how much of it: API keys, their limits, and what one ingress takes on at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from atom_cluster.config.base import FrozenConfig

MAX_PRIORITY = 100
"""Priorities of requests are from its negative to it. Lower runs first, 0 is usual."""
MAX_KEYS = 1000
"""Most keys of one file: each is compared with every request's, and is a value of a metric's label."""

Role = Literal["user", "monitor", "admin"]


class RateLimits(FrozenConfig):
    """What one key may use, or all clients together where there are no keys. Null is no limit.

    Limits are for the cluster: each of n ingress processes enforces one n-th by itself, without asking the others.
    """

    requests_per_minute: int | None = Field(None, ge=1)
    """POST requests. Up to so many may come at once; then one more every 60 / `requests_per_minute` seconds."""
    tokens_per_minute: int | None = Field(None, ge=1)
    """Prompt and output tokens. Before a request its body's bytes / 4 are taken, afterwards what it really used."""
    concurrent_requests: int | None = Field(None, ge=1)
    """POST requests that are answered at the same time."""

    def or_else(self, default: RateLimits) -> RateLimits:
        """These, and where one is null that of `default`."""
        return RateLimits(
            requests_per_minute=self.requests_per_minute or default.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute or default.tokens_per_minute,
            concurrent_requests=self.concurrent_requests or default.concurrent_requests,
        )


class ApiKeyEntry(RateLimits):
    """One key of a file of keys: its name, its hash, what it may do, how much and how urgently."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Shown in logs and metrics instead of the key."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the key in hexadecimal. `atom-cluster make-key` makes keys of 256 random bits. Nobody guesses one of
    those however fast the hash is; a slow hash would protect words that people think up, and cost every request."""
    role: Role = "user"
    """user: generation, tokenization and models. monitor: metrics, cluster state, timelines and the status page.
    admin: all of these, and the profiler."""
    most_urgent_priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """The lowest priority that its requests may ask for. Null: for an admin's key any, else that of
    `api.protection.most_urgent_priority`."""

    def priority_limit(self, default: int) -> int:
        """The lowest priority it may ask for, where keys without one of their own have `default`."""
        if self.most_urgent_priority is not None:
            return self.most_urgent_priority
        return -MAX_PRIORITY if self.role == "admin" else default


class ApiKeyFile(FrozenConfig):
    """A file of API keys."""

    keys: tuple[ApiKeyEntry, ...] = Field(min_length=1, max_length=MAX_KEYS)
    """All that are valid."""

    @field_validator("keys")
    @classmethod
    def _are_different(cls, keys: tuple[ApiKeyEntry, ...]) -> tuple[ApiKeyEntry, ...]:
        names = [key.name for key in keys]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"a name is there twice: {', '.join(twice[:3])}")
        by_hash = {key.sha256: key.name for key in keys}
        same = [key.name for key in keys if by_hash[key.sha256] != key.name]
        if same:
            raise ValueError(f"two names have the same key: {same[0]} and another")
        return keys


class ProtectionConfig(FrozenConfig):
    """Keys and limits of the HTTP API."""

    api_keys_file: str | None = None
    """Absolute path of a YAML file of API keys, on every node that runs an ingress. Null: the environment variable
    ATOM_CLUSTER_API_KEYS_FILE names it; without either nobody needs a key."""
    api_keys_poll_s: float = Field(5.0, gt=0)
    """How often the file is read again. A changed file that cannot be used leaves the keys as they were, and is
    logged."""
    limits: RateLimits = RateLimits()
    """Of each key that sets none of its own; without keys, of all clients together."""
    most_urgent_priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """The lowest priority, which is the most urgent one, that a key of a user may ask for if it sets none of its own.
    At 0 keys may put themselves behind others and not before them. Without keys anybody may ask for any."""
    max_open_requests: int = Field(2048, ge=1)
    """POST requests that one ingress answers at the same time; more are answered with 503 before their bodies are read.
    To be above what engines queue and run, or their queues never fill."""
    max_headers: int = Field(100, ge=10)
    """Most headers of a request; more are answered with 431."""
    max_header_bytes: int = Field(32768, ge=1024)
    """Most bytes of a request's headers and path together; more are answered with 431."""

    @field_validator("api_keys_file")
    @classmethod
    def _is_absolute(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).is_absolute():
            raise ValueError("give an absolute path: processes of a cluster have different working directories")
        return path
