"""A prefill and a decode host hand requests over through real sockets, and decode gets along without prefill."""

from __future__ import annotations

import asyncio

import msgspec

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.messages.requests import CancelRequest
from atom_cluster.observability.metrics import KV_TRANSFER_BYTES, KV_TRANSFER_FAILURES
from tests.engine_server.conftest import Client, RunningHost, Stage, eventually, make_settings, make_slow_runner
from tests.factories import expected_tokens, make_message, make_prompt
from tests.fakes import Answer

SMALL_CHUNKS = SchedulerConfig(max_num_batched_tokens=8)
LONG = 80
"""Tokens of a prompt that is published in many parts."""
MOMENT_S = 1.0


async def start_pair(stage: Stage, *, per_prefill_token_s: float = 0.0) -> tuple[RunningHost, RunningHost, Client]:
    """Prefill, whose prompts take as long as told, a decode for which they take no time, and a client."""
    prefill = await stage.host(
        make_slow_runner(per_prefill_token_s=per_prefill_token_s),
        make_settings("prefill", "prefill", scheduler=SMALL_CHUNKS),
    )
    decode = await stage.host(make_slow_runner(), make_settings("decode", "decode"))
    return prefill, decode, await stage.client()


def send(client: Client, pair: tuple[RunningHost, RunningHost], request_id: str, prompt: tuple[int, ...]) -> None:
    prefill, decode = pair
    message = make_message(request_id, prompt, 8, prefill=prefill.card.address)
    assert client.endpoint.send(decode.card.address, message)


async def test_prompts_computed_by_prefill_are_continued_by_decode(stage: Stage) -> None:
    prefill, decode, client = await start_pair(stage)
    prompts = {f"r{number}": make_prompt(20 + 3 * number, seed=number) for number in range(20)}
    for request_id, prompt in prompts.items():
        send(client, (prefill, decode), request_id, prompt)
    for request_id, prompt in prompts.items():
        answer = await client.finished(request_id)
        assert (answer.reason, answer.tokens) == ("length", expected_tokens(prompt, 8))
    assert decode.metrics.value(KV_TRANSFER_BYTES) > 0
    assert prefill.host.status().blocks_by_state["cached"] > 0
    await prefill.idle()
    await decode.idle()


async def test_a_cancelled_handoff_ends_on_both_sides(stage: Stage) -> None:
    prefill, decode, client = await start_pair(stage, per_prefill_token_s=0.02)
    send(client, (prefill, decode), "r", make_prompt(LONG))
    await eventually(lambda: decode.metrics.value(KV_TRANSFER_BYTES) > 0)
    client.endpoint.send("decode", CancelRequest("r"))
    await decode.idle()
    await prefill.idle()
    assert "r" not in client.answers


async def test_decode_computes_the_prompt_itself_when_prefill_goes_away_half_way(stage: Stage) -> None:
    prefill, decode, client = await start_pair(stage, per_prefill_token_s=0.02)
    send(client, (prefill, decode), "r", make_prompt(LONG))
    await eventually(lambda: decode.metrics.value(KV_TRANSFER_BYTES) > 0)
    stage.hosts.remove(prefill)
    await prefill.close()
    answer = await client.finished("r")
    assert (answer.reason, answer.tokens) == ("length", expected_tokens(make_prompt(LONG), 8))
    assert decode.metrics.value(KV_TRANSFER_FAILURES, reason="peer_lost") == 1
    await decode.idle()


async def test_a_prefill_that_is_already_gone_costs_no_answer(stage: Stage) -> None:
    prefill, decode, client = await start_pair(stage)
    stage.hosts.remove(prefill)
    await prefill.close()
    send(client, (prefill, decode), "r", make_prompt(LONG))
    answer = await client.finished("r")
    assert (answer.reason, answer.tokens) == ("length", expected_tokens(make_prompt(LONG), 8))
    await decode.idle()


async def test_a_draining_prefill_sends_prompts_back(stage: Stage) -> None:
    prefill, decode, client = await start_pair(stage)
    prefill.host.begin_drain(5.0)
    send(client, (prefill, decode), "r", make_prompt(LONG))
    answer = await client.finished("r")
    assert (answer.reason, answer.tokens) == ("length", expected_tokens(make_prompt(LONG), 8))
    assert decode.metrics.value(KV_TRANSFER_FAILURES, reason="prefill_failed") == 1


async def test_prefill_is_rid_of_its_tickets_a_moment_after_decode_goes_away(stage: Stage) -> None:
    prefill, decode, client = await start_pair(stage, per_prefill_token_s=0.1)
    send(client, (prefill, decode), "r", make_prompt(LONG))
    await eventually(lambda: prefill.host.status().num_tickets == 1)
    stage.hosts.remove(decode)
    await decode.close()
    await asyncio.wait_for(prefill.idle(), MOMENT_S)
    await eventually(lambda: client.lost == ["decode"])


async def test_both_are_rid_of_a_request_a_moment_after_its_ingress_dies_while_prefill_computes(stage: Stage) -> None:
    prefill, decode, client = await start_pair(stage, per_prefill_token_s=0.1)
    send(client, (prefill, decode), "r", make_prompt(LONG))
    await eventually(lambda: prefill.host.status().num_tickets == 1)
    stage.clients.remove(client)
    await client.endpoint.close()
    await asyncio.wait_for(asyncio.gather(prefill.idle(), decode.idle()), MOMENT_S)


async def test_decode_is_rid_of_a_request_a_moment_after_its_ingress_dies_while_it_decodes(stage: Stage) -> None:
    prefill = await stage.host(settings=make_settings("prefill", "prefill"))
    decode = await stage.host(make_slow_runner(0.02), make_settings("decode", "decode"))
    client = await stage.client()
    message = make_message("r", make_prompt(LONG), 1000, prefill=prefill.card.address)
    assert client.endpoint.send(decode.card.address, message)
    await eventually(lambda: client.num_tokens("r") > 3)
    stage.clients.remove(client)
    await client.endpoint.close()
    await asyncio.wait_for(asyncio.gather(prefill.idle(), decode.idle()), MOMENT_S)


async def test_a_request_goes_on_with_the_next_decode_engine_behind_its_tokens(stage: Stage) -> None:
    prefill = await stage.host(settings=make_settings("prefill", "prefill"))
    first = await stage.host(make_slow_runner(0.1), make_settings("first", "decode"))
    client, prompt = await stage.client(), make_prompt(LONG)
    message = make_message("r", prompt, 16, prefill=prefill.card.address)
    assert client.endpoint.send(first.card.address, message)
    await eventually(lambda: client.num_tokens("r") > 3)
    stage.hosts.remove(first)
    await first.close()
    second = await stage.host(settings=make_settings("second", "decode"))
    tokens = client.answers["r"].tokens
    client.answers["r#2"] = Answer(tokens=list(tokens))
    again = msgspec.structs.replace(message, request_id="r#2", emitted=tuple(tokens))
    assert client.endpoint.send(second.card.address, again)
    answer = await client.finished("r#2")
    assert (answer.reason, answer.tokens) == ("length", expected_tokens(prompt, 16))
    assert 3 < len(tokens) < 16 and second.metrics.value(KV_TRANSFER_BYTES) > 0
    await asyncio.gather(prefill.idle(), second.idle())
