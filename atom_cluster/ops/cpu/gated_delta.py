"""Gated DeltaNet for CPUs: rows of one token, and speculative rows, are stepped together; prompts go in chunks.

Within a chunk the updates of all tokens are found at once, by solving a triangular system (the WY form of the Gated
DeltaNet paper); between chunks only the state is passed on. Shape suffixes as in the contract, and S rows that are
stepped, M chunks, L tokens of a chunk, Q value heads per key head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from atom_cluster.ops.attention import AttentionMetadata
from atom_cluster.ops.gated_delta import GatedDeltaPlan, Gates, StateMetadata
from atom_cluster.ops.torch_ref.gated_delta import activate, normalise
from atom_cluster.units import ceil_div

CHUNK_TOKENS = 64
"""Tokens whose updates are found together: work within a chunk grows with its square."""

SEGMENT_TOKENS = 256
"""Tokens of a row that are worked on at once; bounds the temporaries."""

BATCH_BYTES = 1 << 21
"""States of rows that are stepped together, unless a single one has more: what stays in cache from step to step."""


@dataclass(frozen=True, slots=True)
class _Step:
    """The next token of each stepped row that has one."""

    token: torch.Tensor
    """[S] index among the tokens of the pass."""
    kept: torch.Tensor | None
    """[S] where these rows are among those of the step before; None: the same rows."""
    page: torch.Tensor
    """[S] where their states go."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows that are stepped together."""

    read_page: torch.Tensor
    """[S] any page for rows that begin."""
    begins: torch.Tensor
    """[<= S] rows that have no state yet."""
    steps: tuple[_Step, ...]


@dataclass(frozen=True, slots=True)
class _ChunkedRow:
    """A row of several tokens that keeps only its last state."""

    tokens: slice
    read_page: int
    write_page: int


