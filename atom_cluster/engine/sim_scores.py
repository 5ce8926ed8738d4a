"""Log probabilities that a simulated runner makes up: behind any tokens the n-th most likely one has 2^-n."""

from __future__ import annotations

import math

from atom_cluster.engine.sim_memory import mix
from atom_cluster.messages.requests import PromptScore, TokenLogprobs, TopLogprob

_SCORE = 0x9E3779B97F4A7C15
_MAX_RANK = 8


def made_up_logprobs(token_id: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    """Of a sampled token, which is the most likely one."""
    return TokenLogprobs(_logprob(1), _top(token_id, num_top, vocab_size))


def made_up_score(digest: int, token_id: int, num_top: int, vocab_size: int) -> PromptScore:
    """Of a prompt token behind those with this digest: it ranks somewhere from 1 to 8, always in the same place."""
    rank = 1 + mix(digest, _SCORE) % min(_MAX_RANK, vocab_size)
    return PromptScore(_logprob(rank), rank, _top((token_id - rank + 1) % vocab_size, num_top, vocab_size))


def _logprob(rank: int) -> float:
    return -rank * math.log(2)


def _top(first_id: int, num_top: int, vocab_size: int) -> tuple[TopLogprob, ...]:
    """Ids in order from the most likely one on."""
    ranks = range(1, min(num_top, vocab_size) + 1)
    return tuple(TopLogprob((first_id + rank - 1) % vocab_size, _logprob(rank)) for rank in ranks)
