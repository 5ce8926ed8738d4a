"""The response that generates: start the outputs, write their news or their whole text, cancel when the client leaves.

Everything between the checked request and the last byte happens inside one call, so whatever ends it (an error, a
disconnect, a cancelled server task) also ends the requests in the cluster. Knows nothing of schemas or prompts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from atom_cluster.api.answers import sse
from atom_cluster.api.answers.answer_times import AnswerTimes
from atom_cluster.api.answers.outputs import ClientLeftError, Output, RunningOutputs
from atom_cluster.api.generator import Generator
from atom_cluster.api.http.error_ledger import note_error
from atom_cluster.api.http.error_responses import json_response
from atom_cluster.api.http.request_record import note_finished, note_outputs
from atom_cluster.api.openai.format import AnswerFormat
from atom_cluster.api.openai.wire import CompletionTokensDetails, PromptTokensDetails, Usage
from atom_cluster.api.protection.middleware import note_used
from atom_cluster.observability.metrics import MetricSink


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPlan:
    """What to generate and how to word it."""

    outputs: Sequence[Output]
    num_outputs_per_prompt: int
    """`n`: outputs i*n to i*n + n-1 belong to prompt i."""
    words: AnswerFormat
    is_streamed: bool
    arrived_at_s: float
    """When the request arrived, on the monotonic clock."""


class Answer(Response):
    """Runs an `AnswerPlan` when the server calls it. Raises errors that come before the first byte."""

    def __init__(
        self,
        plan: AnswerPlan,
        *,
        generator: Generator,
        metrics: MetricSink,
        coalesce_s: float,
        write_timeout_s: float,
    ) -> None:
        super().__init__()
        self._write_timeout_s = write_timeout_s
        self._plan = plan
        self._generator = generator
        self._metrics = metrics
        self._coalesce_s = coalesce_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate and send; returns without an answer when the client leaves."""
        plan = self._plan
        coalesce_s = self._coalesce_s if plan.is_streamed else 0.0
        route = getattr(scope.get("route"), "path", "unknown")
        times = AnswerTimes(plan.outputs, route=route, arrived_at_s=plan.arrived_at_s, metrics=self._metrics)
        note_outputs(scope, plan.outputs, num_per_prompt=plan.num_outputs_per_prompt)
        async with RunningOutputs(self._generator, plan.outputs, coalesce_s=coalesce_s) as running:
            watch = asyncio.create_task(_report_disconnect(receive, running))
            try:
                if plan.is_streamed:
                    await self._send_stream(running, send, times)
                    if running.error is not None and not isinstance(running.error, ClientLeftError):
                        note_error(scope, running.error)
                else:
                    await self._send_whole(running, scope, receive, send)
                self._charge(scope)
            except (ClientLeftError, asyncio.CancelledError) as exc:
                # What was computed for a client is used, whether it was there to read it or not.
                self._charge(scope)
                if not isinstance(exc, ClientLeftError):
                    raise
            finally:
                watch.cancel()
                note_finished(scope, plan.outputs)
                times.end(num_prompt_tokens=usage_of(plan).prompt_tokens)

    async def _send_whole(self, running: RunningOutputs, scope: Scope, receive: Receive, send: Send) -> None:
        news = await running.wait_until_done()
        body = self._plan.words.whole(news, usage_of(self._plan))
        await json_response(body)(scope, receive, send)

    async def _send_stream(self, running: RunningOutputs, send: Send, times: AnswerTimes) -> None:
        plan = self._plan
        has_started = False
        with _WriteLimit(self._write_timeout_s) as limit:
            async for piece in sse.event_stream(running, plan.words, usage=lambda: usage_of(plan)):
                if not has_started:
                    await send({"type": "http.response.start", "status": 200, "headers": _raw(sse.HEADERS)})
                    has_started = True
                limit.start()
                times.write(running.take_grown())
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                limit.stop()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _charge(self, scope: Scope) -> None:
        usage = usage_of(self._plan)
        note_used(scope, num_prompt_tokens=usage.prompt_tokens, num_output_tokens=usage.completion_tokens)


class _WriteLimit:
    """Turns a write that takes too long into `ClientLeftError`.

    One timer handle per write: `asyncio.wait_for` would make a task for each token.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._handle: asyncio.TimerHandle | None = None
        self._has_expired = False

    def start(self) -> None:
        """A write begins."""
        self._handle = self._loop.call_later(self._timeout_s, self._expire)

    def stop(self) -> None:
        """The write has ended."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def __enter__(self) -> _WriteLimit:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.stop()
        if self._has_expired and kind is asyncio.CancelledError:
            raise ClientLeftError from error

    def _expire(self) -> None:
        if self._task is not None:
            self._has_expired = True
            self._task.cancel()


def usage_of(plan: AnswerPlan) -> Usage:
    """Counts and times of an answer that has ended.

    A prompt's cached tokens are the fewest among its outputs: outputs that ran beside each other find each other's
    prompt cached, and that prompt was computed once all the same.
    """
    step = plan.num_outputs_per_prompt
    prompts = [plan.outputs[start : start + step] for start in range(0, len(plan.outputs), step)]
    num_prompt_tokens = sum(len(outputs[0].request.token_ids) for outputs in prompts)
    num_output_tokens = sum(output.num_tokens for output in plan.outputs)
    first_at_s = _first_token_at_s(plan) or plan.arrived_at_s
    last_at_s = max(output.last_token_at_s or plan.arrived_at_s for output in plan.outputs)
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_output_tokens,
        total_tokens=num_prompt_tokens + num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(min(output.num_cached_tokens for output in outputs) for outputs in prompts)
        ),
        completion_tokens_details=CompletionTokensDetails(
            reasoning_tokens=sum(output.num_reasoning_tokens for output in plan.outputs)
        ),
        ttft_s=round(first_at_s - plan.arrived_at_s, 6),
        tpot_s=round(_mean_tpot_s(plan.outputs), 6),
        latency_s=round(last_at_s - plan.arrived_at_s, 6),
    )


def _first_token_at_s(plan: AnswerPlan) -> float | None:
    return min(
        (output.first_token_at_s for output in plan.outputs if output.first_token_at_s is not None), default=None
    )


def _mean_tpot_s(outputs: Sequence[Output]) -> float:
    values = [
        (output.last_token_at_s - output.first_token_at_s) / (output.num_tokens - 1)
        for output in outputs
        if output.num_tokens > 1 and output.first_token_at_s is not None and output.last_token_at_s is not None
    ]
    return sum(values) / len(values) if values else 0.0


async def _report_disconnect(receive: Receive, running: RunningOutputs) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    running.fail(ClientLeftError())


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
