"""The cluster around the engines: ingress, router, supervision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from atom_cluster.config.base import FrozenConfig
from atom_cluster.config.protection import ProtectionConfig

ToolParserName = Literal[
    "auto",
    "none",
    "hermes",
    "qwen3_coder",
    "deepseek_v3",
    "deepseek_v31",
    "deepseek_v32",
    "deepseek_v4",
    "glm",
    "kimi_k2",
    "minimax_m2",
    "harmony",
    "llama3_json",
    "pythonic",
    "mistral",
    "json",
]
ReasoningParserName = Literal["auto", "none", "think", "interleaved_think", "mistral", "harmony"]


class ServingConfig(FrozenConfig):
    """Processes and their supervision."""

    ingress_replicas: int = Field(1, ge=1)
    """Processes that speak HTTP, tokenize and stream."""
    announce_period_s: float = Field(0.5, gt=0)
    """How often members announce themselves to the router."""
    member_timeout_s: float = Field(3.0, gt=0)
    """A member that has not announced itself for this long is left out."""
    ping_period_s: float = Field(1.0, gt=0)
    """How often a client of an engine pings it."""
    client_timeout_s: float = Field(5.0, gt=0)
    """An engine ends the requests of an ingress that has not pinged for this long, and the reverse."""
    health_check_period_s: float = Field(1.0, gt=0)
    """How often a replica's gang is checked."""
    health_check_timeout_s: float = Field(5.0, gt=0)
    """A process that does not answer a check within this has failed it; after the third time in a row it is replaced.
    So one that stands still, rather than being dead, is gone after about three times this."""
    fence_after_s: float = Field(10.0, gt=0)
    """An ingress that the router has not heard for so long, while others have taken its place, is ended by force: it
    holds the connections of its clients and answers none."""
    start_timeout_s: float = Field(600.0, gt=0)
    """A gang that is not ready by then is torn down and started again."""
    drain_timeout_s: float = Field(60.0, ge=0)
    """An engine replica told to stop finishes its requests within this time; what is left then goes on with another."""
    request_timeout_s: float = Field(600.0, gt=0)
    """A request that has not finished by then ends with a timeout error. An ingress told to stop stays so long, while
    it has requests."""

    @model_validator(mode="after")
    def _timeouts_outlast_periods(self) -> ServingConfig:
        if self.member_timeout_s <= self.announce_period_s:
            raise ValueError(
                "member_timeout_s must be above announce_period_s, or members vanish between announcements"
            )
        if self.fence_after_s <= 2 * self.announce_period_s:
            raise ValueError("fence_after_s must be above two announce_period_s, or it mistakes a pause for silence")
        if self.client_timeout_s <= self.ping_period_s:
            raise ValueError("client_timeout_s must be above ping_period_s, or clients vanish between pings")
        return self


class ApiConfig(FrozenConfig):
    """Limits of the HTTP API."""

    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024)
    """Larger bodies are answered with 413."""
    body_timeout_s: float = Field(30.0, gt=0)
    """A client that has not sent its whole body by then is answered with 408."""
    write_timeout_s: float = Field(60.0, gt=0)
    """A streaming client that takes nothing for this long, while there is something to take, is cut off."""
    protection: ProtectionConfig = ProtectionConfig()
    """API keys and what each may use."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longest prompt; null: as long as the model's context."""
    max_n: int = Field(16, ge=1)
    """Most outputs per prompt (`n`)."""
    max_prompts: int = Field(64, ge=1)
    """Most prompts in one /v1/completions request."""
    chat_template: str | None = None
    """A Jinja file that is used instead of the checkpoint's own chat template, or where it has none. The same path on
    every node with an ingress."""
    max_tools: int = Field(128, ge=1)
    """Most tools in one request."""
    max_tool_bytes: int = Field(256 * 1024, ge=1024)
    """Most bytes of all of a request's tools, as JSON."""
    max_tool_depth: int = Field(32, ge=4)
    """Deepest nesting of a tool's parameters."""
    tool_parser: ToolParserName = "auto"
    """How the model writes tool calls. auto: what its chat template shows; none: calls are left in the content."""
    reasoning_parser: ReasoningParserName = "auto"
    """How the model marks reasoning. auto: what its chat template or its vocabulary has; none: it is left in the
    content."""
    max_logprobs: int = Field(20, ge=0)
    """Most alternatives per token (`top_logprobs`, `logprobs`, `prompt_logprobs`)."""
    max_prompt_scores: int = Field(32_768, ge=1, le=2**21)
    """Most log probabilities of prompt tokens in one answer (`prompt_logprobs`, `echo`), those of alternatives
    included: tokens of all prompts, times `n`, times one more than the alternatives to each."""
    max_stop_strings: int = Field(16, ge=0)
    """Most stop strings in one request."""
    max_stop_chars: int = Field(256, ge=1)
    """Longest single stop string."""
    max_logit_biases: int = Field(300, ge=0)
    """Most entries of `logit_bias`."""
    max_grammar_bytes: int = Field(64 * 1024, ge=64, le=256 * 1024)
    """Longest JSON schema, regular expression, list of choices or grammar of structured output."""
    grammar_timeout_s: float = Field(5.0, gt=0)
    """A grammar that takes longer to compile is refused. Compiling has limits of its own as well: it ends."""
    default_max_tokens: int | None = Field(None, ge=1)
    """`max_tokens` when a request names none; None: whatever the context leaves."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: temperature, top_p, top_k, min_p and repetition_penalty of the model's generation_config.json where a
    request names none; none: the usual ones (temperature 1, no truncation). The model's end tokens hold either way."""
    tokenizer_threads: int = Field(1, ge=1)
    """Threads that tokenize and render templates, off the event loop."""
    coalesce_ms: float = Field(0.0, ge=0)
    """Wait this long for more tokens before writing an SSE event; 0 writes what has arrived at once."""
