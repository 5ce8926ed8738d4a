"""A serving cluster for large language models on Ray Serve, with prefill and decode on separate accelerators.

`LLMEngine` and `SamplingParams` are imported on first use, so that `import atom_cluster` needs neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atom_cluster.llm_engine import LLMEngine
    from atom_cluster.messages.requests import SamplingParams

__all__ = ["LLMEngine", "SamplingParams", "__version__"]
__version__ = "0.1.0"

_MODULE_BY_NAME = {"LLMEngine": "atom_cluster.llm_engine", "SamplingParams": "atom_cluster.messages.requests"}


def __getattr__(name: str) -> object:
    """Import an exported name when it is first asked for."""
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_BY_NAME[name]), name)


def __dir__() -> list[str]:
    """Exported names, imported or not."""
    return sorted({*globals(), *__all__})
