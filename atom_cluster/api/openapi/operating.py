"""Operations of the routes that do not generate, with examples. A test posts each and checks its answer."""

from __future__ import annotations

from typing import Any

from atom_cluster.api.openai.wire import ModelCard, ModelList
from atom_cluster.api.openapi.operation import BODY_ERRORS, READ_ERRORS, SERVED_MODEL, Example, Operation
from atom_cluster.api.operating.profile_types import ProfileRequest, ProfileTarget
from atom_cluster.api.operating.tokenization_types import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from atom_cluster.observability.timeline import Timeline

_STATUS: dict[str, Any] = {
    "type": "object",
    "properties": {"status": {"type": "string", "description": "ok or ready."}},
    "required": ["status"],
}
_OBJECT: dict[str, Any] = {"type": "object"}

TOKENIZE = Operation(
    tag="Tokenization",
    summary="Tokens of a text or a conversation",
    description="In the shape of vLLM's server.",
    request=TokenizeRequest,
    answer=TokenizeAnswer,
    errors=BODY_ERRORS,
    examples=(
        Example(
            summary="A text",
            request={"model": SERVED_MODEL, "prompt": "Hello", "return_token_strs": True},
            answer={"count": 1, "max_model_len": 8192, "tokens": [19556], "token_strs": ["Hello"]},
        ),
        Example(
            summary="A conversation",
            request={"model": SERVED_MODEL, "messages": [{"role": "user", "content": "Hello"}]},
            answer={"count": 3, "max_model_len": 8192, "tokens": [1, 19556, 2], "token_strs": None},
        ),
    ),
)
DETOKENIZE = Operation(
    tag="Tokenization",
    summary="The text of token ids",
    description="In the shape of vLLM's server. With the texts of special tokens.",
    request=DetokenizeRequest,
    answer=DetokenizeAnswer,
    errors=BODY_ERRORS,
    examples=(
        Example(
            summary="Token ids", request={"model": SERVED_MODEL, "tokens": [1, 2]}, answer={"prompt": "Hello there"}
        ),
    ),
)
MODELS = Operation(tag="Models", summary="The models that are served: one", answer=ModelList)
MODEL = Operation(
    tag="Models",
    summary="The model that is served",
    answer=ModelCard,
    path_params={"model_id": "The model's name."},
    errors=(*READ_ERRORS, 404),
)
HEALTH = Operation(
    tag="Operation",
    summary="Whether this process answers",
    description="Says nothing of the engines; see /ready.",
    answer=_STATUS,
    errors=(),
    is_open=True,
)
READY = Operation(
    tag="Operation",
    summary="Whether a generation goes through",
    answer=_STATUS,
    errors=(503,),
    is_open=True,
)
CLUSTER = Operation(
    tag="Operation",
    summary="Replicas, roles, load, and why each automatic choice was made",
    answer=_OBJECT,
)
METRICS = Operation(tag="Operation", summary="Metrics for Prometheus", media_type="text/plain")
STATUS_PAGE = Operation(tag="Operation", summary="A page that shows the cluster", media_type="text/html")
TIMELINE = Operation(
    tag="Operation",
    summary="Where the time of one of the latest requests went",
    description="Spans of each output follow each other and add up to `latency_s`.",
    answer=Timeline,
    path_params={"request_id": "The answer's id, or the request's."},
    errors=(*READ_ERRORS, 404, 503),
)
START_PROFILE = Operation(
    tag="Operation",
    summary="Open profiler windows in engines",
    description="The body is optional. Where it is a generation request, as load generators send to this route, it "
    "says nothing: all engines are meant.",
    request=ProfileRequest,
    is_body_optional=True,
    answer=_OBJECT,
    errors=(*BODY_ERRORS, 409),
    examples=(
        Example(
            summary="Ten steps of those that decode",
            request={"roles": ["decode"], "num_steps": 10},
            answer={"replicas": [{"replica": "decode-1"}]},
        ),
    ),
)
STOP_PROFILE = Operation(
    tag="Operation",
    summary="Close profiler windows",
    description="As /start_profile.",
    request=ProfileTarget,
    is_body_optional=True,
    answer=_OBJECT,
    errors=(*BODY_ERRORS, 409),
    examples=(Example(summary="All", request={}, answer={"replicas": [{"replica": "decode-1"}]}),),
)
