"""Every field that ATOM's server takes works here or is refused by name; docs/api.md has the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.conftest import MODEL
from tests.api.tool_model import SCHEMA, ToolApi

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi"}
COMMON = {
    "temperature": 0.5,
    "top_k": -1,
    "top_p": 0.9,
    "max_tokens": 5,
    "stop": ["x"],
    "ignore_eos": True,
    "stream": False,
    "seed": 1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "n": 2,
}
CHAT_ONLY = {
    "max_completion_tokens": 5,
    "chat_template_kwargs": {"enable_thinking": True},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "reasoning_effort": "low",
    "thinking": {"type": "enabled", "effort": "low"},
}
REFUSED = {
    "thinking.keep": {"thinking": {"type": "enabled", "keep": "all"}},
    "kv_transfer_params": {"kv_transfer_params": {"do_remote_prefill": True}},
    "data_parallel_rank": {"data_parallel_rank": 0},
    "prompt": {"prompt": "hi"},
}


@pytest.fixture
def tools(tmp_path: Path) -> ToolApi:
    return ToolApi(tmp_path, "ok")


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/v1/chat/completions", CHAT, {**COMMON, **CHAT_ONLY}),
        ("/v1/completions", TEXT, COMMON),
    ],
)
async def test_these_work(tools: ToolApi, path: str, body: dict, fields: dict) -> None:
    async with tools.api.client() as client:
        for name, value in fields.items():
            answer = await client.post(path, json={**body, name: value})
            assert answer.status_code == 200, (name, answer.text)
        whole = {**body, **fields}
        whole.pop("max_completion_tokens", None)
        answer = await client.post(path, json=whole)
    assert answer.status_code == 200, answer.text
    sampling = tools.api.generator.requests[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_tokens) == (0.5, 0, 0.9, 5)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.ignore_eos) == (0.5, 0.5, True)
    assert answer.json()["usage"].keys() >= {"ttft_s", "tpot_s", "latency_s"}
    assert len(answer.json()["choices"]) == 2


async def test_these_are_refused_by_name(tools: ToolApi) -> None:
    async with tools.api.client() as client:
        for name, fields in REFUSED.items():
            answer = await client.post("/v1/chat/completions", json={**CHAT, **fields})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
        answer = await client.post("/v1/completions", json={**TEXT, "kv_transfer_params": {}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "kv_transfer_params")
    assert not tools.api.generator.requests


def test_the_table_names_them_all() -> None:
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
    table = page.partition("| ATOM's field | here |")[2].partition("\n\n")[0]
    for name in (*COMMON, *CHAT_ONLY, "kv_transfer_params", "data_parallel_rank", "prompt", "keep"):
        assert f"`{name}`" in table
