"""Single tokens and their log probabilities as JSON shows them."""

from __future__ import annotations

from collections.abc import Sequence

from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.messages.requests import TopLogprob


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a probability of zero."""
    return max(logprob, -9999.0)


def token_text(value: bytes) -> str:
    """Text of a token; one that is not whole characters is written as `bytes:\\xNN...`, so that no two look alike."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)


def likely_texts(token_id: int, logprob: float, top: Sequence[TopLogprob], tokenizer: Tokenizer) -> dict[str, float]:
    """Log probabilities by text, as completions give them: of the most likely tokens in a place, and of the one there.

    Tokens may have one text, such as a byte and the letter that it is: then the more likely one counts, or the one
    there.
    """
    found: dict[str, float] = {}
    for entry in top:
        found.setdefault(token_text(tokenizer.token_bytes(entry.token_id)), finite(entry.logprob))
    found[token_text(tokenizer.token_bytes(token_id))] = finite(logprob)
    return found
