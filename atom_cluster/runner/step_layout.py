"""StepLayout: the part of a step that the host decides. Which rows, how many tokens of each, which of them sample.

Where a row's newest token is, is not among it: with speculation, only the device knows how many drafts were kept. So
positions of rows that sample are counted from there, and this file knows bounds of them. All arrays of a step go to the
device in one copy. Shape suffixes: R rows of the step, T tokens, S rows that sample, P samples (one per such row and
draft to verify, and one more).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from atom_cluster.errors import ProtocolError
from atom_cluster.messages.steps import RowStep
from atom_cluster.ops.step_inputs import StepRows
from atom_cluster.runner.host_tensors import send

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SamplingStep:
    """A row that samples in this step."""

    row: int
    position: int
    """Of its newest token before the drafts that the step verifies; the most that it can be, where plans in flight
    verify drafts of the row."""
    num_drafts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLayout:
    """See the module's docstring. Tensors are int64 on the device."""

    rows: StepRows
    num_decode_rows: int
    """The first rows, each with exactly one token."""
    query_start_cpu: tuple[int, ...]
    end_cpu: tuple[int, ...]
    """[R]: the most tokens that each row may have behind this step's last one."""
    verifies_cpu: tuple[bool, ...]
    """[R]: whether the row verifies drafts."""
    samples_all: bool
    """Whether there is a sample behind every token, so that T == P."""
    sampling: tuple[SamplingStep, ...]
    """[S], in plan order."""
    step_index: torch.Tensor
    """[S]: index into R of each row that samples."""
    num_drafts: torch.Tensor
    """[S]"""
    first_sample: torch.Tensor
    """[S]: index into P of each row's first sample."""
    sample_index: torch.Tensor
    """[P]: index into T of each sample."""
    written: torch.Tensor
    """[R, W]: pages that states go to; W == 0 for a model without states."""

    @property
    def max_drafts(self) -> int:
        """Most drafts that a row verifies in this step."""
        return max((step.num_drafts for step in self.sampling), default=0)


def lay_out(steps: Sequence[RowStep], written: npt.NDArray[np.int64] | None, device: torch.device) -> StepLayout:
    """The layout of these rows. written: [rows of the step, W], None for a model without states.

    Rows that sample behind each of their tokens start where the device says.
    """
    _check(steps)
    num_tokens = np.array([step.num_tokens for step in steps])
    query_start = _starts(num_tokens)
    is_decoding = [step.samples and step.num_tokens == step.num_drafts + 1 for step in steps]
    step_index = np.array([i for i, step in enumerate(steps) if step.samples], dtype=np.int64)
    num_drafts = np.array([step.num_drafts for step in steps if step.samples], dtype=np.int64)
    num_samples = num_drafts + 1
    first_sample = _starts(num_samples)
    newest_index = query_start[1:][step_index] - num_samples
    arrays = {
        "row": np.array([step.row for step in steps]),
        "start": np.array([-1 if decodes else step.start for step, decodes in zip(steps, is_decoding)]),
        "query_start": query_start,
        "step_index": step_index,
        "num_drafts": num_drafts,
        "first_sample": first_sample[:-1],
        "sample_index": np.repeat(newest_index, num_samples) + _offsets(num_samples, first_sample),
        "written": np.empty(0, dtype=np.int64) if written is None else written.reshape(-1),
    }
    sent = _upload(arrays, device)
    return StepLayout(
        rows=StepRows(
            row=sent["row"],
            start=sent["start"],
            query_start=sent["query_start"].to(torch.int32),
            num_tokens=int(query_start[-1]),
        ),
        num_decode_rows=_num_decode_rows(steps),
        query_start_cpu=tuple(query_start.tolist()),
        end_cpu=tuple(step.start + step.num_tokens for step in steps),
        verifies_cpu=tuple(step.num_drafts > 0 for step in steps),
        samples_all=all(is_decoding),
        sampling=sampling_steps(steps),
        step_index=sent["step_index"],
        num_drafts=sent["num_drafts"],
        first_sample=sent["first_sample"],
        sample_index=sent["sample_index"],
        written=sent["written"].view(len(steps), -1),
    )


def sampling_steps(steps: Sequence[RowStep]) -> tuple[SamplingStep, ...]:
    """Those of them that sample."""
    return tuple(
        SamplingStep(step.row, step.start + step.num_tokens - 1 - step.num_drafts, step.num_drafts)
        for step in steps
        if step.samples
    )


def _upload(arrays: dict[str, IntArray], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays on the device, int64; on GPUs one asynchronous copy of all of them together."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    # Each begins at a multiple of 16 bytes, whatever the others' lengths: kernels are compiled for that.
    starts = _starts(np.array([len(array) + len(array) % 2 for array in arrays.values()]))
    packed = np.zeros(starts[-1], dtype=np.int64)
    for start, array in zip(starts, arrays.values()):
        packed[start : start + len(array)] = array
    sent = send(torch.from_numpy(packed), device)
    return {name: sent[start : start + len(array)] for start, (name, array) in zip(starts, arrays.items())}


def _starts(counts: IntArray) -> IntArray:
    """Where each of several runs of these lengths starts when they are laid one behind the other; and their end."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _offsets(counts: IntArray, starts: IntArray) -> IntArray:
    """For each place in these runs, how far it is from its run's start."""
    return np.arange(starts[-1]) - np.repeat(starts[:-1], counts)


def _num_decode_rows(steps: Sequence[RowStep]) -> int:
    """How many leading rows have exactly one query token."""
    for i, step in enumerate(steps):
        if step.num_tokens != 1:
            return i
    return len(steps)


def _check(steps: Sequence[RowStep]) -> None:
    for step in steps:
        if step.num_drafts and (not step.samples or step.num_tokens != step.num_drafts + 1):
            raise ProtocolError(f"row {step.row} verifies {step.num_drafts} drafts in {step.num_tokens} tokens")
