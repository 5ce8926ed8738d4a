"""When an output ends, and which sampling parameters make sense. Knows nothing of scheduling."""

from __future__ import annotations

import math

from atom_cluster.errors import InvalidRequest
from atom_cluster.messages.requests import FinishReason, SamplingParams

_RANGES: tuple[tuple[str, float, float, bool], ...] = (
    ("temperature", 0.0, 100.0, True),
    ("top_p", 0.0, 1.0, False),
    ("min_p", 0.0, 1.0, True),
    ("repetition_penalty", 0.0, 10.0, False),
    ("presence_penalty", -2.0, 2.0, True),
    ("frequency_penalty", -2.0, 2.0, True),
)
"""Name, lowest, highest, and whether the lowest is allowed itself."""

_LEAST: tuple[tuple[str, int], ...] = (
    ("top_k", 0),
    ("max_tokens", 0),
    ("min_tokens", 0),
    ("logprobs", 0),
    ("prompt_logprobs", 0),
    ("n", 1),
)


def validate_sampling(sampling: SamplingParams) -> None:
    """Raise `InvalidRequest` naming the first field that is out of range."""
    for name, low, high, includes_low in _RANGES:
        value = getattr(sampling, name)
        is_above = value >= low if includes_low else value > low
        if not (math.isfinite(value) and is_above and value <= high):
            bracket = "[" if includes_low else "("
            raise InvalidRequest(f"{name} must be in {bracket}{low:g}, {high:g}], and is {value}", param=name)
    for name, least in _LEAST:
        value = getattr(sampling, name)
        if value is not None and value < least:
            raise InvalidRequest(f"{name} must be at least {least}, and is {value}", param=name)
    if sampling.max_tokens == 0 and sampling.prompt_logprobs is None:
        raise InvalidRequest("max_tokens must be at least 1 unless the prompt is to be scored", param="max_tokens")
    if "" in sampling.stop_strings:
        raise InvalidRequest("stop strings must not be empty", param="stop")
    for token_id, bias in sampling.logit_bias:
        if not -100 <= bias <= 100:
            raise InvalidRequest(
                f"the bias of token {token_id} must be in [-100, 100], and is {bias}", param="logit_bias"
            )
    if len({token_id for token_id, _ in sampling.logit_bias}) < len(sampling.logit_bias):
        raise InvalidRequest("a token has at most one bias", param="logit_bias")
    if sampling.grammar is not None and sampling.ignore_eos:
        raise InvalidRequest("an output with a grammar ends where the grammar does", param="ignore_eos")


def finish_reason(
    token_id: int, *, num_output: int, num_known: int, max_model_len: int, sampling: SamplingParams, eos: frozenset[int]
) -> FinishReason | None:
    """Whether an output ends with this token, its `num_output`-th; `num_known` counts prompt and output together.

    Before `min_tokens`, an output with a grammar gets an end token only where it can get nothing else.
    """
    if num_output >= sampling.min_tokens or sampling.grammar is not None:
        if token_id in sampling.stop_token_ids:
            return "stop"
        if token_id in eos and not sampling.ignore_eos:
            return "stop"
    if num_output >= (sampling.max_tokens or max_model_len) or num_known >= max_model_len:
        return "length"
    return None
