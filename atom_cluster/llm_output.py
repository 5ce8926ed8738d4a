"""What `LLMEngine` gives back, and how one output is put together from token deltas. Knows no engine and no model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from typing_extensions import NotRequired, TypedDict

from atom_cluster.api.text.tokenizer import IncrementalDetokenizer
from atom_cluster.messages.requests import FinishReason, PromptScore, RequestError, TokenDelta, TokenLogprobs


class GenerationOutput(TypedDict):
    """One finished output. Times are in seconds."""

    request_id: str
    text: str
    """Empty for a model without a tokenizer."""
    token_ids: list[int]
    finish_reason: FinishReason
    num_tokens_input: int
    num_tokens_output: int
    num_cached_tokens: int
    """Prompt tokens whose KV was found in the prefix cache."""
    latency: float
    """From adding the request to its last token."""
    ttft: float
    """From adding the request to its first token."""
    tpot: float
    """Mean time per output token after the first; 0 for a single token."""
    logprobs: NotRequired[list[TokenLogprobs]]
    """One per output token, when asked for."""
    prompt_logprobs: NotRequired[list[PromptScore | None]]
    """One per prompt token, None for the first, when asked for."""
    error: NotRequired[RequestError]
    """With `finish_reason` error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedOutput:
    """New text and tokens of one request."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


StreamCallback = Callable[[StreamedOutput], None]


class OutputBuilder:
    """Collects the deltas of one request."""

    def __init__(
        self,
        request_id: str,
        *,
        num_prompt_tokens: int,
        detokenizer: IncrementalDetokenizer | None,
        stream_callback: StreamCallback | None,
    ) -> None:
        self._request_id = request_id
        self._num_prompt_tokens = num_prompt_tokens
        self._detokenizer = detokenizer
        self._stream_callback = stream_callback
        self._token_ids: list[int] = []
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None
        self._prompt_logprobs: list[PromptScore | None] | None = None
        self._num_cached_tokens = 0
        self._error: RequestError | None = None
        self._added_s = time.perf_counter()
        self._first_token_s: float | None = None
        self._last_token_s = self._added_s
        self.finish_reason: FinishReason | None = None
        """Set by the last delta, or by a stop string before it."""

    def add(self, delta: TokenDelta) -> None:
        """Take the request's next delta; nothing after `finish_reason` is set."""
        self._error = delta.error
        self._num_cached_tokens = delta.num_cached_tokens or self._num_cached_tokens
        token_ids, text, is_stopped = self._detokenize(delta.token_ids)
        self.finish_reason = "stop" if is_stopped else delta.finish_reason
        if self.finish_reason is not None and self._detokenizer is not None:
            text += self._detokenizer.flush()
        if token_ids:
            self._last_token_s = time.perf_counter()
            self._first_token_s = self._first_token_s or self._last_token_s
        self._token_ids += token_ids
        self._pieces.append(text)
        if delta.logprobs is not None:
            self._logprobs = [*(self._logprobs or []), *delta.logprobs[: len(token_ids)]]
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = list(delta.prompt_logprobs)
        if self._stream_callback is not None:
            self._stream_callback(
                StreamedOutput(
                    request_id=self._request_id, text=text, token_ids=token_ids, finish_reason=self.finish_reason
                )
            )

    def finish(self) -> GenerationOutput:
        """The output, once `finish_reason` is set."""
        assert self.finish_reason is not None, "the output has not ended"
        first_token_s = self._first_token_s or self._last_token_s
        num_tokens = len(self._token_ids)
        output = GenerationOutput(
            request_id=self._request_id,
            text="".join(self._pieces),
            token_ids=self._token_ids,
            finish_reason=self.finish_reason,
            num_tokens_input=self._num_prompt_tokens,
            num_tokens_output=num_tokens,
            num_cached_tokens=self._num_cached_tokens,
            latency=self._last_token_s - self._added_s,
            ttft=first_token_s - self._added_s,
            tpot=(self._last_token_s - first_token_s) / (num_tokens - 1) if num_tokens > 1 else 0.0,
        )
        if self._logprobs is not None:
            output["logprobs"] = self._logprobs
        if self._prompt_logprobs is not None:
            output["prompt_logprobs"] = self._prompt_logprobs
        if self._error is not None:
            output["error"] = self._error
        return output

    def _detokenize(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], str, bool]:
        """Tokens up to the end of a stop string, their new text, and whether a stop string was found."""
        if self._detokenizer is None:
            return token_ids, "", False
        num_before = self._detokenizer.num_tokens
        text = self._detokenizer.push(token_ids)
        num_taken = self._detokenizer.num_tokens - num_before
        return token_ids[:num_taken], text, self._detokenizer.matched_stop is not None
