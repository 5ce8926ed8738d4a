from __future__ import annotations

import msgspec
import pytest

from atom_cluster.engine.admission import make_request
from atom_cluster.engine.protocols import RunnerInfo
from atom_cluster.engine.request import Request
from atom_cluster.errors import ContextLengthExceeded, InvalidRequest
from atom_cluster.messages.requests import EngineRequest, SamplingParams
from atom_cluster.messages.transfer import KvPlacement, PrefillOrder
from tests.factories import make_message

INFO = RunnerInfo(num_blocks=10, block_size=4, max_num_requests=4, max_model_len=32, vocab_size=1000)


def admit(message: EngineRequest | PrefillOrder, info: RunnerInfo = INFO) -> Request:
    return make_request(message, client="client", info=info, order=3, now_s=1.5)


def order(num_tokens: int, max_tokens: int) -> PrefillOrder:
    return PrefillOrder(
        ticket_id="t",
        request_id="r",
        token_ids=tuple(range(num_tokens)),
        sampling=SamplingParams(seed=0, max_tokens=max_tokens),
        eos_token_ids=(2,),
        num_tokens_held=0,
        lease_s=1.0,
        fingerprint="",
        fingerprint_fields={},
        placement=KvPlacement(4, 1),
    )


def test_a_request_keeps_what_the_message_says() -> None:
    request = admit(make_message("r", 10, 5, eos=(2,), priority=4))
    assert (request.num_prompt, request.sampling.max_tokens, request.eos) == (10, 5, frozenset({2}))
    assert (request.priority, request.order, request.arrived_s, request.ticket_id) == (4, 3, 1.5, None)


@pytest.mark.parametrize(("max_tokens", "expected"), [(22, 22), (23, 22), (10**9, 22), (None, 22)])
def test_output_is_cut_to_what_the_context_leaves(max_tokens: int | None, expected: int) -> None:
    message = make_message("r", 10)
    sampling = msgspec.structs.replace(message.sampling, max_tokens=max_tokens)
    assert admit(msgspec.structs.replace(message, sampling=sampling)).sampling.max_tokens == expected


def test_a_prompt_that_fills_the_context_is_refused_and_one_that_leaves_a_token_is_not() -> None:
    assert admit(make_message("r", 31)).sampling.max_tokens == 1
    with pytest.raises(ContextLengthExceeded, match="the prompt has 32 tokens, the context holds 32"):
        admit(make_message("r", 32))


def test_output_is_cut_to_what_the_cache_leaves_and_a_prompt_that_fills_it_is_refused() -> None:
    info = RunnerInfo(num_blocks=3, block_size=4, max_num_requests=4, max_model_len=32, vocab_size=1000)
    assert admit(make_message("r", 10, 2), info).sampling.max_tokens == 2
    assert admit(make_message("r", 10, 3), info).sampling.max_tokens == 2
    with pytest.raises(ContextLengthExceeded, match="the KV cache holds 12"):
        admit(make_message("r", 12), info)


@pytest.mark.parametrize("prompt", [(), (1, 1000), (1, -1)])
def test_prompts_that_no_model_understands_are_refused(prompt: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        admit(make_message("r", prompt))
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("token_id", [-1, 1000, 2**31])
@pytest.mark.parametrize("field", ["stop_token_ids", "logit_bias"])
def test_sampling_that_names_no_token_of_the_model_is_refused(field: str, token_id: int) -> None:
    message = make_message("r")
    value = ((999, 1.0), (token_id, 1.0)) if field == "logit_bias" else (999, token_id)
    sampling = msgspec.structs.replace(message.sampling, **{field: value})
    with pytest.raises(InvalidRequest) as caught:
        admit(msgspec.structs.replace(message, sampling=sampling))
    assert caught.value.param == field


@pytest.mark.parametrize("changes", [{"seed": None}, {"n": 2}, {"temperature": -1.0}])
def test_sampling_that_an_engine_cannot_do_is_refused(changes: dict[str, float | None]) -> None:
    message = make_message("r")
    with pytest.raises(InvalidRequest):
        admit(msgspec.structs.replace(message, sampling=msgspec.structs.replace(message.sampling, **changes)))


def test_an_order_is_for_one_token_and_needs_room_for_the_prompt_only() -> None:
    info = RunnerInfo(num_blocks=3, block_size=4, max_num_requests=4, max_model_len=32, vocab_size=1000)
    request = admit(order(11, max_tokens=20), info)
    assert (request.sampling.max_tokens, request.ticket_id) == (1, "t")
    with pytest.raises(ContextLengthExceeded):
        admit(order(12, max_tokens=20), info)


def test_emitted_tokens_are_the_output_s_first_and_count_against_its_length() -> None:
    message = msgspec.structs.replace(make_message("r", 10, 5), emitted=(7, 8))
    request = admit(message)
    assert (request.num_prompt, request.num_output, request.num_new, request.num_initial) == (10, 2, 0, 12)
    assert request.tokens[10:] == [7, 8] and request.sampling.max_tokens == 5


def test_an_order_with_emitted_tokens_is_for_one_more() -> None:
    request = admit(msgspec.structs.replace(order(10, max_tokens=20), emitted=(7, 8)))
    assert (request.num_prompt, request.num_replayed, request.sampling.max_tokens) == (10, 2, 3)
    info = RunnerInfo(num_blocks=3, block_size=4, max_num_requests=4, max_model_len=32, vocab_size=1000)
    with pytest.raises(ContextLengthExceeded, match="has 12 tokens"):
        admit(msgspec.structs.replace(order(10, max_tokens=20), emitted=(7, 8)), info)


def test_emitted_tokens_that_fill_the_room_are_all_there_will_be() -> None:
    info = RunnerInfo(num_blocks=3, block_size=4, max_num_requests=4, max_model_len=32, vocab_size=1000)
    request = admit(msgspec.structs.replace(make_message("r", 10, 9), emitted=(7, 8)), info)
    assert request.num_output == request.sampling.max_tokens == 2


@pytest.mark.parametrize("emitted", [(1000,), (3, -1)])
def test_emitted_tokens_that_no_model_says_are_refused(emitted: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        admit(msgspec.structs.replace(make_message("r"), emitted=emitted))
    assert caught.value.param == "emitted"
