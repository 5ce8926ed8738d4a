"""All outputs of one HTTP request: run them, turn their tokens into pieces, and hand over whatever has arrived.

Each output has a task that reads its generator; whoever writes the answer takes the news of all outputs at once, so a
slow reader gets fewer, larger pieces instead of a backlog. `RunningOutputs` owns the tasks and the generators: leaving
its context closes every iterator, which cancels the requests in the cluster. Knows nothing of OpenAI's formats.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, runtime_checkable

from atom_cluster.api.answers.pieces import PLAIN, OutputParser, Piece, ToolCallBegun, joined, text_of
from atom_cluster.api.generator import GenerateInput, Generator
from atom_cluster.api.openai.wire import WireFinishReason
from atom_cluster.api.text.tokenizer import IncrementalDetokenizer, Tokenizer
from atom_cluster.errors import RequestFailed
from atom_cluster.messages.requests import PromptScore, TokenDelta, TokenLogprobs


class ClientLeftError(Exception):
    """The client closed its connection or takes nothing from it: nobody reads an answer."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One output token with its log probabilities."""

    token_id: int
    logprobs: TokenLogprobs
    text_offset: int
    """Characters of output before this token."""


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """An output's prompt and how likely its tokens are."""

    token_ids: tuple[int, ...]
    scores: tuple[PromptScore | None, ...]
    """One per token, None for the first."""


@dataclass(slots=True)
class OutputNews:
    """What an output has produced since it was last asked."""

    index: int
    pieces: list[Piece] = field(default_factory=list)
    """No two neighbours are of one kind; see `joined`."""
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: WireFinishReason | None = None
    matched_stop: str | None = None
    """The stop string that ended the output, if one did."""
    prompt: ScoredPrompt | None = None
    """With the first news of an output, if its prompt was scored."""

    @property
    def text(self) -> str:
        """The content among the pieces."""
        return text_of(self.pieces)


class Output:
    """State of one output: tokens in, pieces out."""

    def __init__(
        self,
        index: int,
        request: GenerateInput,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...],
        eos: frozenset[int],
        parser: OutputParser = PLAIN,
        shown_ids: frozenset[int] = frozenset(),
        is_message: bool = False,
    ) -> None:
        """`parser` is this output's own. `shown_ids`: special tokens that it has to see as text. `is_message`: the text
        is one of its own, rather than going on where the prompt's ended."""
        self.index = index
        self.request = request
        self.finish_reason: WireFinishReason | None = None
        self.num_cached_tokens = 0
        self.first_token_at_s: float | None = None
        self.last_token_at_s: float | None = None
        self.num_reasoning_tokens = 0
        """Output tokens that began within reasoning: those behind the opening mark, up to and with the closing one."""
        self._parser = parser
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            stop_strings=stop,
            shown_ids=shown_ids,
            before=None if is_message else request.token_ids[-1],
        )
        hidden = frozenset(request.sampling.stop_token_ids)
        self._hidden_last_ids = hidden if request.sampling.ignore_eos else hidden | eos
        self._pieces: list[Piece] = []
        self._scores: list[TokenScore] = []
        self._prompt: ScoredPrompt | None = None
        self._finish_is_news = False
        self._has_called = False
        self._token_ends: deque[int] = deque()
        """Where the tokens end, in characters of text, that the parser has not seen to their end."""
        self._num_parsed_chars = 0
        self._began_in_reasoning = parser.in_reasoning

    @property
    def num_tokens(self) -> int:
        """Output tokens so far: `completion_tokens`."""
        return self._detokenizer.num_tokens

    def push(self, delta: TokenDelta) -> None:
        """Take new tokens. Sets `finish_reason` when they end the output, a stop string or the only call."""
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.prompt_logprobs is not None:
            self._prompt = ScoredPrompt(self.request.token_ids, delta.prompt_logprobs)
        if delta.token_ids:
            self.last_token_at_s = time.monotonic()
            if self.first_token_at_s is None:
                self.first_token_at_s = self.last_token_at_s
            self._push_tokens(delta)
        if self._has_enough:
            self._finish("stop")
        elif delta.finish_reason in ("stop", "length"):
            self._parse(self._detokenizer.flush())
            self._finish("stop" if self._has_enough else delta.finish_reason)
        elif delta.finish_reason is not None:
            raise RequestFailed("the cluster ended the request before its answer was complete")

    def take(self) -> OutputNews | None:
        """News since the last call, or None. Log probabilities wait for the text they belong to."""
        pieces = joined(self._pieces)
        if not pieces and not self._finish_is_news:
            return None
        news = OutputNews(self.index, pieces, self._scores, prompt=self._prompt)
        if self._finish_is_news:
            news.finish_reason, news.matched_stop = self.finish_reason, self._detokenizer.matched_stop
        self._pieces, self._scores, self._prompt, self._finish_is_news = [], [], None, False
        return news

    @property
    def _has_enough(self) -> bool:
        return self._detokenizer.matched_stop is not None or self._parser.is_complete

    def _push_tokens(self, delta: TokenDelta) -> None:
        token_ids = delta.token_ids
        if delta.logprobs is None:
            self._push_text(token_ids, delta)
            return
        for position, (token_id, logprobs) in enumerate(zip(token_ids, delta.logprobs, strict=True)):
            if self._has_enough:
                return
            self._scores.append(TokenScore(token_id, logprobs, self._detokenizer.num_chars))
            self._push_text(token_ids[position : position + 1], delta, is_last=position == len(token_ids) - 1)

    def _push_text(self, token_ids: tuple[int, ...], delta: TokenDelta, *, is_last: bool = True) -> None:
        if is_last and delta.finish_reason == "stop" and token_ids[-1] in self._hidden_last_ids:
            # The token that ended the output is counted and not shown.
            self._read_tokens(token_ids[:-1])
            if not self._has_enough:
                self._detokenizer.num_tokens += 1
                self._token_ends.append(self._detokenizer.num_chars)
        else:
            self._read_tokens(token_ids)

    def _read_tokens(self, token_ids: tuple[int, ...]) -> None:
        if self._parser is PLAIN:
            self._parse(self._detokenizer.push(token_ids))
            return
        for token_id in token_ids:
            if self._has_enough:
                return
            text = self._detokenizer.push((token_id,))
            self._token_ends.append(self._detokenizer.num_chars)
            self._parse(text)

    def _parse(self, text: str) -> None:
        """Feed the parser, token by token as far as they are known: each counts as what it began in."""
        start = 0
        num_chars_before = self._num_parsed_chars
        self._num_parsed_chars += len(text)
        while self._token_ends and self._token_ends[0] <= self._num_parsed_chars:
            end = self._token_ends.popleft() - num_chars_before
            self._take_pieces(self._parser.feed(text[start:end]))
            start = end
            self._count_token()
        self._take_pieces(self._parser.feed(text[start:]))

    def _count_token(self) -> None:
        self.num_reasoning_tokens += self._began_in_reasoning
        self._began_in_reasoning = self._parser.in_reasoning

    def _take_pieces(self, pieces: list[Piece]) -> None:
        self._pieces += pieces
        self._has_called = self._has_called or any(isinstance(piece, ToolCallBegun) for piece in pieces)

    def _finish(self, reason: WireFinishReason) -> None:
        while self._token_ends:
            self._token_ends.popleft()
            self._count_token()
        self._take_pieces(self._parser.finish())
        # A stop string may end the output in the middle of a call, which is none to be run then.
        is_cut_off = self._detokenizer.matched_stop is not None and self._parser.in_call
        self.finish_reason = "tool_calls" if reason == "stop" and self._has_called and not is_cut_off else reason
        self._finish_is_news = True


