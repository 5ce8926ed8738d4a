"""Which layers a list of a quantization config means. Knows no formats."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

_REGEX = "re:"


def is_listed(name: str, patterns: Iterable[str]) -> bool:
    """Whether any pattern means the layer with this name, or something that it is part of."""
    return any(is_meant(name, pattern) for pattern in patterns)


def is_meant(name: str, pattern: str) -> bool:
    """Whether a pattern means the layer.

    `re:` starts a regular expression that names begin with. All else is one or several whole components of a name, with
    wildcards: `lm_head`, `mlp.gate`, `model.layers.*.self_attn`; so `mlp.gate` does not mean `mlp.gate_proj`.
    """
    if pattern.startswith(_REGEX):
        return re.match(pattern.removeprefix(_REGEX), name) is not None
    wanted, parts = pattern.strip(".").split("."), name.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return fnmatchcase(name, pattern) or any(
        all(fnmatchcase(part, one) for part, one in zip(parts[start:], wanted)) for start in starts
    )
