"""A checked request body becomes sampling parameters, and those the inputs of each output.

Applies the limits of `ApiConfig`, the model's recommended values, and the rules between fields. Every error names the
field as the client spelt it. Ranges of single fields are in `api/openai/requests.py`; they are those that
`SamplingParams` documents. Knows nothing of HTTP.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from atom_cluster.api.generator import GenerateInput
from atom_cluster.api.http.request_terms import RequestTerms
from atom_cluster.api.openai.requests import ChatCompletionRequest, CompletionRequest, GenerationFields
from atom_cluster.api.openai.tools import check_tools
from atom_cluster.api.text.model_files import ServedModel
from atom_cluster.config.serving import ApiConfig
from atom_cluster.errors import ContextLengthExceeded, InvalidRequest, UnknownModel
from atom_cluster.messages.requests import SamplingParams

ValueT = TypeVar("ValueT", int, float)

_SEED_MASK = 2**63 - 1
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
"""One way to write each, so that none is there twice."""


def check_request(request: GenerationFields, *, model: ServedModel, limits: ApiConfig) -> None:
    """Raise `InvalidRequest` or `UnknownModel` for what can be told without the prompt's length."""
    if request.model != model.name:
        raise UnknownModel(f"the model {request.model[:100]!r} is not served here", param="model")
    _at_most(request.n, limits.max_n, "n")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("`stream_options` needs `stream` to be true", param="stream_options")
    _check_prompt_logprobs(request, limits)
    _check_stops(request, model, limits)
    _check_biases(request.logit_bias or {}, model, limits)
    if isinstance(request, ChatCompletionRequest):
        _check_chat(request, limits)
    elif isinstance(request, CompletionRequest):
        _check_completion(request, model, limits)


def sampling_params(request: GenerationFields, *, model: ServedModel) -> SamplingParams:
    """Parameters common to all outputs of a request, with the model's recommendations where it names none.

    `max_tokens` None means what the context leaves; `seed` None means a random one.
    """
    defaults = model.defaults
    return SamplingParams(
        temperature=_first(request.temperature, defaults.temperature, 1.0),
        top_k=max(0, _first(request.top_k, defaults.top_k, 0)),
        top_p=_first(request.top_p, defaults.top_p, 1.0),
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=_first(request.presence_penalty, None, 0.0),
        frequency_penalty=_first(request.frequency_penalty, None, 0.0),
        seed=request.seed,
        max_tokens=_max_tokens(request),
        min_tokens=request.min_tokens or 0,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        stop_strings=tuple(request.stop or ()),
        ignore_eos=bool(request.ignore_eos),
        logprobs=_num_logprobs(request),
        prompt_logprobs=_num_prompt_logprobs(request),
        n=request.n or 1,
        logit_bias=tuple((int(token_id), bias) for token_id, bias in (request.logit_bias or {}).items()),
    )


def output_inputs(
    params: SamplingParams,
    prompts: Sequence[tuple[int, ...]],
    *,
    answer_id: str,
    model: ServedModel,
    limits: ApiConfig,
    prompt_param: str,
    terms: RequestTerms,
) -> list[GenerateInput]:
    """One input per output: those of the first prompt, then those of the second, and so on.

    The i-th output of a prompt uses seed + i. Raises `ContextLengthExceeded` when prompt plus `max_tokens` exceed the
    context, and `InvalidRequest` for an empty prompt or more log probabilities of prompts than one answer may have; all
    name `prompt_param`.
    """
    _check_num_scores(params, prompts, limits=limits, prompt_param=prompt_param)
    inputs: list[GenerateInput] = []
    for prompt in prompts:
        resolved = _fit_context(params, len(prompt), model=model, limits=limits, prompt_param=prompt_param)
        seed = random.getrandbits(63) if params.seed is None else params.seed
        for offset in range(params.n):
            sampling = msgspec.structs.replace(resolved, seed=(seed + offset) & _SEED_MASK, n=1, stop_strings=())
            inputs.append(
                GenerateInput(
                    request_id=f"{answer_id}-{len(inputs)}",
                    token_ids=prompt,
                    sampling=sampling,
                    priority=terms.priority,
                    deadline=terms.deadline,
                )
            )
    return inputs


def _fit_context(
    params: SamplingParams, num_prompt_tokens: int, *, model: ServedModel, limits: ApiConfig, prompt_param: str
) -> SamplingParams:
    if num_prompt_tokens == 0:
        raise InvalidRequest("the prompt is empty", param=prompt_param)
    longest = limits.max_prompt_tokens
    if longest is not None and num_prompt_tokens > longest:
        raise ContextLengthExceeded(
            f"prompts have at most {longest} tokens here; this one has {num_prompt_tokens}", param=prompt_param
        )
    room = model.max_model_len - num_prompt_tokens
    wanted = params.max_tokens
    if room < (1 if wanted is None else wanted):
        detail = f"{num_prompt_tokens} tokens of prompt" + (f" and {wanted} of output" if wanted else "")
        raise ContextLengthExceeded(
            f"the model's context holds {model.max_model_len} tokens; the request has {detail}", param=prompt_param
        )
    max_tokens = min(room, limits.default_max_tokens or room) if wanted is None else wanted
    if params.min_tokens > max_tokens:
        raise InvalidRequest(f"`min_tokens` is larger than the {max_tokens} output tokens allowed", param="min_tokens")
    return msgspec.structs.replace(params, max_tokens=max_tokens)


