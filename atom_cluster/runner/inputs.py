"""StepPlan + rows -> the tensors of one forward pass. All index arithmetic is done on the host, then sent in one copy.

Token ids are the exception: they are gathered on the device, where the previous step left what it sampled and drafted.
Knows no model and no sampling. Shape suffixes as in `layers/forward_batch.py`; S rows that sample, P samples (one per
such row and draft to verify, and one more).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from atom_cluster.errors import ProtocolError
from atom_cluster.layers.forward_batch import AttentionMetadata, ForwardBatch, LayerCache, StateMetadata
from atom_cluster.messages.steps import RowStep, StepPlan
from atom_cluster.runner.host_tensors import send
from atom_cluster.runner.row_state import RowTable
from atom_cluster.units import ceil_div

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SamplingStep:
    """A row that samples in this step."""

    row: int
    position: int
    """Of its newest token before the drafts that the step verifies."""
    num_drafts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """A forward pass and where the tokens that it samples go. Tensors are int64 on the device."""

    batch: ForwardBatch
    sampling: tuple[SamplingStep, ...]
    """[S] on the host, in plan order."""
    token_row: torch.Tensor
    """[T]: row of each token."""
    step_row: torch.Tensor
    """[R]: row of each step."""
    sample_row: torch.Tensor
    """[P]: row of each sample."""
    sample_position: torch.Tensor
    """[P]: position that each sampled token will have in its row, if it is kept."""
    sampling_row: torch.Tensor
    """[S]: as in `sampling`, like the next two."""
    newest_position: torch.Tensor
    num_drafts: torch.Tensor
    first_sample: torch.Tensor
    """[S]: index into P of each row's first sample."""
    step_index: torch.Tensor
    """[S]: index into R of each row that samples."""

    @property
    def max_drafts(self) -> int:
        """Most drafts that a row verifies in this step."""
        return max((step.num_drafts for step in self.sampling), default=0)


