"""One forward pass as data. The scheduler never sees a tensor; the runner never decides policy.

Rows. A runner keeps per-request state (tokens, block table, sampling state) in numbered rows, `0 <= row <
max_num_requests`. A request enters a row once (`NewRow`, carrying everything) and is then advanced by `RowStep`s that
carry only what changed. Sampled tokens are appended to the row by the runner itself, so step t+1 can be planned and
submitted before the tokens of step t are known to the scheduler (asynchronous scheduling).

Pages. A request holds pages of every cache group of the model (`kv_cache.layout`), and the runner keeps a row's page
table per group. Ids count within a group. In groups of kind full and window, column i of a table holds the page of
positions [i * block_size, (i + 1) * block_size); new ids are appended. Columns behind a window may name pages that
belong to others by now: they are not read. In the state group a table holds the pages that the row's states are written
to, one or, with speculation, 1 + k of them; new ids replace the old ones, after the step's first state has been read
from where the row's newest state is.

Speculation. After each step in which it samples, the runner drafts up to k tokens for the row and keeps them. A later
`RowStep` with `num_drafts` computes the newest token and so many drafts behind it, samples after each, and keeps the
tokens up to and including the first that differs from its draft. What it wrote for drafts that were not kept is
overwritten by the row's next step, which starts behind the last kept token.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from atom_cluster.messages.grammars import GrammarCommand
from atom_cluster.messages.profile import WindowCommand
from atom_cluster.messages.requests import PromptScore, SamplingParams, TokenLogprobs
from atom_cluster.messages.transfer import KvCommand


class NewRow(Struct, frozen=True, kw_only=True, array_like=True):
    """A request enters the batch: freshly admitted, resumed after preemption, or arriving from prefill."""

    row: int
    request_id: str
    token_ids: tuple[int, ...]
    """All tokens known so far: prompt, then any output tokens already produced (preemption, remote prefill)."""
    num_prompt_tokens: int
    pages: tuple[tuple[int, ...], ...]
    """Per cache group. Window groups: columns that no step of the row reads name page 0. State group: empty, or the
    page that holds the state before the row's first step, which only reads it; it brings its own pages to write to."""
    sampling: SamplingParams
    """With an integer seed. If it has a grammar, `grammar_id` says which, and not its text, which may be missing."""
    eos_token_ids: tuple[int, ...] = ()
    """Needed by the runner only for `sampling.min_tokens`."""
    drafts: tuple[int, ...] = ()
    """Tokens that another engine drafted behind `token_ids`."""
    grammar_id: int | None = None
    """What an earlier plan or this one has every rank compile under this id. The row samples only in plans that are
    made after the ranks' `GrammarReady`."""


class RowStep(Struct, frozen=True, array_like=True):
    """Compute positions [start, start + num_tokens) of a row, and sample after the last one if `samples`.

    The last `num_drafts` of them are the row's first drafts, of which it has at least that many; then `samples` is set,
    and it samples after each of the last `num_drafts + 1` positions.

    A row that samples after each of its positions goes on behind its newest token, wherever that is: while plans in
    flight verify its drafts, only the runner knows, and `start` is the most that it can be.
    """

    row: int
    start: int
    num_tokens: int
    samples: bool
    new_pages: tuple[tuple[int, ...], ...] = ()
    """Per cache group, brought into the row's tables before the step runs; empty when no group has any."""
    num_drafts: int = 0


class StepPlan(Struct, frozen=True, kw_only=True):
    """What the next forward pass does. Plans are executed in order of `step_id`, results come back in that order."""

    step_id: int
    freed_rows: tuple[int, ...] = ()
    """Rows whose request ended or was preempted; processed before `new_rows`, which may reuse them."""
    new_rows: tuple[NewRow, ...] = ()
    rows: tuple[RowStep, ...] = ()
    """Rows of one token first, then those with drafts, then chunks. A row appears at most once."""
    kv: tuple[KvCommand, ...] = ()
    """KV transfer commands, executed by every rank after the forward pass of this plan was issued."""
    profile: WindowCommand | None = None
    """Executed by every rank before the forward pass."""
    grammars: tuple[GrammarCommand, ...] = ()
    """Executed by every rank before the forward pass, which does not wait for what they begin."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return sum(row.num_tokens for row in self.rows)


class SampledTokens(Struct, frozen=True, array_like=True):
    """Output of one sampling row: one token, or several accepted ones under speculation."""

    row: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    drafts: tuple[int, ...] = ()
    """What the runner drafted behind them, and keeps for the row's next step."""
    error: str | None = None
    """Why the row cannot go on, of which there is one reason: its grammar. Its tokens are not to be used."""


class PromptScores(Struct, frozen=True, array_like=True):
    """Of a row that asks for them: scores of the prompt tokens behind those that the step computed."""

    row: int
    start: int
    """The row's first position that the step computed: the first score is that of the token at `start + 1`."""
    scores: tuple[PromptScore, ...]


Execution = Literal["eager", "graph", "pieces", "simulated"]
"""Kernel by kernel; as a graph; as pieces of graphs with eager attention between; not at all."""


class StepResult(Struct, frozen=True, kw_only=True):
    """What came out of the plan with the same `step_id`."""

    step_id: int
    sampled: tuple[SampledTokens, ...] = ()
    """One entry per row with `samples`, in plan order."""
    prompt_scores: tuple[PromptScores, ...] = ()
    """At most one entry per chunk, in plan order, and no more scores than the step has tokens."""
    run_s: float = 0.0
    """Seconds the runner spent on the step, for metrics."""
    execution: Execution = "eager"
    """How rank 0 ran it, for metrics."""
    compiled: tuple[tuple[str, float], ...] = ()
    """Kernels that rank 0 had to compile or load for it, and the seconds that took: `run_s` says little then."""
