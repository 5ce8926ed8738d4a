"""LLMEngine: the whole engine in this process, for scripts and offline batches. No Ray, no HTTP.

    with LLMEngine("demo:smollm2-135m-instruct") as engine:
        outputs = engine.generate(["Hello"], SamplingParams(max_tokens=16))

The same scheduler, runner and sampler as in a cluster; only placement, routing and KV transfer are absent.
"""

from __future__ import annotations

import difflib
import inspect
import random
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from msgspec.structs import replace
from typing_extensions import Never, Self

from atom_cluster.api.text.model_files import ServedModel
from atom_cluster.api.text.tokenizer import IncrementalDetokenizer, Tokenizer
from atom_cluster.config.compilation import CompilationConfig
from atom_cluster.config.model_path import resolve_model_path
from atom_cluster.config.observability import ProfileConfig
from atom_cluster.config.ops import OpBackend, OpBackendChoice, OpFamily
from atom_cluster.config.quantization import QuantizationConfig
from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.speculative import SpeculativeConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.protocols import EngineOutput, RunnerInfo
from atom_cluster.engine.stopping import validate_sampling
from atom_cluster.errors import ConfigError, ContextLengthExceeded, InvalidRequest, ProfileRefused, RequestFailed
from atom_cluster.gang.local_gang import open_local_gang
from atom_cluster.llm_output import GenerationOutput, OutputBuilder, StreamCallback, StreamedOutput
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.failures import error_of
from atom_cluster.messages.profile import ProfileAnswer, StartProfile, StopProfile
from atom_cluster.messages.requests import (
    CancelRequest,
    EngineRequest,
    SamplingParams,
    TokenBatch,
    TokenDelta,
)
from atom_cluster.observability.metrics import MetricSink, NullMetrics
from atom_cluster.runner.options import RunnerOptions
from atom_cluster.structured.compiler import GrammarCompiler

__all__ = ["GenerationOutput", "LLMEngine", "StreamedOutput"]

_CLIENT = "local"
_UNBOUNDED = 2**31 - 1
_ANSWER_WAIT_S = 0.1
"""Longest sleep of an engine that has nothing to do but to answer."""


