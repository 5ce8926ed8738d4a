"""The API's fixtures, for load tools that are tried against the project's own API, and processes that start fast."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from benchmarks import engines, kv_transfer
from tests.api.conftest import make_api, model_directory, serve, service, tokenizer
from tests.processes import forking

__all__ = ["make_api", "model_directory", "serve", "service", "tokenizer"]


@pytest.fixture(scope="package", autouse=True)
def forked_processes() -> Iterator[None]:
    """Engines and exporters, which a benchmark spawns, need not import torch each."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (engines, kv_transfer):
            patch.setattr(module, "multiprocessing", SimpleNamespace(get_context=lambda _: forking()))
        yield
