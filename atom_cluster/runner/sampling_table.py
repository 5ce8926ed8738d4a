"""What rows ask of sampling, as numbers on the device: written once per request, all new rows of a step in one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from atom_cluster.messages.requests import SamplingParams
from atom_cluster.ops.sampling import NUM_COLUMNS, Column, Draw, SamplingTensors
from atom_cluster.ops.torch_ref.noise import seed_words
from atom_cluster.runner.host_tensors import send

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
    """Whether a row's logits depend on its tokens."""
    return sampling.min_tokens > 0 or (
        sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
    )


def is_plain(sampling: SamplingParams) -> bool:
    """Whether a row's token follows from logits, temperature and truncation alone, and is all that is wanted."""
    return sampling.logprobs is None and not adjusts(sampling)


class SamplingTable:
    """One row of numbers for each row of a `RowTable`."""

    def __init__(self, *, num_rows: int, device: torch.device) -> None:
        self.tensors = SamplingTensors(
            values=torch.zeros(num_rows, NUM_COLUMNS, dtype=torch.int32, device=device),
            endings=torch.zeros(num_rows, _NUM_ENDINGS, dtype=torch.int32, device=device),
        )
        """As ops see them. `values` stays where it is; `endings` moves when a row needs more room."""
        self._device = device
        self._filled: list[tuple[int, list[int], Sequence[int]]] = []

    def fill(
        self, row: int, sampling: SamplingParams, *, num_prompt_tokens: int, ending_token_ids: Sequence[int]
    ) -> None:
        """A new request has this row. The device sees it after `flush`. ending_token_ids: for `min_tokens`."""
        endings = ending_token_ids if sampling.min_tokens > 0 else ()
        values = _values(sampling, num_prompt_tokens=num_prompt_tokens, num_endings=len(endings))
        self._filled.append((row, values, endings))

    def flush(self) -> None:
        """Bring the device up to date, in one copy."""
        if not self._filled:
            return
        most = max(len(endings) for _, _, endings in self._filled)
        if most > self.tensors.endings.shape[1]:
            endings = self.tensors.endings.new_zeros(len(self.tensors.values), 2 * most)
            endings[:, : self.tensors.endings.shape[1]] = self.tensors.endings
            self.tensors = SamplingTensors(values=self.tensors.values, endings=endings)
        packed = np.zeros((len(self._filled), 1 + NUM_COLUMNS + most), dtype=np.int32)
        for target, (row, values, row_endings) in zip(packed, self._filled):
            target[0], target[1 : 1 + NUM_COLUMNS] = row, values
            target[1 + NUM_COLUMNS : 1 + NUM_COLUMNS + len(row_endings)] = row_endings
        sent = send(torch.from_numpy(packed), self._device)
        rows = sent[:, 0].to(torch.int64)
        self.tensors.values[rows] = sent[:, 1 : 1 + NUM_COLUMNS]
        if most:
            self.tensors.endings[rows, :most] = sent[:, 1 + NUM_COLUMNS :]
        self._filled = []


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
        Column.MIN_TOKENS: sampling.min_tokens,
        Column.NUM_ENDINGS: num_endings,
    }
    bits = np.array(list(floats.values()), dtype=np.float32).view(np.int32).tolist()
    found = {**dict(zip(floats, bits)), **{column: min(value, 2**31 - 1) for column, value in integers.items()}}
    return [found[column] for column in Column]