class InputBuilder:
    """Builds the inputs of one rank's steps."""

    def __init__(self, *, table: RowTable, kv: tuple[LayerCache, ...], device: torch.device) -> None:
        self._table = table
        self._kv = kv
        self._device = device

    def build(self, plan: StepPlan) -> StepInputs:
        """Inputs of a plan with at least one row; `table` must have been brought up to date for it."""
        steps = plan.rows
        _check(steps)
        tokens = _token_arrays(steps)
        samples = _sample_arrays(steps, tokens)
        slots = {
            str(window): self._slots(window, tokens["token_row"], tokens["position"]) for window in self._table.pages
        }
        written = self._written_pages(steps, tokens["step_row"])
        sent = self._upload({**tokens, **samples, **slots, "written": written})
        batch = ForwardBatch(
            token_ids=self._table.tokens_at(sent["token_row"], sent["position"]),
            positions=sent["position"],
            attention=self._attention(
                num_decode_rows=_num_decode_rows(steps),
                query_start=sent["query_start"],
                query_start_cpu=tuple(tokens["query_start"].tolist()),
                rows=sent["step_row"],
                context_len=sent["end"],
                context_len_cpu=tuple(tokens["end"].tolist()),
                slots={window: sent[str(window)] for window in self._table.pages},
            ),
            caches=self._kv,
            sample_index=sent["sample_index"],
            state=self._state(steps, sent["step_row"], sent["written"]),
        )
        known = zip(
            samples["sampling_row"].tolist(), samples["newest_position"].tolist(), samples["num_drafts"].tolist()
        )
        return StepInputs(
            batch=batch,
            sampling=tuple(SamplingStep(*values) for values in known),
            token_row=sent["token_row"],
            step_row=sent["step_row"],
            sample_row=sent["sample_row"],
            sample_position=sent["sample_position"],
            sampling_row=sent["sampling_row"],
            newest_position=sent["newest_position"],
            num_drafts=sent["num_drafts"],
            first_sample=sent["first_sample"],
            step_index=sent["step_index"],
        )

    def build_single(
        self, row_S: torch.Tensor, position_S: torch.Tensor, token_S: torch.Tensor, *, longest: tuple[int, ...]
    ) -> ForwardBatch:
        """A pass over one token per row, at positions that only the device knows. Not for layers with states.

        longest: per row, the most tokens that it may have. What the metadata has for the host is that much on devices,
        and exact on CPUs.
        """
        size = self._table.block_size
        context_len_cpu = tuple((position_S + 1).tolist()) if self._device.type == "cpu" else longest
        num_rows = len(longest)
        slots = {
            window: table.device[row_S, position_S // size].to(torch.int64) * size + position_S % size
            for window, table in self._table.pages.items()
        }
        attention = self._attention(
            num_decode_rows=num_rows,
            query_start=torch.arange(num_rows + 1, device=self._device),
            query_start_cpu=tuple(range(num_rows + 1)),
            rows=row_S,
            context_len=position_S + 1,
            context_len_cpu=context_len_cpu,
            slots=slots,
        )
        nothing = torch.empty(0, dtype=torch.int64, device=self._device)
        return ForwardBatch(
            token_ids=token_S, positions=position_S, attention=attention, caches=self._kv, sample_index=nothing
        )

    def _attention(
        self,
        *,
        num_decode_rows: int,
        query_start: torch.Tensor,
        query_start_cpu: tuple[int, ...],
        rows: torch.Tensor,
        context_len: torch.Tensor,
        context_len_cpu: tuple[int, ...],
        slots: dict[int | None, torch.Tensor],
    ) -> dict[int | None, AttentionMetadata]:
        """Metadata by window; what does not differ between windows is shared."""
        num_columns = ceil_div(max(context_len_cpu), self._table.block_size)
        query_start, context_len = query_start.to(torch.int32), context_len.to(torch.int32)
        return {
            window: AttentionMetadata(
                block_size=self._table.block_size,
                window=window,
                num_decode_rows=num_decode_rows,
                query_start=query_start,
                context_len=context_len,
                block_table=table.device[:, :num_columns][rows],
                slot=slots[window],
                query_start_cpu=query_start_cpu,
                context_len_cpu=context_len_cpu,
            )
            for window, table in self._table.pages.items()
        }

    def _slots(self, window: int | None, row_of_token_T: IntArray, positions_T: IntArray) -> IntArray:
        size = self._table.block_size
        pages_T = self._table.pages[window].host[row_of_token_T, positions_T // size].astype(np.int64)
        return pages_T * size + positions_T % size

    def _written_pages(self, steps: tuple[RowStep, ...], rows_R: IntArray) -> IntArray:
        """[R * W] pages that states go to; nothing for a model without."""
        if self._table.states is None:
            return np.empty(0, dtype=np.int64)
        num_pages = self._table.states.written.shape[1] if any(step.num_drafts for step in steps) else 1
        written = self._table.states.written[rows_R, :num_pages]
        if written.min() < 0:
            row = int(rows_R[written.min(axis=1).argmin()])
            raise ProtocolError(f"row {row} has no pages for its states")
        return written.reshape(-1)

    def _state(self, steps: tuple[RowStep, ...], rows_R: torch.Tensor, written: torch.Tensor) -> StateMetadata | None:
        if self._table.states is None:
            return None
        return StateMetadata(
            read_page=self._table.states.newest[rows_R],
            write_page=written.view(len(steps), -1),
            keeps_all_cpu=tuple(step.num_drafts > 0 for step in steps),
        )

    def _upload(self, arrays: dict[str, IntArray]) -> dict[str, torch.Tensor]:
        """The arrays on the device, int64; on GPUs one asynchronous copy of all of them together."""
        if self._device.type == "cpu":
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        packed = send(torch.from_numpy(np.concatenate(list(arrays.values()))), self._device)
        return dict(zip(arrays, torch.split(packed, [len(array) for array in arrays.values()])))


def _token_arrays(steps: tuple[RowStep, ...]) -> dict[str, IntArray]:
    """The tokens of a step: by step (row, end, where its tokens start) and by token (row, position)."""
    step_row = np.array([step.row for step in steps])
    num_tokens = np.array([step.num_tokens for step in steps])
    end = np.array([step.start for step in steps]) + num_tokens
    query_start = _starts(num_tokens)
    return {
        "step_row": step_row,
        "end": end,
        "query_start": query_start,
        "token_row": np.repeat(step_row, num_tokens),
        "position": np.repeat(end - num_tokens, num_tokens) + _offsets(num_tokens, query_start),
    }


def _sample_arrays(steps: tuple[RowStep, ...], tokens: dict[str, IntArray]) -> dict[str, IntArray]:
    """The samples of a step: those of one row follow each other, from its newest token on."""
    step_index = np.array([i for i, step in enumerate(steps) if step.samples], dtype=np.int64)
    num_drafts = np.array([step.num_drafts for step in steps if step.samples], dtype=np.int64)
    newest_position = tokens["end"][step_index] - 1 - num_drafts
    newest_index = tokens["query_start"][1:][step_index] - 1 - num_drafts
    num_samples = num_drafts + 1
    first_sample = _starts(num_samples)
    offset = _offsets(num_samples, first_sample)
    return {
        "step_index": step_index,
        "num_drafts": num_drafts,
        "newest_position": newest_position,
        "sampling_row": tokens["step_row"][step_index],
        "first_sample": first_sample[:-1],
        "sample_index": np.repeat(newest_index, num_samples) + offset,
        "sample_row": np.repeat(tokens["step_row"][step_index], num_samples),
        "sample_position": np.repeat(newest_position + 1, num_samples) + offset,
    }


def _starts(counts: IntArray) -> IntArray:
    """Where each of several runs of these lengths starts when they are laid one behind the other; and their end."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _offsets(counts: IntArray, starts: IntArray) -> IntArray:
    """For each place in these runs, how far it is from its run's start."""
    return np.arange(starts[-1]) - np.repeat(starts[:-1], counts)


def _num_decode_rows(steps: tuple[RowStep, ...]) -> int:
    """How many leading rows have exactly one query token."""
    for i, step in enumerate(steps):
        if step.num_tokens != 1:
            return i
    return len(steps)


def _check(steps: tuple[RowStep, ...]) -> None:
    for step in steps:
        if step.num_drafts and (not step.samples or step.num_tokens != step.num_drafts + 1):
            raise ProtocolError(f"row {step.row} verifies {step.num_drafts} drafts in {step.num_tokens} tokens")