def _check_num_scores(
    params: SamplingParams, prompts: Sequence[tuple[int, ...]], *, limits: ApiConfig, prompt_param: str
) -> None:
    if params.prompt_logprobs is None:
        return
    num_scores = (1 + params.prompt_logprobs) * params.n * sum(len(prompt) for prompt in prompts)
    if num_scores > limits.max_prompt_scores:
        raise InvalidRequest(
            f"an answer has at most {limits.max_prompt_scores} log probabilities of prompt tokens and their "
            f"alternatives; this one would have {num_scores}",
            param=prompt_param,
        )


def _check_prompt_logprobs(request: GenerationFields, limits: ApiConfig) -> None:
    _at_most(request.prompt_logprobs, limits.max_logprobs, "prompt_logprobs")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("`prompt_logprobs` cannot be sent in a stream", param="prompt_logprobs")
    if _max_tokens(request) == 0 and _num_prompt_logprobs(request) is None:
        raise InvalidRequest("`max_tokens` is at least 1 without `prompt_logprobs` or `echo`", param="max_tokens")


def _check_stops(request: GenerationFields, model: ServedModel, limits: ApiConfig) -> None:
    stops = request.stop or []
    if len(stops) > limits.max_stop_strings:
        raise InvalidRequest(f"at most {limits.max_stop_strings} stop strings are allowed", param="stop")
    if any(len(text) > limits.max_stop_chars for text in stops):
        raise InvalidRequest(f"a stop string has at most {limits.max_stop_chars} characters", param="stop")
    _check_token_ids(request.stop_token_ids or (), model, "stop_token_ids")


def _check_biases(biases: Mapping[str, float], model: ServedModel, limits: ApiConfig) -> None:
    if len(biases) > limits.max_logit_biases:
        raise InvalidRequest(f"`logit_bias` has at most {limits.max_logit_biases} entries", param="logit_bias")
    for key in biases:
        if not _TOKEN_ID.fullmatch(key) or int(key) >= model.vocab_size:
            detail = f"keys are token ids from 0 to {model.vocab_size - 1}, and not {key[:40]!r}"
            raise InvalidRequest(f"`logit_bias`: {detail}", param="logit_bias")


def _check_chat(request: ChatCompletionRequest, limits: ApiConfig) -> None:
    check_tools(request, limits)
    if request.top_logprobs is not None:
        if not request.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
        _at_most(request.top_logprobs, limits.max_logprobs, "top_logprobs")
    if None not in (request.max_tokens, request.max_completion_tokens) and (
        request.max_tokens != request.max_completion_tokens
    ):
        raise InvalidRequest("`max_tokens` and `max_completion_tokens` differ; give one", param="max_tokens")


def _check_completion(request: CompletionRequest, model: ServedModel, limits: ApiConfig) -> None:
    _at_most(request.logprobs, limits.max_logprobs, "logprobs")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise InvalidRequest("this server supports `best_of` only equal to `n`", param="best_of")
    if len(request.prompt) > limits.max_prompts:
        raise InvalidRequest(f"at most {limits.max_prompts} prompts are allowed in one request", param="prompt")
    for prompt in request.prompt:
        if not isinstance(prompt, str):
            _check_token_ids(prompt, model, "prompt")


def _check_token_ids(token_ids: Sequence[int], model: ServedModel, param: str) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < model.vocab_size):
        raise InvalidRequest(f"token ids are from 0 to {model.vocab_size - 1}", param=param)


def _at_most(value: int | None, limit: int, param: str) -> None:
    if value is not None and value > limit:
        raise InvalidRequest(f"`{param}` is at most {limit}", param=param)


def _first(given: ValueT | None, recommended: ValueT | None, usual: ValueT) -> ValueT:
    if given is not None:
        return given
    return usual if recommended is None else recommended


def _max_tokens(request: GenerationFields) -> int | None:
    newer = request.max_completion_tokens if isinstance(request, ChatCompletionRequest) else None
    return request.max_tokens if newer is None else newer


def _num_logprobs(request: GenerationFields) -> int | None:
    if isinstance(request, ChatCompletionRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs if isinstance(request, CompletionRequest) else None


def _num_prompt_logprobs(request: GenerationFields) -> int | None:
    """The most that some part of the answer needs. A prompt that is repeated and nothing else is scored all the same:
    what an engine does for a request without output is to score its prompt."""
    wanted = [] if request.prompt_logprobs is None else [request.prompt_logprobs]
    if (
        isinstance(request, CompletionRequest)
        and request.echo
        and (request.logprobs is not None or request.max_tokens == 0)
    ):
        wanted.append(request.logprobs or 0)
    return max(wanted, default=None)
