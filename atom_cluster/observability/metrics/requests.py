"""Requests, as the engine that answers them sees them."""

from __future__ import annotations

from atom_cluster.observability.metrics.kinds import LATENCY_S, Metric

REQUESTS_RUNNING = Metric(
    name="atom_requests_running",
    kind="gauge",
    unit="requests",
    help="Requests that hold a row of the runner.",
    advice="At `scheduler.max_num_requests` for long while requests wait: more rows, or more replicas.",
)
REQUESTS_WAITING = Metric(
    name="atom_requests_waiting",
    kind="gauge",
    unit="requests",
    labels=("reason",),
    help="Requests admitted and not running yet. new: not scheduled so far. preempted: gave up its blocks. kv_arrived: "
    "its KV came from prefill, it waits for a row. kv_room: waits for blocks before prefill is asked. grammar: its "
    "grammar is being compiled.",
    advice="Near `scheduler.max_waiting_requests`: answers of 503 follow. Grow the role whose queue it is; `preempted` "
    "and `kv_room` say that blocks are short, not compute.",
)
REQUESTS_REMOTE = Metric(
    name="atom_requests_remote",
    kind="gauge",
    unit="requests",
    help="Requests of a decode engine whose prompt is at prefill, or whose KV is on its way.",
    advice="Grows while prefill's `atom_waiting_tokens` grows: prefill is short. Grows alone: look at the transfer.",
)
WAITING_TOKENS = Metric(
    name="atom_waiting_tokens",
    kind="gauge",
    unit="tokens",
    help="Prompt tokens not computed yet, of waiting and running requests.",
    advice="Divided by prompt tokens per second it is the wait for a first token. Grows without end: add prefill.",
)
REQUESTS_FINISHED = Metric(
    name="atom_requests_finished_total",
    kind="counter",
    unit="requests",
    labels=("reason",),
    help="Requests that ended, by finish reason: stop, length, abort or error.",
    advice="`error`: see `atom_request_errors_total`. Many `abort`: clients give up, usually since they wait too long.",
)
REQUEST_ERRORS = Metric(
    name="atom_request_errors_total",
    kind="counter",
    unit="requests",
    labels=("kind",),
    help="Requests that an engine refused or could not finish, by class of `atom_cluster.errors`.",
    advice="`Overloaded`: queues are full, add replicas. `EngineLost`: a gang failed, see its log. `RequestTimeout`: "
    "deadlines are shorter than the queue. `InvalidRequest`: clients err.",
)
TTFT_S = Metric(
    name="atom_time_to_first_token_seconds",
    kind="histogram",
    unit="s",
    buckets=LATENCY_S,
    help="From a request's arrival at its engine to its first token.",
    advice="Compare with `atom_http_time_to_first_token_seconds`: between are tokenizing, routing and the link.",
)
ITL_S = Metric(
    name="atom_inter_token_latency_seconds",
    kind="histogram",
    unit="s",
    buckets=LATENCY_S,
    help="From one token of a request to its next.",
    advice="Above the objective: too many rows per step, or prompts computed between (`atom_step_seconds` of `mixed`).",
)
E2E_S = Metric(
    name="atom_request_seconds",
    kind="histogram",
    unit="s",
    buckets=LATENCY_S,
    help="From a request's arrival at its engine to its end.",
    advice="Follows the length of answers; look at the two above for what is slow.",
)
QUEUE_S = Metric(
    name="atom_request_queue_seconds",
    kind="histogram",
    unit="s",
    buckets=LATENCY_S,
    help="From a request's arrival at its engine to its first being scheduled or handed to prefill.",
    advice="A large part of the time to first token: the engine lacks rows or blocks; see `atom_requests_waiting`.",
)
GRAMMAR_WAIT_S = Metric(
    name="atom_grammar_wait_seconds",
    kind="histogram",
    unit="s",
    buckets=LATENCY_S,
    help="How long a request could have gone on but for its grammar, which was being compiled. Only of those that "
    "waited; others did not wait for them.",
    advice="A few steps are usual for a grammar that is new. Near a second: clients send large grammars, and each a "
    "new one; a lower `api.grammar_timeout_s` refuses the worst.",
)
PROMPT_TOKENS = Metric(
    name="atom_prompt_tokens_total",
    kind="counter",
    unit="tokens",
    help="Prompt tokens of admitted requests.",
    advice="The load. For capacity per replica compare it with `atom_waiting_tokens`.",
)
GENERATION_TOKENS = Metric(
    name="atom_generation_tokens_total",
    kind="counter",
    unit="tokens",
    help="Output tokens emitted.",
    advice="Falls while requests run: steps got slower, or rows are preempted again and again.",
)
REQUESTS_MOVED = Metric(
    name="atom_requests_moved_total",
    kind="counter",
    unit="requests",
    help="Requests that a draining engine gave up, for others to go on with.",
    advice="Only while replicas are stopped or upgraded. Many of them: a longer `serving.drain_timeout_s`.",
)
