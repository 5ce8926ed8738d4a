"""HTTP requests at the ingress: what clients see, network excepted."""

from __future__ import annotations

from atom_cluster.observability.metrics.kinds import FIRST_TOKEN_S, LATENCY_S, NUM_LONG_TOKENS, TOKEN_S, Metric

HTTP_REQUESTS = Metric(
    name="atom_http_requests_total",
    kind="counter",
    unit="requests",
    labels=("route", "status"),
    help="HTTP requests answered, by route template and status code. 499: the client left before its answer began.",
    advice="5xx: see `atom_http_errors_total`. 503: queues are full or nobody can serve. 4xx: clients err.",
)
HTTP_REQUESTS_OPEN = Metric(
    name="atom_http_requests_open",
    kind="gauge",
    unit="requests",
    help="HTTP requests being answered.",
    advice="Grows without end: engines do not keep up, see `atom_requests_waiting`.",
)
HTTP_ERRORS = Metric(
    name="atom_http_errors_total",
    kind="counter",
    unit="requests",
    labels=("kind",),
    help="Requests that ended with an error, in their status or within their stream, by class of "
    "`atom_cluster.errors`; internal: a bug.",
    advice="`internal`: the ingress's log has the traceback. Others: as `atom_request_errors_total`.",
)
HTTP_REQUEST_S = Metric(
    name="atom_http_request_seconds",
    kind="histogram",
    unit="s",
    labels=("route",),
    buckets=LATENCY_S,
    help="From a request's arrival at the ingress to its last byte being handed to the connection. Generation only.",
    advice="Follows the length of answers.",
)
HTTP_TTFT_S = Metric(
    name="atom_http_time_to_first_token_seconds",
    kind="histogram",
    unit="s",
    labels=("route",),
    buckets=FIRST_TOKEN_S,
    help="From a request's arrival at the ingress to its first token: being written, if it is streamed; else being "
    "there.",
    advice="The objective for interactive use. High: see queue, prefill and routing, in this order.",
)
HTTP_ITL_S = Metric(
    name="atom_http_inter_token_seconds",
    kind="histogram",
    unit="s",
    labels=("route",),
    buckets=TOKEN_S,
    help="Of streams: from one write with new tokens of an output to its next, whatever the number of tokens in it.",
    advice="What a reader feels as stutter. High while `atom_inter_token_latency_seconds` is not: the ingress is busy; "
    "more `serving.ingress_replicas`.",
)
HTTP_TPOT_S = Metric(
    name="atom_http_time_per_output_token_seconds",
    kind="histogram",
    unit="s",
    labels=("route",),
    buckets=TOKEN_S,
    help="Per output of two tokens or more: (last token - first token) / (tokens - 1), by the times of their writes if "
    "it is streamed.",
    advice="The objective for throughput per user.",
)
HTTP_PROMPT_TOKENS = Metric(
    name="atom_http_prompt_tokens",
    kind="histogram",
    unit="tokens",
    labels=("route",),
    buckets=NUM_LONG_TOKENS,
    help="Prompt tokens of a request, all its prompts together.",
    advice="The traffic's shape, for sizing prefill.",
)
HTTP_OUTPUT_TOKENS = Metric(
    name="atom_http_output_tokens",
    kind="histogram",
    unit="tokens",
    labels=("route",),
    buckets=NUM_LONG_TOKENS,
    help="Output tokens of a request, all its outputs together, also of one that was broken off.",
    advice="The traffic's shape, for sizing decode.",
)
REQUESTS_REPLAYED = Metric(
    name="atom_requests_replayed_total",
    kind="counter",
    unit="requests",
    help="Times a request went on with another engine, since its own was lost or would not take it.",
    advice="Only while replicas are replaced. Else: replicas refuse (full queues) or die.",
)
KEY_REQUESTS = Metric(
    name="atom_api_key_requests_total",
    kind="counter",
    unit="requests",
    labels=("key", "outcome"),
    help="HTTP requests by the name of their API key (anonymous without a valid one): admitted, or the limit or code "
    "for which they were refused.",
    advice="Many `invalid_api_key`: a client has an old key, or somebody tries keys. Limits: the key's owner needs "
    "higher ones, or fewer retries.",
)
KEY_TOKENS = Metric(
    name="atom_api_key_tokens_total",
    kind="counter",
    unit="tokens",
    labels=("key", "kind"),
    help="Tokens by the name of the API key that used them: prompt or output.",
    advice="Who uses the cluster; for limits and bills.",
)
