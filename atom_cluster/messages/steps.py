"""One forward pass as data. The scheduler never sees a tensor; the runner never decides policy.

Rows. A runner keeps per-request state (tokens, block table, sampling state) in numbered rows, `0 <= row <
max_num_requests`. A request enters a row once (`NewRow`, carrying everything) and is then advanced by `RowStep`s that
carry only what changed. Sampled tokens are appended to the row by the runner itself, so step t+1 can be planned and
submitted before the tokens of step t are known to the scheduler (asynchronous scheduling).
"""

from __future__ import annotations

from msgspec import Struct

from atom_cluster.messages.requests import SamplingParams, TokenLogprobs
from atom_cluster.messages.transfer import KvCommand


class NewRow(Struct, frozen=True, kw_only=True, array_like=True):
    """A request enters the batch: freshly admitted, resumed after preemption, or arriving from prefill."""

    row: int
    request_id: str
    token_ids: tuple[int, ...]
    """All tokens known so far: prompt, then any output tokens already produced (preemption, remote prefill)."""
    num_prompt_tokens: int
    block_ids: tuple[int, ...]
    """Blocks holding or about to hold KV of positions 0, 1, 2, ..."""
    sampling: SamplingParams
    """With an integer seed."""
    eos_token_ids: tuple[int, ...] = ()
    """Needed by the runner only for `sampling.min_tokens`."""


class RowStep(Struct, frozen=True, array_like=True):
    """Compute KV of positions [start, start + num_tokens) of a row, and sample after the last one if `samples`."""

    row: int
    start: int
    num_tokens: int
    samples: bool
    new_block_ids: tuple[int, ...] = ()
    """Appended to the row's block table before the step runs."""


class StepPlan(Struct, frozen=True, kw_only=True):
    """What the next forward pass does. Plans are executed in order of `step_id`, results come back in that order."""

    step_id: int
    freed_rows: tuple[int, ...] = ()
    """Rows whose request ended or was preempted; processed before `new_rows`, which may reuse them."""
    new_rows: tuple[NewRow, ...] = ()
    rows: tuple[RowStep, ...] = ()
    """Decodes first, then prefill chunks. A row appears at most once."""
    kv: tuple[KvCommand, ...] = ()
    """KV transfer commands, executed by every rank after the forward pass of this plan was issued."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return sum(row.num_tokens for row in self.rows)


class SampledTokens(Struct, frozen=True, array_like=True):
    """Output of one sampling row: one token, or several accepted ones under speculation."""

    row: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


class StepResult(Struct, frozen=True, kw_only=True):
    """What came out of the plan with the same `step_id`."""

    step_id: int
    sampled: tuple[SampledTokens, ...] = ()
    """One entry per row with `samples`, in plan order."""
    run_s: float = 0.0
    """Seconds the runner spent on the step, for metrics."""
