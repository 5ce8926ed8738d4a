"""Scores of prompts on their way through an engine: whole, once, and where the output is generated."""

from __future__ import annotations

import math

import msgspec
import pytest

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.serving import ApiConfig
from atom_cluster.engine.request import Request
from atom_cluster.errors import InvalidRequest
from atom_cluster.link.codec import MAX_MESSAGE_BYTES, encode
from atom_cluster.messages.requests import EngineRequest, PromptScore, TokenBatch, TokenDelta, TopLogprob
from atom_cluster.messages.transfer import PrefillOrder
from tests.engine.split import CLIENT, make_split
from tests.factories import (
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    assert_clean,
    expected_tokens,
    make_engine,
    make_message,
    make_prompt,
    make_request,
    make_runner,
)
from tests.fakes import ListOutbox, Network, VirtualClock


def scored(message: EngineRequest, num_top: int = 2, max_tokens: int | None = None) -> EngineRequest:
    sampling = msgspec.structs.replace(message.sampling, prompt_logprobs=num_top)
    if max_tokens is not None:
        sampling = msgspec.structs.replace(sampling, max_tokens=max_tokens)
    return msgspec.structs.replace(message, sampling=sampling)


def run(*messages: EngineRequest, budget: int = 64, num_blocks: int = 64) -> list[TokenBatch]:
    """What an engine sends for requests that are there at once."""
    network, outbox = Network(VirtualClock()), ListOutbox()
    engine = make_engine(
        network,
        runner=make_runner(network.clock, num_blocks=num_blocks),
        outbox=outbox,
        scheduler=SchedulerConfig(max_num_batched_tokens=budget),
    )
    for message in messages:
        engine.put(CLIENT, message)
    while engine.step():
        pass
    assert_clean(engine)
    return [sent for _, sent in outbox.sent if isinstance(sent, TokenBatch)]


def deltas_of(batches: list[TokenBatch], request_id: str = "r") -> list[TokenDelta]:
    return [delta for batch in batches for delta in batch.deltas if delta.request_id == request_id]


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_the_first_delta_and_no_other_has_a_score_for_each_prompt_token(budget: int) -> None:
    first, *others = deltas_of(run(scored(make_message("r", 30, 4)), budget=budget))
    assert first.prompt_logprobs is not None and len(first.prompt_logprobs) == 30 and first.prompt_logprobs[0] is None
    assert others and all(delta.prompt_logprobs is None for delta in others)
    assert first.prompt_logprobs == deltas_of(run(scored(make_message("r", 30, 4))))[0].prompt_logprobs


def test_made_up_scores_agree_with_themselves() -> None:
    prompt = make_prompt(30)
    (delta,) = deltas_of(run(scored(make_message("r", prompt, 1), num_top=VOCAB_SIZE)))
    assert delta.prompt_logprobs is not None
    for token_id, score in list(zip(prompt, delta.prompt_logprobs))[1:]:
        assert score is not None
        assert sum(math.exp(top.logprob) for top in score.top) == pytest.approx(1.0)
        assert (score.top[score.rank - 1].token_id, score.top[score.rank - 1].logprob) == (token_id, score.logprob)
    assert len({score.rank for score in delta.prompt_logprobs if score is not None}) > 3


def test_without_output_a_prompt_of_the_whole_context_is_scored() -> None:
    (delta,) = deltas_of(run(scored(make_message("r", MAX_MODEL_LEN, 1), max_tokens=0), num_blocks=128))
    assert (delta.token_ids, delta.finish_reason, delta.first_index) == ((), "length", 0)
    assert delta.prompt_logprobs is not None and len(delta.prompt_logprobs) == MAX_MODEL_LEN
    (refused,) = deltas_of(run(scored(make_message("r", MAX_MODEL_LEN, 1)), num_blocks=128))
    assert refused.error is not None and refused.error.kind == "ContextLengthExceeded"


def test_no_output_without_scores_is_refused() -> None:
    message = make_message("r", 5, 1)
    none = msgspec.structs.replace(message, sampling=msgspec.structs.replace(message.sampling, max_tokens=0))
    (refused,) = deltas_of(run(none))
    assert refused.error is not None and refused.error.param == "max_tokens"


