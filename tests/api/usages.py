"""Counts of answers, for tests of answer formats."""

from __future__ import annotations

from atom_cluster.api.openai.wire import CompletionTokensDetails, PromptTokensDetails, Usage


def usage_of(*, prompt: int = 0, completion: int = 0, cached: int = 0, reasoning: int = 0) -> Usage:
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning),
        ttft_s=0.0,
        tpot_s=0.0,
        latency_s=0.0,
    )
