"""What rows ask of sampling, as numbers on the device: written once per request, all new rows of a step in one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from atom_cluster.messages.requests import SamplingParams
from atom_cluster.ops.sampling import NUM_COLUMNS, Column, Draw, SamplingTensors
from atom_cluster.ops.torch_ref.noise import seed_words
from atom_cluster.runner.host_tensors import send

IntArray = npt.NDArray[np.int32]

SMALLEST_TEMPERATURE = 1e-5
"""Below it a row counts as greedy: logits divided by less overflow, and the race is decided anyway."""

_NUM_ENDINGS = 8
"""Room for endings of a row, at first."""


def draw_of(sampling: SamplingParams) -> Draw:
    """What it takes to choose a row's tokens."""
    if sampling.temperature < SMALLEST_TEMPERATURE:
        return Draw.GREEDY
    is_whole = sampling.top_k == 0 and sampling.top_p >= 1.0 and sampling.min_p == 0.0
    return Draw.RANDOM if is_whole else Draw.TRUNCATED


def adjusts(sampling: SamplingParams) -> bool:
    """Whether a row's logits depend on its tokens, or on which token it is."""
    return _masks_endings(sampling) or (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or bool(sampling.logit_bias)
    )


def needs_all_logits(sampling: SamplingParams) -> bool:
    """Whether a rank needs other ranks' logits of a row, however its token is drawn."""
    return sampling.logprobs is not None or adjusts(sampling)


def is_plain(sampling: SamplingParams) -> bool:
    """Whether a row's token follows from logits, temperature and truncation alone, and is all that is wanted."""
    return sampling.grammar is None and not needs_all_logits(sampling)


def _masks_endings(sampling: SamplingParams) -> bool:
    """Whether `min_tokens` is seen to here; where there is a grammar, its masks do it (runner/grammar_rows.py)."""
    return sampling.min_tokens > 0 and sampling.grammar is None


@dataclass(frozen=True, slots=True)
class _Filled:
    """A row that the device has yet to see."""

    row: int
    values: list[int]
    endings: Sequence[int]
    biases: IntArray


class SamplingTable:
    """One row of numbers for each row of a `RowTable`."""

    def __init__(self, *, num_rows: int, device: torch.device) -> None:
        self.tensors = SamplingTensors(
            values=torch.zeros(num_rows, NUM_COLUMNS, dtype=torch.int32, device=device),
            endings=torch.zeros(num_rows, _NUM_ENDINGS, dtype=torch.int32, device=device),
            biases=torch.zeros(num_rows, 0, 2, dtype=torch.int32, device=device),
        )
        """As ops see them. `values` stays where it is; the others move when a row needs more room."""
        self._device = device
        self._filled: list[_Filled] = []

    def fill(
        self, row: int, sampling: SamplingParams, *, num_prompt_tokens: int, ending_token_ids: Sequence[int]
    ) -> None:
        """A new request has this row. The device sees it after `flush`. ending_token_ids: for `min_tokens`."""
        endings = ending_token_ids if _masks_endings(sampling) else ()
        values = _values(sampling, num_prompt_tokens=num_prompt_tokens, num_endings=len(endings))
        self._filled.append(_Filled(row, values, endings, _bias_values(sampling)))

    def flush(self) -> None:
        """Bring the device up to date, in one copy."""
        if not self._filled:
            return
        num_endings = max(len(filled.endings) for filled in self._filled)
        num_biases = max(len(filled.biases) for filled in self._filled) // 2
        self._make_room(num_endings, num_biases)
        ends = np.cumsum([1, NUM_COLUMNS, num_endings, 2 * num_biases]).tolist()
        packed = np.zeros((len(self._filled), ends[-1]), dtype=np.int32)
        for target, filled in zip(packed, self._filled):
            target[0], target[1 : ends[1]] = filled.row, filled.values
            target[ends[1] : ends[1] + len(filled.endings)] = filled.endings
            target[ends[2] : ends[2] + len(filled.biases)] = filled.biases
        sent = send(torch.from_numpy(packed), self._device)
        rows = sent[:, 0].to(torch.int64)
        self.tensors.values[rows] = sent[:, 1 : ends[1]]
        if num_endings:
            self.tensors.endings[rows, :num_endings] = sent[:, ends[1] : ends[2]]
        if num_biases:
            self.tensors.biases[rows, :num_biases] = sent[:, ends[2] :].reshape(-1, num_biases, 2)
        self._filled = []

    def _make_room(self, num_endings: int, num_biases: int) -> None:
        """For so many of each in a row."""
        tensors = self.tensors
        self.tensors = SamplingTensors(
            values=tensors.values,
            endings=_widened(tensors.endings, num_endings),
            biases=_widened(tensors.biases, num_biases),
        )


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    """The same, if dimension 1 is that wide, or with twice that."""
    if width <= x.shape[1]:
        return x
    wider = x.new_zeros(len(x), 2 * width, *x.shape[2:])
    wider[:, : x.shape[1]] = x
    return wider


def _bias_values(sampling: SamplingParams) -> IntArray:
    """Token ids and bits of biases in turn, [2B] int32."""
    token_ids = np.array([token_id for token_id, _ in sampling.logit_bias], dtype=np.int32)
    bits = np.array([bias for _, bias in sampling.logit_bias], dtype=np.float32).view(np.int32)
    return np.stack((token_ids, bits), axis=1).reshape(-1)


def _values(sampling: SamplingParams, *, num_prompt_tokens: int, num_endings: int) -> list[int]:
    """A row of `SamplingTensors.values`."""
    is_random = sampling.temperature >= SMALLEST_TEMPERATURE
    floats = {
        Column.INVERSE_TEMPERATURE: 1.0 / sampling.temperature if is_random else 0.0,
        Column.TOP_P: sampling.top_p,
        Column.LOG_MIN_P: math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf,
        Column.REPETITION: sampling.repetition_penalty,
        Column.FREQUENCY: sampling.frequency_penalty,
        Column.PRESENCE: sampling.presence_penalty,
    }
    low, high = seed_words(sampling.seed or 0)
    integers = {
        Column.TOP_K: sampling.top_k,
        Column.SEED_LOW: low,
        Column.SEED_HIGH: high,
        Column.NUM_PROMPT_TOKENS: num_prompt_tokens,
        Column.MIN_TOKENS: sampling.min_tokens if _masks_endings(sampling) else 0,
        Column.NUM_ENDINGS: num_endings,
        Column.NUM_BIASES: len(sampling.logit_bias),
    }
    bits = np.array(list(floats.values()), dtype=np.float32).view(np.int32).tolist()
    found = {**dict(zip(floats, bits)), **{column: min(value, 2**31 - 1) for column, value in integers.items()}}
    return [found[column] for column in Column]
