"""News of outputs in OpenAI's two shapes, chat and text. Knows nothing of streams, tasks or HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import UNSET, Struct, UnsetType

from atom_cluster.api.answers.outputs import OutputNews, TokenScore
from atom_cluster.api.answers.pieces import Piece, ReasoningPiece, TextPiece, ToolCallBegun, calls_of, reasoning_of
from atom_cluster.api.http.error_responses import error_body
from atom_cluster.api.openai.echoes import Echoes, echo_logprobs, joined_logprobs, prompt_logprobs
from atom_cluster.api.openai.token_texts import finite, likely_texts, token_text
from atom_cluster.api.openai.wire import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    CompletionLogprobs,
    FunctionCall,
    FunctionCallDelta,
    MessageDelta,
    PromptTokenLogprob,
    TextChoice,
    ToolCall,
    ToolCallDelta,
    TopChatLogprob,
    Usage,
    WireFinishReason,
)
from atom_cluster.api.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHeader:
    """What every object of one answer repeats."""

    id: str
    created: int
    """Unix seconds."""
    model: str
    usage_in_stream: bool
    """Whether the client asked for a last chunk with usage; the others then say `usage: null`."""
    has_logprobs: bool
    num_prompt_logprobs: int | None = None
    """Alternatives to each prompt token, if the client asked for `prompt_logprobs`."""

    @property
    def chunk_usage(self) -> UnsetType | None:
        """`usage` of a chunk that is not the last."""
        return None if self.usage_in_stream else UNSET


class AnswerFormat(Protocol):
    """How one endpoint words its answers."""

    @property
    def is_typed(self) -> bool:
        """Whether events are named by the `type` of their payload; else they have no names, and `[DONE]` is last."""
        ...

    def opening(self, index: int, usage: Usage) -> list[Struct]:
        """Chunks before the first text of an output. `usage`: as it is now."""
        ...

    def chunks(self, news: OutputNews) -> list[Struct]:
        """Chunks that tell an output's news."""
        ...

    def closing(self, usage: Usage) -> list[Struct]:
        """The last chunks of a stream that ended well."""
        ...

    def failure(self, error: BaseException) -> Struct:
        """The last chunk of a stream that ends with an error."""
        ...

    def whole(self, news: Sequence[OutputNews], usage: Usage) -> Struct:
        """The answer in one piece, from everything that each output produced."""
        ...


