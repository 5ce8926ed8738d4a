from __future__ import annotations

from collections.abc import Callable

import pytest

from atom_cluster.api.operating.profile_types import ProfileRequest, ProfileTarget
from atom_cluster.errors import ProfileRefused
from tests.api.conftest import Api

MakeApi = Callable[..., Api]


@pytest.fixture
def api(make_api: MakeApi) -> Api:
    return make_api(lambda request: [])


async def test_windows_are_started_and_stopped_with_the_options_of_the_body(api: Api) -> None:
    options = {"roles": ["decode"], "num_steps": 3, "with_stack": True}
    async with api.client() as client:
        started = await client.post("/start_profile", json=options)
        stopped = await client.post("/stop_profile", json={"replicas": ["decode-1"]})
    assert started.json() == stopped.json() == {"replicas": [{"replica": "decode-1"}]}
    assert api.generator.profile_calls == [
        ProfileRequest(roles=["decode"], num_steps=3, with_stack=True),
        ProfileTarget(replicas=["decode-1"]),
    ]


async def test_the_body_may_be_left_out(api: Api) -> None:
    async with api.client() as client:
        assert (await client.post("/start_profile")).status_code == 200
        assert (await client.post("/stop_profile")).status_code == 200
    assert api.generator.profile_calls == [ProfileRequest(), ProfileTarget()]


async def test_a_generation_request_as_load_generators_send_it_says_nothing(api: Api) -> None:
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 5, "stream": True, "ignore_eos": True}
    async with api.client() as client:
        assert (await client.post("/start_profile", json=body)).status_code == 200
        assert (await client.post("/stop_profile", json=body)).status_code == 200
        assert (await client.post("/start_profile", json={"prompt": "hi"})).status_code == 400
    assert api.generator.profile_calls == [ProfileRequest(), ProfileTarget()]


async def test_a_refusal_is_a_conflict_with_its_reason(api: Api) -> None:
    api.generator.profile_error = ProfileRefused("decode-1: no window is open: start one first")
    async with api.client() as client:
        answer = await client.post("/stop_profile")
    assert answer.status_code == 409
    assert answer.json()["error"] == {
        "message": "decode-1: no window is open: start one first",
        "type": "invalid_request_error",
        "param": None,
        "code": "profile_refused",
    }


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/start_profile", {"num_steps": 0}, "num_steps"),
        ("/start_profile", {"roles": ["router"]}, "roles[0]"),
        ("/start_profile", {"replicas": []}, "replicas"),
        ("/start_profile", {"with_stacks": True}, "with_stacks"),
        ("/stop_profile", {"num_steps": 1}, "num_steps"),
    ],
)
async def test_a_bad_field_is_refused_by_name(api: Api, path: str, body: dict[str, object], param: str) -> None:
    async with api.client() as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert api.generator.profile_calls == []
