"""The prompt as part of an answer: its text in front of a completion (`echo`), and how likely its tokens are.

Both in OpenAI's shape, with `echo`, and in vLLM's (`prompt_logprobs`). Knows nothing of streams or of how scores come
about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atom_cluster.api.answers.outputs import ScoredPrompt
from atom_cluster.api.openai.requests import CompletionRequest, Prompt
from atom_cluster.api.openai.token_texts import finite, likely_texts, token_text
from atom_cluster.api.openai.wire import CompletionLogprobs, PromptTokenLogprob
from atom_cluster.api.text.tokenizer import IncrementalDetokenizer, Tokenizer
from atom_cluster.messages.requests import PromptScore


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as a completion repeats it."""

    text: str
    """As the client wrote it; of token ids their text, in which special tokens are nothing."""
    offsets: tuple[int, ...]
    """Where each token's text begins in it, in characters."""


@dataclass(frozen=True, slots=True)
class Echoes:
    """What the outputs of one answer repeat."""

    prompts: tuple[Echo, ...]
    num_outputs_per_prompt: int
    num_top: int
    """Alternatives to each token, if log probabilities are wanted."""

    def of_output(self, index: int) -> Echo:
        """What this output begins with."""
        return self.prompts[index // self.num_outputs_per_prompt]


def echoes_of(request: CompletionRequest, prompts: Sequence[tuple[int, ...]], tokenizer: Tokenizer) -> Echoes | None:
    """None if the request wants none. prompts: the tokens of the request's. Run in the tokenizer's threads."""
    if not request.echo:
        return None
    echoes = (_echo(prompt, token_ids, tokenizer) for prompt, token_ids in zip(request.prompt, prompts, strict=True))
    return Echoes(tuple(echoes), request.n or 1, request.logprobs or 0)


def _echo(prompt: Prompt, token_ids: tuple[int, ...], tokenizer: Tokenizer) -> Echo:
    if isinstance(prompt, str):
        return Echo(prompt, tuple(tokenizer.offsets(prompt)))
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces, offsets = [], []
    for token_id in token_ids:
        offsets.append(detokenizer.num_chars)
        pieces.append(detokenizer.push((token_id,)))
    return Echo("".join((*pieces, detokenizer.flush())), tuple(offsets))


def echo_logprobs(echo: Echo, prompt: ScoredPrompt, num_top: int, tokenizer: Tokenizer) -> CompletionLogprobs:
    """Log probabilities of a prompt's tokens as OpenAI's completions give them; there are none for the first."""

    def text(token_id: int) -> str:
        return token_text(tokenizer.token_bytes(token_id))

    def top(token_id: int, score: PromptScore) -> dict[str, float]:
        return likely_texts(token_id, score.logprob, score.top[:num_top], tokenizer)

    pairs = list(zip(prompt.token_ids, prompt.scores, strict=True))
    return CompletionLogprobs(
        tokens=[text(token_id) for token_id in prompt.token_ids],
        token_logprobs=[None if score is None else finite(score.logprob) for score in prompt.scores],
        top_logprobs=[None if score is None else top(token_id, score) for token_id, score in pairs],
        text_offset=list(echo.offsets),
    )


def joined_logprobs(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Those of one text behind another."""
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def prompt_logprobs(
    prompt: ScoredPrompt, num_top: int, tokenizer: Tokenizer
) -> list[dict[str, PromptTokenLogprob] | None]:
    """One entry per token, by token id: the token itself, then those most likely in its place. None for the first."""

    def entry(token_id: int, logprob: float, rank: int) -> PromptTokenLogprob:
        text = token_text(tokenizer.token_bytes(token_id))
        return PromptTokenLogprob(logprob=finite(logprob), rank=rank, decoded_token=text)

    def entries(token_id: int, score: PromptScore) -> dict[str, PromptTokenLogprob]:
        found = {str(token_id): entry(token_id, score.logprob, score.rank)}
        for rank, top in enumerate(score.top[:num_top], 1):
            found.setdefault(str(top.token_id), entry(top.token_id, top.logprob, rank))
        return found

    pairs = zip(prompt.token_ids, prompt.scores, strict=True)
    return [None if score is None else entries(token_id, score) for token_id, score in pairs]
