"""A checked request and its prompts become the answer that generates, in the words of its endpoint.

All endpoints that generate come through here: they differ in the bodies they take and in how they word what comes out.
Knows nothing of their schemas.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from atom_cluster.api.answers.answer import Answer, AnswerPlan
from atom_cluster.api.answers.answer_grammar import chat_grammar
from atom_cluster.api.answers.outputs import Output
from atom_cluster.api.answers.prompts import ChatPrompt, chat_prompt
from atom_cluster.api.context import ApiContext
from atom_cluster.api.http.request_terms import RequestTerms
from atom_cluster.api.openai.format import AnswerFormat, AnswerHeader
from atom_cluster.api.openai.requests import ChatCompletionRequest, CompletionRequest, GenerationFields
from atom_cluster.api.openai.sampling import check_request, output_inputs, sampling_params
from atom_cluster.api.openai.structured_fields import WantedGrammar
from atom_cluster.api.openai.tools import tool_use
from atom_cluster.api.parsers.dialect import PLAIN_READING, Reading
from atom_cluster.errors import InvalidRequest
from atom_cluster.messages.requests import GrammarSpec


def answer_header(context: ApiContext, body: ChatCompletionRequest | CompletionRequest, answer_id: str) -> AnswerHeader:
    """What every object of the answer to `body` repeats, in OpenAI's first two formats."""
    return AnswerHeader(
        id=answer_id,
        created=int(time.time()),
        model=context.model.name,
        usage_in_stream=body.stream_options is not None and bool(body.stream_options.include_usage),
        has_logprobs=body.logprobs is not None and body.logprobs is not False,
        num_prompt_logprobs=body.prompt_logprobs,
    )


async def answer_chat(
    context: ApiContext, body: ChatCompletionRequest, terms: RequestTerms, *, answer_id: str, words: AnswerFormat
) -> Answer:
    """The answer to a conversation. Raises `InvalidRequest` and its kin, and `Overloaded`."""
    prompt = await tokenized_chat(context, body)
    reading = context.dialect.reading(prompt_end=prompt.end, tools=tool_use(body))
    wanted = chat_grammar(
        body,
        dialect=context.dialect,
        prompt_end=prompt.end,
        tokenizer=context.tokenizer.tokenizer,
        max_bytes=context.limits.max_grammar_bytes,
    )
    return answer_prompts(
        context,
        body,
        [prompt.token_ids],
        terms,
        answer_id=answer_id,
        words=words,
        reading=reading,
        grammar=await checked_grammar(context, body, wanted),
    )


async def checked_grammar(
    context: ApiContext, body: GenerationFields, wanted: WantedGrammar | None
) -> GrammarSpec | None:
    """What the output has to look like; it is known to compile then.

    Raises `InvalidRequest` that names the field, or `Overloaded`.
    """
    if wanted is None:
        return None
    if body.ignore_eos:
        raise InvalidRequest(f"`ignore_eos` cannot be combined with `{wanted.param}`", param="ignore_eos")
    await context.grammars.check(wanted.spec, param=wanted.param)
    return wanted.spec


async def tokenized_chat(context: ApiContext, body: ChatCompletionRequest) -> ChatPrompt:
    """A conversation's prompt, once the request has been checked. Raises as `answer_chat`."""
    check_request(body, model=context.model, limits=context.limits)
    return await context.tokenizer.run(
        lambda: chat_prompt(
            body,
            tokenizer=context.tokenizer.tokenizer,
            template=context.tokenizer.chat_template,
            max_tokens=context.model.max_model_len,
        )
    )


def answer_prompts(
    context: ApiContext,
    body: GenerationFields,
    prompts: Sequence[tuple[int, ...]],
    terms: RequestTerms,
    *,
    answer_id: str,
    words: AnswerFormat,
    reading: Reading = PLAIN_READING,
    grammar: GrammarSpec | None = None,
) -> Answer:
    """The answer to tokenized prompts. `body` and `grammar` have been checked."""
    params = msgspec.structs.replace(sampling_params(body, model=context.model), grammar=grammar)
    is_chat = isinstance(body, ChatCompletionRequest)
    inputs = output_inputs(
        params,
        prompts,
        answer_id=answer_id,
        model=context.model,
        limits=context.limits,
        prompt_param="messages" if is_chat else "prompt",
        terms=terms,
    )
    eos = frozenset(context.model.eos_token_ids)
    plan = AnswerPlan(
        outputs=[
            Output(
                index,
                entry,
                context.tokenizer.tokenizer,
                stop=params.stop_strings,
                eos=eos,
                parser=reading.parser(),
                shown_ids=reading.shown_ids,
                is_message=is_chat,
            )
            for index, entry in enumerate(inputs)
        ],
        num_outputs_per_prompt=params.n,
        words=words,
        is_streamed=bool(body.stream),
        arrived_at_s=terms.arrived_at_s,
    )
    return Answer(
        plan,
        generator=context.generator,
        metrics=context.metrics,
        coalesce_s=context.limits.coalesce_ms / 1000,
        write_timeout_s=context.limits.write_timeout_s,
    )