def test_prompts_in_the_cache_are_computed_again_and_others_find_them() -> None:
    prompt = make_prompt(30)
    network, outbox = Network(VirtualClock()), ListOutbox()
    engine = make_engine(network, outbox=outbox)
    for request_id in ("before", "r", "after"):
        message = make_message(request_id, prompt, 3)
        engine.put(CLIENT, scored(message) if request_id == "r" else message)
        while engine.step():
            pass
    batches = [sent for _, sent in outbox.sent if isinstance(sent, TokenBatch)]
    cached = {name: deltas_of(batches, name)[-1].num_cached_tokens for name in ("before", "r", "after")}
    assert cached["before"] == cached["r"] == 0 and cached["after"] > 0
    assert all(len(deltas_of(batches, name)) for name in cached)


def test_a_prompt_is_scored_where_its_output_is_generated() -> None:
    split = make_split()
    split.decode.put(CLIENT, scored(make_message("r", 30, 6, prefill=split.prefill_address)))
    split.network.settle()
    assert not split.network.messages(PrefillOrder)
    assert split.answer().tokens == expected_tokens(make_prompt(30), 6)
    split.assert_clean()


def test_prefill_refuses_an_order_for_scores() -> None:
    """Decode never gives one: it would be work for nothing."""
    split = make_split()

    def alter(source: str, target: str, message: object) -> object:
        if isinstance(message, PrefillOrder):
            sampling = msgspec.structs.replace(message.sampling, prompt_logprobs=0)
            return msgspec.structs.replace(message, sampling=sampling)
        return message

    split.network.alter = alter  # type: ignore[assignment]
    split.send()
    split.network.settle()
    split.assert_right()
    split.assert_clean()


def test_scores_are_long_and_come_in_messages_of_their_own() -> None:
    messages = [make_message(f"r{i}", make_prompt(9, i), 2) for i in range(4)]
    batches = run(messages[0], scored(messages[1]), messages[2], scored(messages[3]))
    first = [batch for batch in batches if any(delta.first_index == 0 for delta in batch.deltas)]
    with_scores = [batch for batch in first if any(delta.prompt_logprobs is not None for delta in batch.deltas)]
    assert [len(batch.deltas) for batch in with_scores] == [1, 1]
    for i in range(4):
        assert [delta.first_index for delta in deltas_of(batches, f"r{i}")] == [0, 1]


@pytest.mark.parametrize("num_top", [0, 20])
def test_the_longest_answer_that_can_be_configured_fits_a_message(num_top: int) -> None:
    (bound,) = (item.le for item in ApiConfig.model_fields["max_prompt_scores"].metadata if hasattr(item, "le"))
    score = PromptScore(-1.5, 200_000, (TopLogprob(200_000, -2.5),) * num_top)
    delta = TokenDelta(request_id="r", first_index=0, prompt_logprobs=(score,) * 1000)
    num_bytes = len(encode(TokenBatch((delta,))))
    assert num_bytes * bound / (1000 * (1 + num_top)) < MAX_MESSAGE_BYTES


def test_scores_from_before_a_preemption_are_kept_and_not_doubled() -> None:
    request = wanting(make_request(1, 10))
    scores = [PromptScore(-float(i), 1) for i in range(1, 10)]
    request.note_prompt_scores(0, scores[:4])
    request.note_prompt_scores(0, scores[:3])
    request.note_prompt_scores(3, scores[3:6])
    request.note_prompt_scores(6, scores[6:])
    assert request.take_prompt_scores() == (None, *scores)
    assert not request.wants_prompt_scores and request.take_prompt_scores() is None


def test_a_gap_in_the_scores_is_found() -> None:
    request = wanting(make_request(1, 10))
    request.note_prompt_scores(2, [PromptScore(-1.0, 1)] * 7)
    with pytest.raises(AssertionError, match="0 scores of 10 tokens"):
        request.take_prompt_scores()


def wanting(request: Request) -> Request:
    request.sampling = msgspec.structs.replace(request.sampling, prompt_logprobs=0)
    return request


def test_a_negative_number_of_alternatives_is_refused() -> None:
    from atom_cluster.engine.stopping import validate_sampling

    with pytest.raises(InvalidRequest) as refused:
        validate_sampling(scored(make_message("r", 5, 1), num_top=-1).sampling)
    assert refused.value.param == "prompt_logprobs"