class ChatFormat:
    """Words of /v1/chat/completions."""

    is_typed = False

    def __init__(self, header: AnswerHeader, tokenizer: Tokenizer, *, sends_reasoning: bool = True) -> None:
        """`sends_reasoning` False: reasoning is left out of the answer."""
        self._header = header
        self._tokenizer = tokenizer
        self._sends_reasoning = sends_reasoning

    def opening(self, index: int, usage: Usage) -> list[Struct]:
        """The chunk that names the role."""
        return [self._chunk(index, MessageDelta(role="assistant", content=""))]

    def chunks(self, news: OutputNews) -> list[Struct]:
        """A chunk for each piece; the finish reason comes in one of its own with an empty delta, as OpenAI sends it.

        Log probabilities of all of the news come with its first piece.
        """
        deltas = [_delta(piece) for piece in news.pieces if self._is_sent(piece)]
        if not deltas and news.scores:
            deltas.append(MessageDelta(content=""))
        chunks: list[Struct] = []
        for position, delta in enumerate(deltas):
            logprobs = self._logprobs(news.scores) if position == 0 else None
            chunks.append(self._chunk(news.index, delta, logprobs=logprobs))
        if news.finish_reason is not None:
            chunks.append(self._chunk(news.index, MessageDelta(), finish_reason=news.finish_reason))
        return chunks

    def closing(self, usage: Usage) -> list[Struct]:
        """The chunk with usage, if the client asked for it."""
        header = self._header
        chunk = ChatCompletionChunk(id=header.id, created=header.created, model=header.model, choices=[], usage=usage)
        return [chunk] if header.usage_in_stream else []

    def failure(self, error: BaseException) -> Struct:
        """See `AnswerFormat`."""
        return error_body(error)

    def whole(self, news: Sequence[OutputNews], usage: Usage) -> Struct:
        """See `AnswerFormat`."""
        choices = [
            ChatChoice(
                index=entry.index,
                message=self._message(entry),
                logprobs=self._logprobs(entry.scores),
                finish_reason=entry.finish_reason or "stop",
            )
            for entry in news
        ]
        header = self._header
        return ChatCompletion(
            id=header.id,
            created=header.created,
            model=header.model,
            choices=choices,
            usage=usage,
            prompt_logprobs=_prompt_logprobs(news[0], header, self._tokenizer),  # all outputs have the one prompt
        )

    def _chunk(
        self,
        index: int,
        delta: MessageDelta,
        *,
        logprobs: ChatLogprobs | None = None,
        finish_reason: WireFinishReason | None = None,
    ) -> ChatCompletionChunk:
        header = self._header
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return ChatCompletionChunk(
            id=header.id, created=header.created, model=header.model, choices=[choice], usage=header.chunk_usage
        )

    def _message(self, news: OutputNews) -> AssistantMessage:
        reasoning = reasoning_of(news.pieces) if self._sends_reasoning else ""
        calls = [
            ToolCall(id=call.call_id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in calls_of(news.pieces)
        ]
        return AssistantMessage(
            role="assistant",
            content=news.text or (None if calls else ""),
            reasoning_content=reasoning or UNSET,
            tool_calls=calls or UNSET,
        )

    def _is_sent(self, piece: Piece) -> bool:
        return self._sends_reasoning or not isinstance(piece, ReasoningPiece)

    def _logprobs(self, scores: Sequence[TokenScore]) -> ChatLogprobs | None:
        if not self._header.has_logprobs:
            return None
        return ChatLogprobs(content=[token_logprobs(score, self._tokenizer) for score in scores])


class CompletionFormat:
    """Words of /v1/completions."""

    is_typed = False

    def __init__(self, header: AnswerHeader, tokenizer: Tokenizer, *, echoes: Echoes | None = None) -> None:
        """`echoes`: what outputs begin with, if they repeat their prompts."""
        self._header = header
        self._tokenizer = tokenizer
        self._echoes = echoes
        self._begun: set[int] = set()
        """Outputs of which something was told, and so their prompt."""

    def opening(self, index: int, usage: Usage) -> list[Struct]:
        """Nothing: a text answer has no role."""
        return []

    def chunks(self, news: OutputNews) -> list[Struct]:
        """One chunk with both text and finish reason."""
        header = self._header
        return [
            Completion(
                id=header.id,
                created=header.created,
                model=header.model,
                choices=[self._choice(news)],
                usage=header.chunk_usage,
            )
        ]

    def closing(self, usage: Usage) -> list[Struct]:
        """The chunk with usage, if the client asked for it."""
        header = self._header
        chunk = Completion(id=header.id, created=header.created, model=header.model, choices=[], usage=usage)
        return [chunk] if header.usage_in_stream else []

    def failure(self, error: BaseException) -> Struct:
        """See `AnswerFormat`."""
        return error_body(error)

    def whole(self, news: Sequence[OutputNews], usage: Usage) -> Struct:
        """See `AnswerFormat`."""
        header = self._header
        choices = [self._choice(entry) for entry in news]
        return Completion(id=header.id, created=header.created, model=header.model, choices=choices, usage=usage)

    def _choice(self, news: OutputNews) -> TextChoice:
        logprobs = self._logprobs(news) if self._header.has_logprobs else None
        return TextChoice(
            index=news.index,
            text=self._echoed_text(news) + news.text,
            logprobs=logprobs,
            finish_reason=news.finish_reason,
            prompt_logprobs=_prompt_logprobs(news, self._header, self._tokenizer),
        )

    def _echoed_text(self, news: OutputNews) -> str:
        """The prompt, in the first that is told of an output."""
        if self._echoes is None or news.index in self._begun:
            return ""
        self._begun.add(news.index)
        return self._echoes.of_output(news.index).text

    def _logprobs(self, news: OutputNews) -> CompletionLogprobs:
        """Of the prompt's tokens, where it is repeated and its scores are news, and of the output's."""
        if self._echoes is None:
            return self._output_logprobs(news, 0)
        echo = self._echoes.of_output(news.index)
        of_output = self._output_logprobs(news, len(echo.text))
        if news.prompt is None:
            return of_output
        of_prompt = echo_logprobs(echo, news.prompt, self._echoes.num_top, self._tokenizer)
        return joined_logprobs(of_prompt, of_output)

    def _output_logprobs(self, news: OutputNews, num_before: int) -> CompletionLogprobs:
        """`num_before` characters of prompt are in front of the output."""
        return CompletionLogprobs(
            tokens=[self._text(score.token_id) for score in news.scores],
            token_logprobs=[finite(score.logprobs.logprob) for score in news.scores],
            top_logprobs=[
                likely_texts(score.token_id, score.logprobs.logprob, score.logprobs.top, self._tokenizer)
                for score in news.scores
            ],
            text_offset=[num_before + score.text_offset for score in news.scores],
        )

    def _text(self, token_id: int) -> str:
        return token_text(self._tokenizer.token_bytes(token_id))


def _prompt_logprobs(
    news: OutputNews, header: AnswerHeader, tokenizer: Tokenizer
) -> list[dict[str, PromptTokenLogprob] | None] | UnsetType:
    if header.num_prompt_logprobs is None or news.prompt is None:
        return UNSET
    return prompt_logprobs(news.prompt, header.num_prompt_logprobs, tokenizer)


def token_logprobs(score: TokenScore, tokenizer: Tokenizer) -> ChatTokenLogprob:
    """One output token and its alternatives, as chat answers and responses show them."""
    value = tokenizer.token_bytes(score.token_id)
    return ChatTokenLogprob(
        token=token_text(value),
        logprob=finite(score.logprobs.logprob),
        bytes=list(value),
        top_logprobs=[
            TopChatLogprob(token=token_text(other), logprob=finite(top.logprob), bytes=list(other))
            for top in score.logprobs.top
            for other in (tokenizer.token_bytes(top.token_id),)
        ],
    )


def _delta(piece: Piece) -> MessageDelta:
    if isinstance(piece, TextPiece):
        return MessageDelta(content=piece.text)
    if isinstance(piece, ReasoningPiece):
        return MessageDelta(reasoning_content=piece.text)
    if isinstance(piece, ToolCallBegun):
        function = FunctionCallDelta(name=piece.name, arguments="")
        return MessageDelta(
            tool_calls=[ToolCallDelta(index=piece.index, id=piece.call_id, type="function", function=function)]
        )
    return MessageDelta(tool_calls=[ToolCallDelta(index=piece.index, function=FunctionCallDelta(arguments=piece.text))])
