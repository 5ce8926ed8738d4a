"""Bodies of POST /start_profile and /stop_profile. Unknown fields are errors."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from atom_cluster.messages.cluster import Role

_MAX_REPLICAS = 1024


class ProfileTarget(BaseModel):
    """Which engines are meant: all of them unless it says otherwise. The body of POST /stop_profile."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    replicas: list[str] | None = Field(default=None, min_length=1, max_length=_MAX_REPLICAS)
    """By name, as /v1/cluster shows them."""
    roles: list[Role] | None = Field(default=None, min_length=1, max_length=3)
    """By what they do."""


class ProfileRequest(ProfileTarget):
    """The body of POST /start_profile."""

    num_steps: int | None = Field(default=None, ge=1, le=100_000)
    """The window ends by itself after so many steps."""
    with_stack: bool | None = None
    """Note the Python stack of each op; None: as configured."""
    record_shapes: bool | None = None
    """Note the shapes that each op gets; None: as configured."""