class SteppedAndChunked:
    """The recurrences of one step."""

    def __init__(self, rows: AttentionMetadata, states: StateMetadata) -> None:
        starts = rows.query_start_cpu
        lengths = [end - start for start, end in zip(starts, starts[1:])]
        self._starts, self._lengths, self._states = starts, lengths, states
        self._stepped = [row for row, length in enumerate(lengths) if length == 1 or states.keeps_all_cpu[row]]
        self._batches_by_size: dict[int, list[_Batch]] = {}
        self._chunked = [
            _ChunkedRow(slice(starts[row], starts[row + 1]), int(states.read_page[row]), int(states.write_page[row, 0]))
            for row, length in enumerate(lengths)
            if length > 1 and not states.keeps_all_cpu[row]
        ]

    def convolve(self, x_TC: torch.Tensor, weight_CW: torch.Tensor, past_NCJ: torch.Tensor) -> torch.Tensor:
        """A causal convolution per channel, then silu."""
        wide_CW = weight_CW.to(torch.promote_types(x_TC.dtype, torch.float32))
        y_TC = torch.empty_like(x_TC, memory_format=torch.contiguous_format)

        def advance(past_SCJ: torch.Tensor, token_S: torch.Tensor) -> torch.Tensor:
            seen_SCW = torch.cat((past_SCJ, x_TC[token_S][:, :, None]), dim=-1)
            y_TC[token_S] = F.silu((seen_SCW * wide_CW).sum(dim=-1)).to(y_TC.dtype)
            return seen_SCW[:, :, 1:]

        self._step_through(past_NCJ, advance)
        for row in self._chunked:
            past_JC = _read(past_NCJ, row.read_page).T
            for part in _segments(row.tokens):
                seen_UC = torch.cat((past_JC, x_TC[part]))
                y_TC[part] = _convolve(seen_UC, wide_CW).to(y_TC.dtype)
                past_JC = seen_UC[len(seen_UC) - len(past_JC) :]
            past_NCJ[row.write_page] = past_JC.T
        return y_TC

    def delta_rule(
        self,
        query_TGK: torch.Tensor,
        key_TGK: torch.Tensor,
        value_THV: torch.Tensor,
        gates: Gates,
        state_NHKV: torch.Tensor,
    ) -> torch.Tensor:
        """The gated delta rule."""
        tokens = _Tokens.prepare(query_TGK, key_TGK, value_THV, gates)
        output_THV = torch.empty_like(value_THV, memory_format=torch.contiguous_format)

        def advance(state_SHKV: torch.Tensor, token_S: torch.Tensor) -> torch.Tensor:
            return _advance(state_SHKV, tokens.at(token_S), output_THV, token_S)

        self._step_through(state_NHKV, advance)
        for row in self._chunked:
            state_HKV = _read(state_NHKV, row.read_page)
            for part in _segments(row.tokens):
                output, state_HKV = _run_chunks(tokens.at(part), state_HKV)
                output_THV[part] = output.to(output_THV.dtype)
            state_NHKV[row.write_page] = state_HKV
        return output_THV

    def _step_through(
        self, memory: torch.Tensor, advance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        """Take the stepped rows from state to state; `advance(state, token)` may overwrite what it is given."""
        for batch in self._batches(max(1, BATCH_BYTES // (memory[0].numel() * memory.element_size()))):
            state = memory.index_select(0, batch.read_page)
            if len(batch.begins):
                state[batch.begins] = 0
            for step in batch.steps:
                state = state if step.kept is None else state[step.kept]
                state = advance(state, step.token)
                memory[step.page] = state

    def _batches(self, size: int) -> list[_Batch]:
        """The stepped rows, so many at a time."""
        if size not in self._batches_by_size:
            starts = range(0, len(self._stepped), size)
            self._batches_by_size[size] = [self._batch(self._stepped[start : start + size]) for start in starts]
        return self._batches_by_size[size]

    def _batch(self, rows: list[int]) -> _Batch:
        read_page = self._states.read_page[rows]
        steps = _steps(rows, self._starts, self._lengths, self._states.write_page)
        return _Batch(read_page.clamp(min=0), (read_page < 0).nonzero()[:, 0], steps)


def plan_gated_delta(rows: AttentionMetadata, states: StateMetadata) -> GatedDeltaPlan:
    """The plan of one step."""
    return SteppedAndChunked(rows, states)


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm and weight, then the gate."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight_D.shape, weight_D.to(wide), eps).mul_(F.silu(gate.to(wide))).to(x.dtype)


def _steps(rows: list[int], starts: tuple[int, ...], lengths: list[int], write_page: torch.Tensor) -> tuple[_Step, ...]:
    steps = []
    for index in range(max((lengths[row] for row in rows), default=0)):
        going_on = [row for row in rows if lengths[row] > index]
        kept = None
        if len(going_on) < len(rows):
            kept = torch.tensor([place for place, row in enumerate(rows) if lengths[row] > index])
        rows = going_on
        steps.append(_Step(torch.tensor([starts[row] + index for row in rows]), kept, write_page[rows, index]))
    return tuple(steps)


def _segments(tokens: slice) -> list[slice]:
    starts = range(tokens.start, tokens.stop, SEGMENT_TOKENS)
    return [slice(start, min(start + SEGMENT_TOKENS, tokens.stop)) for start in starts]


def _read(memory: torch.Tensor, page: int) -> torch.Tensor:
    return memory[page] if page >= 0 else torch.zeros_like(memory[0])


def _convolve(seen_UC: torch.Tensor, weight_CW: torch.Tensor) -> torch.Tensor:
    """J past inputs and then T new ones -> [T, C]: shifted inputs, each times the weights of one place."""
    num_new = len(seen_UC) - weight_CW.shape[1] + 1
    y_TC = seen_UC[:num_new] * weight_CW[:, 0]
    for place in range(1, weight_CW.shape[1]):
        y_TC.addcmul_(seen_UC[place : place + num_new].to(y_TC.dtype), weight_CW[:, place])
    return F.silu(y_TC)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What the rule needs to know of some tokens, in the states' dtype."""

    query: torch.Tensor
    """[T, G, K] of unit length, divided by sqrt(K)."""
    key: torch.Tensor
    """[T, G, K] of unit length."""
    value: torch.Tensor
    """[T, H, V]"""
    decay: torch.Tensor
    """[T, H] log of what is kept."""
    learn: torch.Tensor
    """[T, H] share of what is learnt."""

    @staticmethod
    def prepare(query_TGK: torch.Tensor, key_TGK: torch.Tensor, value_THV: torch.Tensor, gates: Gates) -> _Tokens:
        decay_TH, learn_TH = activate(gates)
        query_TGK = normalise(query_TGK) * query_TGK.shape[-1] ** -0.5
        return _Tokens(query_TGK, normalise(key_TGK), value_THV.to(decay_TH.dtype), decay_TH, learn_TH)

    def at(self, index: slice | torch.Tensor) -> _Tokens:
        """Some of them."""
        return _Tokens(
            self.query[index],
            self.key[index],
            self.value[index],
            self.decay[index],
            self.learn[index],
        )


def _advance(
    state_SHKV: torch.Tensor, tokens: _Tokens, output_THV: torch.Tensor, token_S: torch.Tensor
) -> torch.Tensor:
    """One token of each row: writes its output, returns the states after it in the memory of those before it."""
    num_rows, num_heads = tokens.decay.shape
    state_SGQKV = state_SHKV.view(num_rows, tokens.key.shape[1], -1, *state_SHKV.shape[2:])
    decay_SGQ11 = tokens.decay.exp().view(*state_SGQKV.shape[:3], 1, 1)
    learn_SGQ1V = tokens.learn.view_as(decay_SGQ11)
    value_SGQ1V = tokens.value.view(*state_SGQKV.shape[:3], 1, -1)
    key_SG1K, query_SG1K = tokens.key[:, :, None, None], tokens.query[:, :, None, None]
    state_SGQKV.mul_(decay_SGQ11)
    learnt_SGQ1V = learn_SGQ1V * (value_SGQ1V - key_SG1K @ state_SGQKV)
    state_SGQKV.addcmul_(key_SG1K.transpose(-1, -2), learnt_SGQ1V)
    output = query_SG1K @ state_SGQKV
    output_THV[token_S] = output.view(num_rows, num_heads, -1).to(output_THV.dtype)
    return state_SHKV


def _run_chunks(tokens: _Tokens, state_HKV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of one row and the state before them -> (output [T, H, V], the state after them)."""
    num_tokens, num_key_heads = tokens.key.shape[:2]
    length = min(num_tokens, CHUNK_TOKENS)
    query_MG1LK, key_MG1LK = (_fold(x, length, num_key_heads) for x in (tokens.query, tokens.key))
    value_MGQLV = _fold(tokens.value, length, num_key_heads)
    learn_MGQL1 = _fold(tokens.learn[..., None], length, num_key_heads)
    # Log of what is left, at each token, of the state before the chunk.
    left_MGQL1 = _fold(tokens.decay[..., None], length, num_key_heads).cumsum(dim=-2)
    is_later = torch.ones(length, length, dtype=torch.bool, device=state_HKV.device).triu(1)
    left_since = (left_MGQL1 - left_MGQL1.transpose(-1, -2)).masked_fill(is_later, float("-inf")).exp()

    # Token i learns beta_i (v_i - k_i^T S_i), where S_i holds what all before it learnt: a unit triangular system,
    # whose right side is linear in the state before the chunk. Only the part below the diagonal is looked at.
    key_by_key = learn_MGQL1 * (key_MG1LK @ key_MG1LK.transpose(-1, -2)) * left_since
    right = torch.cat((learn_MGQL1 * value_MGQLV, learn_MGQL1 * left_MGQL1.exp() * key_MG1LK), dim=-1)
    solved = torch.linalg.solve_triangular(key_by_key, right, upper=False, unitriangular=True)
    learnt_MGQLV, recalling_MGQLK = solved.split([value_MGQLV.shape[-1], key_MG1LK.shape[-1]], dim=-1)

    query_by_key = (query_MG1LK @ key_MG1LK.transpose(-1, -2)) * left_since
    query_MGQLK = query_MG1LK * left_MGQL1.exp()
    key_MGQKL = (key_MG1LK * (left_MGQL1[..., -1:, :] - left_MGQL1).exp()).transpose(-1, -2)
    left_MGQ11 = left_MGQL1[..., -1:, :].exp()
    state_GQKV = state_HKV.reshape(num_key_heads, -1, *state_HKV.shape[1:])
    outputs = []
    for chunk in range(len(query_MGQLK)):
        learnt_GQLV = learnt_MGQLV[chunk] - recalling_MGQLK[chunk] @ state_GQKV
        outputs.append(query_MGQLK[chunk] @ state_GQKV + query_by_key[chunk] @ learnt_GQLV)
        state_GQKV = left_MGQ11[chunk] * state_GQKV + key_MGQKL[chunk] @ learnt_GQLV
    output_MLGQV = torch.stack(outputs).permute(0, 3, 1, 2, 4)
    return output_MLGQV.flatten(2, 3).flatten(0, 1)[:num_tokens], state_GQKV.flatten(0, 1)


def _fold(x_TID: torch.Tensor, length: int, num_key_heads: int) -> torch.Tensor:
    """Tokens in chunks and heads by key head: [T, I heads, D] -> [M, G, I / G, L, D]. Zeros change no state."""
    num_tokens, num_heads, dim = x_TID.shape
    num_chunks = ceil_div(num_tokens, length)
    padded = F.pad(x_TID, (0, 0, 0, 0, 0, num_chunks * length - num_tokens))
    return padded.view(num_chunks, length, num_key_heads, num_heads // num_key_heads, dim).permute(0, 2, 3, 1, 4)
