"""From request bodies to the inputs of single outputs."""

from __future__ import annotations

import pytest

from atom_cluster.api.http.request_body import validate
from atom_cluster.api.http.request_terms import RequestTerms
from atom_cluster.api.openai.requests import ChatCompletionRequest, CompletionRequest
from atom_cluster.api.openai.sampling import check_request, output_inputs, sampling_params
from atom_cluster.api.text.model_files import GenerationDefaults, ServedModel
from atom_cluster.config.serving import ApiConfig
from atom_cluster.engine.stopping import validate_sampling
from atom_cluster.errors import ContextLengthExceeded, InvalidRequest, UnknownModel
from atom_cluster.messages.requests import SamplingParams

MODEL = ServedModel(name="m", max_model_len=100, vocab_size=50, defaults=GenerationDefaults(temperature=0.6, top_k=20))


def chat(**fields: object) -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **fields}
    request = validate(ChatCompletionRequest, body)
    check_request(request, model=MODEL, limits=ApiConfig())
    return request


def completion(**fields: object) -> CompletionRequest:
    request = validate(CompletionRequest, {"model": "m", "prompt": "a", **fields})
    check_request(request, model=MODEL, limits=ApiConfig())
    return request


def inputs(request: CompletionRequest, *prompts: tuple[int, ...], limits: ApiConfig | None = None) -> list:
    params = sampling_params(request, model=MODEL)
    terms = RequestTerms(arrived_at_s=0.0)
    limits = limits or ApiConfig()
    return output_inputs(
        params, prompts, answer_id="id", model=MODEL, limits=limits, prompt_param="prompt", terms=terms
    )


def test_request_wins_over_the_model_s_recommendation_which_wins_over_the_usual_value() -> None:
    params = sampling_params(chat(temperature=0, top_k=-1), model=MODEL)
    assert (params.temperature, params.top_k, params.top_p) == (0, 0, 1.0)
    params = sampling_params(chat(), model=MODEL)
    assert (params.temperature, params.top_k) == (0.6, 20)


def test_logprobs_of_both_endpoints_become_a_number_of_alternatives() -> None:
    assert sampling_params(chat(), model=MODEL).logprobs is None
    assert sampling_params(chat(logprobs=True), model=MODEL).logprobs == 0
    assert sampling_params(chat(logprobs=True, top_logprobs=3), model=MODEL).logprobs == 3
    assert sampling_params(completion(logprobs=0), model=MODEL).logprobs == 0


def test_outputs_are_independent_and_reproducible() -> None:
    entries = inputs(completion(n=2, seed=-1, max_tokens=5, stop="x"), (1, 2), (3,))
    assert [entry.request_id for entry in entries] == ["id-0", "id-1", "id-2", "id-3"]
    assert [entry.token_ids for entry in entries] == [(1, 2), (1, 2), (3,), (3,)]
    assert [entry.sampling.seed for entry in entries] == [2**63 - 1, 0, 2**63 - 1, 0]
    assert all(entry.sampling.n == 1 and entry.sampling.stop_strings == () for entry in entries)


def test_without_a_seed_one_is_drawn() -> None:
    seeds = {inputs(completion(), (1,))[0].sampling.seed for _ in range(8)}
    assert None not in seeds and len(seeds) > 1


def test_context_is_filled_to_the_last_token_and_not_beyond() -> None:
    prompt = (1,) * 90
    assert inputs(completion(max_tokens=10), prompt)[0].sampling.max_tokens == 10
    assert inputs(completion(), prompt)[0].sampling.max_tokens == 10
    assert inputs(completion(), prompt, limits=ApiConfig(default_max_tokens=4))[0].sampling.max_tokens == 4
    for request, size in ((completion(max_tokens=11), 90), (completion(), 100), (completion(max_tokens=2**62), 1)):
        with pytest.raises(ContextLengthExceeded) as caught:
            inputs(request, (1,) * size)
        assert caught.value.param == "prompt"


def test_min_tokens_above_what_is_allowed_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens"):
        inputs(completion(min_tokens=6, max_tokens=5), (1,))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 17}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"stop_token_ids": [50]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ],
)
def test_limits_of_chat_name_the_field(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": [[1], [50]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
    ],
)
def test_limits_of_completions_name_the_field(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(**fields)
    assert caught.value.param == param


def test_another_model_is_unknown() -> None:
    with pytest.raises(UnknownModel) as caught:
        check_request(completion().model_copy(update={"model": "x"}), model=MODEL, limits=ApiConfig())
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("field", "lowest", "below", "highest", "above"),
    [
        ("temperature", 0.0, -0.01, 100.0, 100.1),
        ("top_p", 0.001, 0.0, 1.0, 1.01),
        ("min_p", 0.0, -0.01, 1.0, 1.01),
        ("repetition_penalty", 0.01, 0.0, 10.0, 10.1),
        ("presence_penalty", -2.0, -2.1, 2.0, 2.1),
        ("frequency_penalty", -2.0, -2.1, 2.0, 2.1),
    ],
)
def test_ranges_are_those_of_the_engine(field: str, lowest: float, below: float, highest: float, above: float) -> None:
    for value in (lowest, highest):
        validate_sampling(sampling_params(chat(**{field: value}), model=MODEL))
    for value in (below, above):
        with pytest.raises(InvalidRequest) as refused_by_api:
            chat(**{field: value})
        with pytest.raises(InvalidRequest) as refused_by_engine:
            validate_sampling(SamplingParams(**{field: value}))
        assert refused_by_api.value.param == refused_by_engine.value.param == field
