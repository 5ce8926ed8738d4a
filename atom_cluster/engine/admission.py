"""From a message to a request, or to the error that says which of its fields cannot be served here."""

from __future__ import annotations

import msgspec

from atom_cluster.engine.protocols import RunnerInfo
from atom_cluster.engine.request import Request
from atom_cluster.engine.stopping import validate_sampling
from atom_cluster.errors import ContextLengthExceeded, InvalidRequest
from atom_cluster.messages.requests import EngineRequest
from atom_cluster.messages.transfer import PrefillOrder


def make_request(
    message: EngineRequest | PrefillOrder, *, client: str, info: RunnerInfo, order: int, now_s: float
) -> Request:
    """A request that this engine can finish, whatever else it has to do.

    Raises `InvalidRequest` or `ContextLengthExceeded`. `max_tokens` is cut to what the context leaves; a request for
    another engine gets one new token, since what comes after is that engine's.
    """
    sampling = message.sampling
    validate_sampling(sampling)
    if sampling.seed is None or sampling.n != 1:
        raise InvalidRequest("an engine needs an integer seed and n == 1", param="seed")
    if sampling.grammar is not None and not (message.eos_token_ids or sampling.stop_token_ids):
        raise InvalidRequest("the model has no end token, which an output with a grammar needs", param="grammar")
    if sampling.prompt_logprobs is not None and isinstance(message, PrefillOrder):
        raise InvalidRequest("a prompt is scored where its output is generated", param="prompt_logprobs")
    max_tokens = _check_lengths(message, info)
    _check_token_ids(message, info.vocab_size)
    return Request(
        request_id=message.request_id,
        client_request_id=message.client_request_id,
        client=client,
        tokens=[*message.token_ids, *message.emitted],
        num_prompt=len(message.token_ids),
        sampling=msgspec.structs.replace(sampling, max_tokens=max_tokens),
        eos=frozenset(message.eos_token_ids),
        priority=message.priority,
        arrived_s=now_s,
        order=order,
        ticket_id=message.ticket_id if isinstance(message, PrefillOrder) else None,
        num_replayed=len(message.emitted),
    )


def _check_lengths(message: EngineRequest | PrefillOrder, info: RunnerInfo) -> int:
    """Output tokens that there is room for, in the model's context and in the KV cache."""
    num_prompt, limit = len(message.token_ids), min(info.max_model_len, info.max_request_tokens)
    if not num_prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    is_order = isinstance(message, PrefillOrder)
    # A request whose output fills the room already ends with that; an order must get its token.
    num_known = num_prompt + len(message.emitted) if is_order else num_prompt
    wanted = message.sampling.max_tokens
    if num_known > limit or (num_known == limit and wanted != 0):
        what = "context" if limit == info.max_model_len else "KV cache"
        raise ContextLengthExceeded(
            f"the prompt has {num_known} tokens, the {what} holds {limit} with at least one of output", param="prompt"
        )
    max_tokens = len(message.emitted) + 1 if is_order else wanted
    return min(limit if max_tokens is None else max_tokens, limit - num_prompt)


def _check_token_ids(message: EngineRequest | PrefillOrder, vocab_size: int) -> None:
    """Others would be an error of the whole step: the runner looks them up, or keeps them in 32 bits."""
    named = {
        "prompt": message.token_ids,
        "emitted": message.emitted,
        "stop_token_ids": message.sampling.stop_token_ids,
        "logit_bias": [token_id for token_id, _ in message.sampling.logit_bias],
    }
    for name, token_ids in named.items():
        if max(token_ids, default=0) >= vocab_size or min(token_ids, default=0) < 0:
            raise InvalidRequest(f"{name}: token ids must be in [0, {vocab_size})", param=name)
