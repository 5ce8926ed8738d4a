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
    another engine gets one token, since what comes after is that engine's.
    """
    sampling = message.sampling
    validate_sampling(sampling)
    if sampling.seed is None or sampling.n != 1:
        raise InvalidRequest("an engine needs an integer seed and n == 1", param="seed")
    is_order = isinstance(message, PrefillOrder)
    max_tokens = _check_lengths(message.token_ids, 1 if is_order else sampling.max_tokens, info)
    return Request(
        request_id=message.request_id,
        client=client,
        tokens=list(message.token_ids),
        num_prompt=len(message.token_ids),
        sampling=msgspec.structs.replace(sampling, max_tokens=max_tokens),
        eos=frozenset(message.eos_token_ids),
        priority=message.priority,
        arrived_s=now_s,
        order=order,
        ticket_id=message.ticket_id if isinstance(message, PrefillOrder) else None,
    )


def _check_lengths(token_ids: tuple[int, ...], max_tokens: int | None, info: RunnerInfo) -> int:
    """Output tokens that there is room for, in the model's context and in the KV cache."""
    num_prompt, limit = len(token_ids), min(info.max_model_len, info.max_request_tokens)
    if not num_prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if max(token_ids) >= info.vocab_size or min(token_ids) < 0:
        raise InvalidRequest(f"token ids must be in [0, {info.vocab_size})", param="prompt")
    if num_prompt >= limit:
        what = "context" if limit == info.max_model_len else "KV cache"
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt} tokens, the {what} holds {limit} with at least one of output", param="prompt"
        )
    return min(max_tokens or limit, limit - num_prompt)
