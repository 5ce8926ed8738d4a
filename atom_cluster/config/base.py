"""What every configuration class shares: frozen, and an unknown key is refused together with the nearest valid one."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self


class FrozenConfig(BaseModel):
    """Base of all configuration classes. Tuples rather than lists, so frozen means frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_nearest_key(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        unknown = [key for key in data if key not in cls.model_fields] if isinstance(data, dict) else []
        if not unknown:
            return handler(data)
        problems = [_unknown_key(key, data[key], tuple(cls.model_fields)) for key in unknown]
        try:
            handler({key: value for key, value in data.items() if key not in unknown})
        except ValidationError as error:
            # The rest of this level is still checked, so that one run shows all problems of a file.
            problems += [_problem(line["msg"], line["loc"], line["input"]) for line in error.errors()]
        raise ValidationError.from_exception_data(cls.__name__, problems)


def nearest(key: str, valid: tuple[str, ...]) -> str:
    """`; did you mean ...?` for the valid key most like `key`, or the list of valid keys when none is close."""
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else f"; valid keys: {', '.join(valid)}"


def _unknown_key(key: Any, value: Any, valid: tuple[str, ...]) -> InitErrorDetails:
    return _problem(f"unknown key{nearest(str(key), valid)}", (str(key),), value)


def _problem(message: str, location: tuple[int | str, ...], value: Any) -> InitErrorDetails:
    # The message travels as a value: it may contain braces, which a template would try to fill.
    kind = PydanticCustomError("config", "{message}", {"message": message})
    return InitErrorDetails(type=kind, loc=location, input=value)