class RunningOutputs:
    """The outputs of one HTTP request while they run. Use as an async context manager."""

    def __init__(self, generator: Generator, outputs: Sequence[Output], *, coalesce_s: float = 0.0) -> None:
        """`coalesce_s`: seconds to wait for more news once there is some."""
        self.outputs = outputs
        self._generator = generator
        self._coalesce_s = coalesce_s
        self._changed = asyncio.Event()
        self._num_running = len(outputs)
        self._error: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._with_news: dict[int, Output] = {}
        self._grown: dict[int, Output] = {}

    async def __aenter__(self) -> RunningOutputs:
        """Start all outputs."""
        self._tasks = [asyncio.create_task(self._run(output)) for output in self.outputs]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel what still runs and wait until every iterator is closed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def is_done(self) -> bool:
        """Whether all outputs have ended well."""
        return self._num_running == 0

    @property
    def error(self) -> BaseException | None:
        """What ended them early."""
        return self._error

    def fail(self, error: BaseException) -> None:
        """Make the waiting `wait_for_news` raise `error`, unless another one came first."""
        self._error = self._error or error
        self._changed.set()

    async def wait_for_news(self) -> list[OutputNews]:
        """News of all outputs that have some; at least one, unless all have ended. Raises an output's error."""
        while True:
            if self._error is not None:
                raise self._error
            news = [found for output in self._with_news.values() if (found := output.take()) is not None]
            self._with_news.clear()
            if news or self.is_done:
                return news
            await self._changed.wait()
            if self._coalesce_s:
                await asyncio.sleep(self._coalesce_s)
            self._changed.clear()

    def take_grown(self) -> Collection[Output]:
        """Outputs that got tokens since the last call, whether these are news yet or not."""
        grown, self._grown = self._grown, {}
        return grown.values()

    async def wait_until_done(self) -> list[OutputNews]:
        """Everything the outputs produced, one entry each, in order. Raises an output's error."""
        while not self.is_done:
            if self._error is not None:
                raise self._error
            await self._changed.wait()
            self._changed.clear()
        news = await self.wait_for_news()
        return sorted(news, key=lambda entry: entry.index)

    async def _run(self, output: Output) -> None:
        """Supervise one output: whatever goes wrong is raised to the one who waits for news."""
        try:
            await self._read(output)
            self._num_running -= 1
        except Exception as exc:  # noqa: BLE001 - raised again by `wait_for_news`
            self._error = self._error or exc
        finally:
            self._changed.set()

    async def _read(self, output: Output) -> None:
        deltas = self._generator.generate(output.request)
        try:
            async for delta in deltas:
                output.push(delta)
                self._with_news[output.index] = output
                if delta.token_ids:
                    self._grown[output.index] = output
                self._changed.set()
                if output.finish_reason is not None:
                    return
            raise RequestFailed("the cluster ended the request without saying how")
        finally:
            await _close(deltas)


@runtime_checkable
class _Closable(Protocol):
    async def aclose(self) -> None: ...


async def _close(deltas: AsyncIterator[TokenDelta]) -> None:
    if isinstance(deltas, _Closable):
        await deltas.aclose()
