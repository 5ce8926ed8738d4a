"""What every configuration class shares: frozen, and unknown keys are refused with the nearest valid key."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenConfig(BaseModel):
    """Base of all configuration classes. Tuples rather than lists, so frozen means frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
