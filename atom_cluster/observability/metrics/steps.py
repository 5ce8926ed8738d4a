"""What an engine's runner does: steps, speculation, graphs, memory."""

from __future__ import annotations

from atom_cluster.observability.metrics.kinds import NUM_TOKENS, STEP_SECONDS, Metric

STEP_S = Metric(
    name="atom_step_seconds",
    kind="histogram",
    unit="s",
    labels=("kind",),
    buckets=STEP_SECONDS,
    help="Time the runner spent on one step. Kinds: prefill (prompts only), decode (no prompts), mixed.",
    advice="`decode` is the floor of the inter-token latency. `mixed` far above it: smaller chunks of prompts "
    "(`scheduler.max_num_batched_tokens`).",
)
STEP_TOKENS = Metric(
    name="atom_step_tokens",
    kind="histogram",
    unit="tokens",
    labels=("kind",),
    buckets=NUM_TOKENS,
    help="Tokens computed by one step.",
    advice="Prefill steps far below the budget while tokens wait: blocks are short, or prompts are held back.",
)
DEVICE_WAIT_S = Metric(
    name="atom_device_wait_seconds_total",
    kind="counter",
    unit="s",
    help="Between a step's earliest possible begin (it was submitted, the one before had ended) and its result, beyond "
    "the time the runner spent on it: what the device waited for the host.",
    advice="More than 5 % of `atom_step_seconds_sum`: the host is too slow. Cores for rank 0, graphs.",
)
KERNELS_COMPILED = Metric(
    name="atom_kernels_compiled_total",
    kind="counter",
    unit="kernels",
    help="Kernels that a step had to compile or load on rank 0, while all its rows waited.",
    advice="Growing while requests are served: the log names the kernels; `compilation.capture: start` has them "
    "compiled before the first request.",
)
STEPS = Metric(
    name="atom_steps_total",
    kind="counter",
    unit="steps",
    labels=("execution",),
    help="Steps by how rank 0 ran them: eager, graph (all of it replayed), pieces (replayed but for attention) or "
    "simulated.",
    advice="`eager` on GPUs for steps that only decode: a size was not captured; /v1/cluster says why (`graphs`).",
)
GRAPHS_CAPTURED = Metric(
    name="atom_graphs_captured",
    kind="gauge",
    unit="sizes",
    labels=("kind",),
    help="Sizes of steps captured when rank 0 started: graph or pieces.",
    advice="0 on GPUs: graphs are off or could not be captured; decode is slower.",
)
GRAPH_CAPTURE_S = Metric(
    name="atom_graph_capture_seconds",
    kind="gauge",
    unit="s",
    help="What capturing them took, a part of the start.",
    advice="Restarts take too long: fewer sizes, or `compilation.capture: lazy`.",
)
MEMORY_BYTES = Metric(
    name="atom_memory_bytes",
    kind="gauge",
    unit="bytes",
    labels=("use",),
    help="Memory of rank 0 by use: weights, kv, graphs. Other ranks have as much.",
    advice="`kv` small beside `weights`: few requests fit; split the model over more devices or quantize it.",
)
START_S = Metric(
    name="atom_start_seconds",
    kind="gauge",
    unit="s",
    labels=("part",),
    help="What the parts of rank 0's start took: join, load, compile, cache, capture, warm up.",
    advice="`load` large: weights on slow storage.",
)
SPEC_DRAFT_TOKENS = Metric(
    name="atom_spec_draft_tokens_total",
    kind="counter",
    unit="tokens",
    labels=("position",),
    help="Drafts verified, by their position behind the sampled token, from 0.",
    advice="The denominator of the acceptance rate.",
)
SPEC_ACCEPTED_TOKENS = Metric(
    name="atom_spec_accepted_tokens_total",
    kind="counter",
    unit="tokens",
    labels=("position",),
    help="Drafts verified and kept, by their position behind the sampled token, from 0.",
    advice="A position below 0.3 of its drafts costs more than it brings: fewer `speculative.num_tokens`.",
)
SPEC_ACCEPTED_LENGTH = Metric(
    name="atom_spec_accepted_length_tokens",
    kind="histogram",
    unit="tokens",
    buckets=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0),
    help="Tokens that one step of a row with drafts brought, its sampled one included.",
    advice="A mean near 1: drafts are of no use for this traffic.",
)
