"""Single tokens and their log probabilities as JSON shows them."""

from __future__ import annotations


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a probability of zero."""
    return max(logprob, -9999.0)


def token_text(value: bytes) -> str:
    """Text of a token; one that is not whole characters is written as `bytes:\\xNN...`, so that no two look alike."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)
