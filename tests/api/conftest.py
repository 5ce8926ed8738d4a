"""Fixtures of the API tests: a tiny model, an app over a fake generator, a client, and a real HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import uvicorn
from fastapi import FastAPI

from atom_cluster.api.answers.grammars import GrammarService
from atom_cluster.api.routes import create_app
from atom_cluster.api.text.model_files import ServedModel
from atom_cluster.api.text.tokenizer import Tokenizer, TokenizerService
from atom_cluster.config.serving import ApiConfig
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.structured.compiler import GrammarCompiler
from tests.api.fake_generator import FakeGenerator, Script
from tests.api.tiny_tokenizers import VOCAB_SIZE, byte_level, write_model_directory

MODEL = "tiny"
Serve = Callable[[FastAPI], Awaitable[str]]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level())


@pytest.fixture
def service(model_directory: Path) -> Iterator[TokenizerService]:
    service = TokenizerService.from_directory(model_directory)
    yield service
    service.close()


def service_of(model_directory: Path, limits: ApiConfig) -> GrammarService:
    compiler = GrammarCompiler.for_model(model_directory, VOCAB_SIZE)
    return GrammarService(compiler, timeout_s=limits.grammar_timeout_s)


class Api:
    """An app over a fake generator, and what the tests look at."""

    def __init__(self, model_directory: Path, service: TokenizerService, script: Script, limits: ApiConfig) -> None:
        self.generator = FakeGenerator(script)
        self.metrics = MemoryMetrics()
        self.parts: dict[str, Any] = {
            "generator": self.generator,
            "tokenizer": service,
            "model": ServedModel.from_directory(model_directory, served_name=MODEL),
            "limits": limits,
            "metrics": self.metrics,
            "grammars": service_of(model_directory, limits),
        }
        self.app: FastAPI = create_app(**self.parts)

    def client(self, *, raises: bool = True) -> httpx.AsyncClient:
        """`raises`: what the app raises behind its answer of 500 is raised here too."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=raises)
        return httpx.AsyncClient(transport=transport, base_url="http://api")


@pytest.fixture
def make_api(model_directory: Path, service: TokenizerService) -> Callable[..., Api]:
    def make(script: Script, **limits: object) -> Api:
        return Api(model_directory, service, script, ApiConfig.model_validate(limits))

    return make


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Serve]:
    """Run an app in a real server on a free loopback port; gives its base URL."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(app: FastAPI) -> str:
            listener = socket.create_server(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
            task = asyncio.create_task(server.serve(sockets=[listener]))

            async def stop() -> None:
                server.should_exit = True
                await task
                listener.close()

            stack.push_async_callback(stop)
            while not server.started:
                await asyncio.sleep(0.01)
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield start
