"""The API's fixtures, for load tools that are tried against the project's own HTTP API."""

from __future__ import annotations

from tests.api.conftest import make_api, model_directory, serve, service, tokenizer

__all__ = ["make_api", "model_directory", "serve", "service", "tokenizer"]