class LLMEngine:
    """Generates text for batches of prompts. Owns the model and its memory. Not thread-safe."""

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: Literal["auto", "float64", "float32", "bfloat16"] = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        cpu_cache_gib: float = 0.5,
        memory_fraction: float = 0.88,
        max_num_requests: int = 256,
        max_num_batched_tokens: int = 8192,
        max_model_len: int | None = None,
        prefix_caching: bool = True,
        chunked_prefill: bool = True,
        async_scheduling: bool = True,
        num_threads: int | None = None,
        ops_backend: OpBackendChoice = "auto",
        ops_overrides: Mapping[OpFamily, OpBackend] | None = None,
        load_format: Literal["safetensors", "dummy"] = "safetensors",
        kv_dtype: Literal["auto", "fp8"] = "auto",
        quantization: QuantizationConfig | None = None,
        seed: int = 0,
        speculative: SpeculativeConfig | None = None,
        compilation: CompilationConfig | None = None,
        profile: ProfileConfig | None = None,
        tensor_parallel_size: int = 1,
        metrics: MetricSink | None = None,
        **unknown: Never,
    ) -> None:
        """Load `model`: a directory in Hugging Face layout, a hub id, or `demo:` and the name of the demo model.

        Options mean what they do in `config/` and `runner/options.py`; `num_blocks` None sizes the KV cache by memory.
        With `tensor_parallel_size` above 1, as many GPUs compute together, each but the first driven by a process of
        its own. Of several such engines of one process only the first sums over peer memory (`peer_all_reduce.py`).
        `seed` starts the sequence of seeds given to requests without one; `metrics` records what the engine does.
        Raises ConfigError or WeightsError for what cannot work, TypeError for an unknown option.
        """
        _refuse_unknown(unknown)
        if tensor_parallel_size < 1:
            raise ConfigError("tensor_parallel_size is a number of ranks, 1 or more")
        model_dir = resolve_model_path(str(model))
        options = RunnerOptions(
            model_dir=str(model_dir),
            dtype=dtype,
            device=device,
            block_size=block_size,
            num_blocks=num_blocks,
            cpu_cache_gib=cpu_cache_gib,
            memory_fraction=memory_fraction,
            max_num_requests=max_num_requests,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            num_threads=num_threads,
            ops_backend=ops_backend,
            ops_overrides=ops_overrides or {},
            load_format=load_format,
            kv_dtype=kv_dtype,
            quantization=QuantizationConfig() if quantization is None else quantization,
            seed=seed,
            compilation=CompilationConfig() if compilation is None else compilation,
            profile=ProfileConfig() if profile is None else profile,
            num_drafts=0 if speculative is None else speculative.num_tokens,
        )
        scheduler = SchedulerConfig(
            max_num_requests=max_num_requests,
            max_num_batched_tokens=max_num_batched_tokens,
            max_waiting_requests=_UNBOUNDED,
            chunked_prefill=chunked_prefill,
            async_scheduling=async_scheduling,
        )
        has_tokenizer = (model_dir / "tokenizer.json").is_file()
        self._tokenizer = Tokenizer.from_directory(model_dir) if has_tokenizer else None
        self._eos_token_ids = ServedModel.from_directory(model_dir).eos_token_ids
        self._seeds = random.Random(seed)
        self._num_added = 0
        self._num_calls = 0
        self._open: dict[str, OutputBuilder] = {}
        self._unclaimed: list[GenerationOutput] = []
        """Outputs that finished while `generate` waited for its own."""
        self._outbox = _DeltaOutbox()
        self._runner = open_local_gang(options, tensor_parallel_size)
        self._grammars = GrammarCompiler.for_model(model_dir, self._runner.info.vocab_size)
        self._core = EngineCore(
            runner=self._runner,
            outbox=self._outbox,
            scheduler=scheduler,
            transfer=KvTransferConfig(),
            metrics=NullMetrics() if metrics is None else metrics,
            peer=PeerAddress(peer_id="local", endpoint="", epoch=0),
            prefix_caching=prefix_caching,
        )

    @property
    def info(self) -> RunnerInfo:
        """Sizes and automatic choices of the runner."""
        return self._runner.info

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[str] | None = None,
    ) -> list[GenerationOutput]:
        """Outputs of all prompts, in order; `n` consecutive ones per prompt.

        Raises InvalidRequest for a wrong prompt or parameter before anything runs. When a request ends with an error,
        all others are computed, and then the error of the first one is raised: InvalidRequest or Overloaded when the
        engine refused it, RequestFailed when it could not finish it.
        """
        wanted = self.add_request(prompts, sampling_params, request_ids=request_ids)
        outputs: dict[str, GenerationOutput] = {}
        while any(request_id in self._open for request_id in wanted):
            for output in self._step():
                if output["request_id"] in wanted:
                    outputs[output["request_id"]] = output
                else:
                    self._unclaimed.append(output)
        for request_id in wanted:
            if "error" in outputs[request_id]:
                error = outputs[request_id]["error"]
                raise error_of(replace(error, message=f"{request_id}: {error.message}"))
        return [outputs[request_id] for request_id in wanted]

    def add_request(
        self,
        prompt_or_tokens_list: str | Sequence[str] | Sequence[Sequence[int]],
        sampling_params_list: SamplingParams | Sequence[SamplingParams] | None = None,
        stream_callback: StreamCallback | None = None,
        request_ids: Sequence[str] | None = None,
    ) -> list[str]:
        """Queue prompts; `step` computes them. Returns the id of each output: with n > 1, `<id>-0`, `<id>-1`, ...

        `stream_callback` is called from `step`, once per new piece of each output. Raises InvalidRequest.
        """
        prompts = _as_list(prompt_or_tokens_list)
        samplings = _one_per_prompt(sampling_params_list, len(prompts))
        if request_ids is not None and len(request_ids) != len(prompts):
            raise InvalidRequest(f"{len(request_ids)} request ids for {len(prompts)} prompts", param="request_ids")
        requests = []
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings)):
            base_id = f"request-{self._num_added + i}" if request_ids is None else request_ids[i]
            requests += self._resolve(base_id, prompt, sampling)
        names = [request.request_id for request, _ in requests]
        if len(set(names)) < len(names) or not self._open.keys().isdisjoint(names):
            raise InvalidRequest("every output needs a request id of its own", param="request_ids")
        self._num_added += len(prompts)
        for request, stop_strings in requests:
            self._open[request.request_id] = OutputBuilder(
                request.request_id,
                num_prompt_tokens=len(request.token_ids),
                detokenizer=self._detokenizer(stop_strings, before=request.token_ids[-1]),
                stream_callback=stream_callback,
            )
            self._core.put(_CLIENT, request)
        return names

    def encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a prompt, checked. Raises InvalidRequest."""
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InvalidRequest("the model has no tokenizer.json: give token ids", param="prompt")
            token_ids = tuple(self._tokenizer.encode(prompt))
        else:
            token_ids = tuple(prompt)
        if not token_ids:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        if not 0 <= min(token_ids) <= max(token_ids) < self.info.vocab_size:
            raise InvalidRequest(f"token ids must be in [0, {self.info.vocab_size})", param="prompt")
        return token_ids

    def step(self) -> list[GenerationOutput]:
        """One iteration of the engine; the outputs that finished in it, or while `generate` waited for others."""
        finished, self._unclaimed = self._unclaimed, []
        return finished + self._step()

    def _step(self) -> list[GenerationOutput]:
        self._core.step()
        finished = []
        for delta in self._outbox.take():
            builder = self._open.get(delta.request_id)
            if builder is None:
                continue  # it ended at a stop string, and the engine had not heard of that yet
            builder.add(delta)
            if builder.finish_reason is None:
                continue
            del self._open[delta.request_id]
            finished.append(builder.finish())
            if delta.finish_reason is None:
                self._core.put(_CLIENT, CancelRequest(delta.request_id))
        return finished

    def is_finished(self) -> bool:
        """Whether every request that was added has finished, and its output was returned."""
        return not self._open and not self._unclaimed

    def print_mtp_statistics(self) -> None:
        """Print how many drafts came true since the engine started: overall, by position, and tokens per step."""
        print(self._core.drafts.describe())  # noqa: T201 - what it is for

    def start_profile(
        self, *, num_steps: int | None = None, with_stack: bool | None = None, record_shapes: bool | None = None
    ) -> None:
        """Record a trace of every step from now on, on every rank, until `stop_profile` or for `num_steps` steps.

        What is None is as in the engine's `profile` option, which says where traces go. Raises ProfileRefused when
        there is a window already, or no directory.
        """
        self._call(
            StartProfile(
                call_id=self._num_calls, num_steps=num_steps, with_stack=with_stack, record_shapes=record_shapes
            )
        )

    def stop_profile(self) -> list[Path]:
        """End the window; its traces, in order of rank, once they are written. Requests go on meanwhile.

        Raises ProfileRefused when there is no window or no trace, RequestFailed when only a part could not be written.
        """
        answer = self._call(StopProfile(call_id=self._num_calls))
        return [Path(file) for file in answer.files]

    def close(self) -> None:
        """Drop open requests and stop the runner; idempotent. Model and KV memory go with this object."""
        self._open.clear()
        self._unclaimed.clear()
        self._grammars.close()
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, message: StartProfile | StopProfile) -> ProfileAnswer:
        self._num_calls += 1
        self._core.put(_CLIENT, message)
        while (answer := self._outbox.take_answer()) is None:
            self._core.step(wait_s=_ANSWER_WAIT_S)
        if answer.error is not None and isinstance(message, StopProfile) and answer.files:
            raise RequestFailed(answer.error)
        if answer.error is not None:
            raise ProfileRefused(answer.error)
        return answer

    def _resolve(
        self, base_id: str, prompt: str | Sequence[int], sampling: SamplingParams
    ) -> list[tuple[EngineRequest, tuple[str, ...]]]:
        """The engine requests of one prompt, one per output, each with its stop strings; all values decided."""
        validate_sampling(sampling)
        token_ids = self.encode(prompt)
        # A request that could never fit the KV cache is refused now, like one that exceeds the context.
        context = min(self.info.max_model_len, self.info.max_request_tokens)
        room = context - len(token_ids)
        max_tokens = room if sampling.max_tokens is None else sampling.max_tokens
        least = 0 if sampling.max_tokens == 0 else 1
        if room < least or max_tokens > room:
            raise ContextLengthExceeded(
                f"{len(token_ids)} prompt and {max(max_tokens, least)} output tokens exceed a context of {context}",
                param="prompt" if room < least else "max_tokens",
            )
        if sampling.stop_strings and self._tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, which the model does not have", param="stop_strings")
        if sampling.grammar is not None:
            self._grammars.submit(sampling.grammar).result()
        seed = self._seeds.getrandbits(63) if sampling.seed is None else sampling.seed
        resolved = replace(sampling, max_tokens=max_tokens, n=1, stop_strings=(), seed=seed)
        return [
            (
                EngineRequest(
                    request_id=base_id if sampling.n == 1 else f"{base_id}-{index}",
                    token_ids=token_ids,
                    sampling=replace(resolved, seed=seed + index),
                    eos_token_ids=self._eos_token_ids,
                ),
                sampling.stop_strings,
            )
            for index in range(sampling.n)
        ]

    def _detokenizer(self, stop_strings: tuple[str, ...], *, before: int) -> IncrementalDetokenizer | None:
        if self._tokenizer is None:
            return None
        return IncrementalDetokenizer(self._tokenizer, stop_strings=stop_strings, before=before)


class _DeltaOutbox:
    """An `Outbox` that keeps token deltas and answers for the engine's owner. The rest is dropped: there is no router,
    no peer."""

    def __init__(self) -> None:
        self._deltas: deque[TokenDelta] = deque()
        self._answers: deque[ProfileAnswer] = deque()

    def send(self, destination: str | PeerAddress, message: EngineOutput) -> None:
        """Keep what is for our client."""
        if isinstance(message, TokenBatch):
            self._deltas.extend(message.deltas)
        elif isinstance(message, ProfileAnswer):
            self._answers.append(message)

    def take_answer(self) -> ProfileAnswer | None:
        """The oldest answer that was not taken."""
        return self._answers.popleft() if self._answers else None

    def take(self) -> list[TokenDelta]:
        """Deltas since the last call, in order."""
        taken = list(self._deltas)
        self._deltas.clear()
        return taken


def _as_list(prompts: str | Sequence[str] | Sequence[Sequence[int]]) -> list[str | Sequence[int]]:
    return [prompts] if isinstance(prompts, str) else list(prompts)


def _one_per_prompt(
    samplings: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams]:
    if samplings is None or isinstance(samplings, SamplingParams):
        return [samplings or SamplingParams()] * num_prompts
    if len(samplings) != num_prompts:
        raise InvalidRequest(f"{len(samplings)} sampling params for {num_prompts} prompts", param="sampling_params")
    return samplings


def _refuse_unknown(unknown: dict[str, Never]) -> None:
    if not unknown:
        return
    known = [name for name, p in inspect.signature(LLMEngine).parameters.items() if p.kind is p.KEYWORD_ONLY]
    name = next(iter(unknown))
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean `{nearest[0]}`?" if nearest else f"; options are {', '.join(known)}"
    raise TypeError(f"LLMEngine has no option `{name}`{hint}")
