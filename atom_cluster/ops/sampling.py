"""Contract of choosing tokens: adjusting and masking logits, drawing one token per row, accepting it into its row.

Everything that a row asks for lies in a table on the device (`SamplingTensors`), so a batch is one call, whatever its
rows ask for, and nothing waits. A row's token is argmax of z / e in logarithms, z its logits divided by temperature
and e exponential noise, which is a pure function of (seed, output position, token id): `torch_ref/noise.py` has the
definition. Of tokens that tie, the one with the lowest id wins. Knows no requests and no models.

Shape suffixes: N rows of the table, S rows that sample (or samples of them), V vocabulary or this rank's part of it,
P samples, E endings, B biases, M masks of W words.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch

from atom_cluster.ops.step_inputs import RowTables


class Draw(IntEnum):
    """What it takes to choose a batch's tokens: the most that any of its rows asks for."""

    GREEDY = 0
    RANDOM = 1
    """Some rows draw, from all tokens."""
    TRUNCATED = 2
    """Some rows draw from a part of the tokens: min-p, top-k or top-p."""


class Column(IntEnum):
    """Columns of `SamplingTensors.values`; floats by their bits."""

    INVERSE_TEMPERATURE = 0
    """Float; 0: the row is greedy, and the columns of truncation mean nothing."""
    TOP_K = 1
    """0 keeps all."""
    TOP_P = 2
    """Float; 1 keeps all."""
    LOG_MIN_P = 3
    """Float, natural logarithm; -inf keeps all."""
    SEED_LOW = 4
    SEED_HIGH = 5
    """Both: `noise.seed_words`."""
    NUM_PROMPT_TOKENS = 6
    MIN_TOKENS = 7
    """Endings are masked for so many output tokens."""
    REPETITION = 8
    """Float: `SamplingParams.repetition_penalty`; the next two likewise."""
    FREQUENCY = 9
    PRESENCE = 10
    NUM_ENDINGS = 11
    NUM_BIASES = 12


NUM_COLUMNS = 13


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """What the rows ask for."""

    values: torch.Tensor
    """[N, NUM_COLUMNS] int32, see `Column`. A row of zeros is greedy."""
    endings: torch.Tensor
    """[N, E] int32: token ids that end a row's output, `NUM_ENDINGS` of them; any number may be outside of V."""
    biases: torch.Tensor
    """[N, B, 2] int32: a token id and the bits of the float32 that is added to its logit, `NUM_BIASES` of them, each
    token at most once; ids may be outside of V. B is 0 until a row has any."""


class SampleTokens(Protocol):
    """Chooses one token per row."""

    def __call__(
        self,
        logits_SV: torch.Tensor,
        row_S: torch.Tensor,
        position_S: torch.Tensor,
        params: SamplingTensors,
        *,
        draw: Draw,
    ) -> torch.Tensor:
        """[S] int64. logits_SV: any float dtype, rows may be strided; computed in float32, left as they are.

        row_S, position_S: int64, the row of the table and the position that the token will have in it.
        Temperature, then: min-p keeps tokens that are at least min_p times as likely as the likeliest; top-k keeps k
        tokens; top-p keeps a token while the mass of likelier ones, among what is left, is below p. Where tokens tie at
        a limit, lower ids stay.
        draw: what rows may ask for; a row that asks for less gets just that.
        """
        ...


class RaceTokens(Protocol):
    """Chooses one token per row of those that a rank holds the logits of, for other ranks to compare with theirs."""

    def __call__(
        self,
        logits_SV: torch.Tensor,
        row_S: torch.Tensor,
        position_S: torch.Tensor,
        params: SamplingTensors,
        *,
        draw: Draw,
        first_token_id: int,
    ) -> torch.Tensor:
        """[S] int64 keys: `winners` of the largest key of all ranks is the token. As `SampleTokens`, but V are the
        tokens from `first_token_id` on, there may be none of them, and `draw` is not TRUNCATED."""
        ...


NO_KEY = -(1 << 63)
"""A key below all that name a token."""
_LAST_ID = (1 << 32) - 1


def winners(key_S: torch.Tensor) -> torch.Tensor:
    """Token ids of `RaceTokens` keys: the upper half orders scores, the lower one is the complement of the id."""
    return _LAST_ID - (key_S & _LAST_ID)


class AdjustLogits(Protocol):
    """Penalties, biases, and endings masked before `min_tokens`."""

    def __call__(
        self,
        logits_SV: torch.Tensor,
        row_S: torch.Tensor,
        position_S: torch.Tensor,
        params: SamplingTensors,
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """[S, V] float32, new memory. tokens: [N, positions] int32, of which a row's count up to its position.

        First endings get -inf; then logits of all tokens that the row has are divided (if positive) or multiplied by
        the repetition penalty; then those of its output lose the frequency penalty per occurrence, and the presence
        penalty; last, biases are added.
        """
        ...


class MaskLogits(Protocol):
    """Leaves of some samples only the tokens that may come next."""

    def __call__(
        self, logits_SV: torch.Tensor, masks_MW: torch.Tensor, index_S: torch.Tensor, *, first_token_id: int
    ) -> torch.Tensor:
        """[S, V] float32, new memory: -inf where the sample's mask has no bit, or none for the token.

        masks_MW: int32; token t is bit t % 32, from the lowest, of word t // 32. index_S: int64, the mask of each
        sample, or -1 for a sample that has none and keeps all. V are the tokens from `first_token_id` on.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnRows:
    """Rows that tokens were drawn for, int64 tensors: those of a row follow each other, from its newest token on."""

    row: torch.Tensor
    """[S]: row of the table."""
    first_sample: torch.Tensor
    """[S]: index into P of its first sample."""
    newest_position: torch.Tensor
    """[S]: of its newest token; behind it come drafts."""
    num_drafts: torch.Tensor
    """[S]: how many of them are to be verified; it has a sample more than that, at least."""
    max_drafts: int
    """Bound of `num_drafts`."""
    padding_row: int
    """The row that stands for none: what it gets is not written, and may be anything."""


class AcceptTokens(Protocol):
    """Verifies drafts and writes what was drawn."""

    def __call__(self, token_ids_P: torch.Tensor, rows: DrawnRows, tables: RowTables) -> torch.Tensor:
        """How many of its drafts each row keeps, [S] int64: those before the first that is not what was drawn there.

        token_ids_P: int64. `tables.tokens` has the drafts, and gets what was drawn in their places and behind them;
        `tables.num_known` grows by the drafts kept and one more.
        """
        ...
