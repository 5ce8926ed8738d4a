"""Reference choice of tokens, written out. Any device; nothing waits for it."""

from __future__ import annotations

import torch

from atom_cluster.ops.sampling import NO_KEY, Column, Draw, DrawnRows, SamplingTensors
from atom_cluster.ops.step_inputs import RowTables
from atom_cluster.ops.torch_ref.noise import exponential_noise, noise_keys


def sample(
    logits_SV: torch.Tensor, row_S: torch.Tensor, position_S: torch.Tensor, params: SamplingTensors, *, draw: Draw
) -> torch.Tensor:
    """See `ops.sampling.SampleTokens`."""
    return _scores(logits_SV, row_S, position_S, params, draw=draw, first_token_id=0).argmax(dim=-1)


def race(
    logits_SV: torch.Tensor,
    row_S: torch.Tensor,
    position_S: torch.Tensor,
    params: SamplingTensors,
    *,
    draw: Draw,
    first_token_id: int,
) -> torch.Tensor:
    """See `ops.sampling.RaceTokens`."""
    if logits_SV.shape[1] == 0:
        return torch.full_like(row_S, NO_KEY)
    best, index = _scores(logits_SV, row_S, position_S, params, draw=draw, first_token_id=first_token_id).max(dim=-1)
    bits = (best + 0.0).view(torch.int32)  # one zero, not two
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return (ordered << 32) | (0xFFFFFFFF - (index + first_token_id))


def adjust(
    logits_SV: torch.Tensor,
    row_S: torch.Tensor,
    position_S: torch.Tensor,
    params: SamplingTensors,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """See `ops.sampling.AdjustLogits`."""
    values_SC = params.values[row_S]
    floats_SC = values_SC.view(torch.float32)
    vocab_size = logits_SV.shape[1]
    counts_SV = logits_SV.new_zeros(logits_SV.shape, dtype=torch.int32)

    ids_SE = params.endings[row_S].to(torch.int64)
    index_E = torch.arange(ids_SE.shape[1], device=ids_SE.device)
    is_early_S = position_S - values_SC[:, Column.NUM_PROMPT_TOKENS] < values_SC[:, Column.MIN_TOKENS]
    is_masked_SE = (index_E < values_SC[:, Column.NUM_ENDINGS, None]) & is_early_S[:, None] & (ids_SE < vocab_size)
    is_ending_SV = counts_SV.scatter_add(1, ids_SE.clamp(0, vocab_size - 1), is_masked_SE.to(torch.int32)) > 0
    logits_SV = logits_SV.to(torch.float32).masked_fill(is_ending_SV, float("-inf"))

    ids_SP = tokens[row_S].to(torch.int64)
    index_P = torch.arange(ids_SP.shape[1], device=ids_SP.device)
    is_inside_SP = (ids_SP >= 0) & (ids_SP < vocab_size)
    is_seen_SP = (index_P < position_S[:, None]) & is_inside_SP
    is_output_SP = is_seen_SP & (index_P >= values_SC[:, Column.NUM_PROMPT_TOKENS, None])
    ids_SP = ids_SP.clamp(0, vocab_size - 1)
    is_seen_SV = counts_SV.scatter_add(1, ids_SP, is_seen_SP.to(torch.int32)) > 0
    counts_SV.scatter_add_(1, ids_SP, is_output_SP.to(torch.int32))
    factor_S1 = floats_SC[:, Column.REPETITION, None]
    repeated_SV = torch.where(logits_SV > 0, logits_SV / factor_S1, logits_SV * factor_S1)
    logits_SV = torch.where(is_seen_SV & (factor_S1 != 1.0), repeated_SV, logits_SV)
    lost_SV = floats_SC[:, Column.FREQUENCY, None] * counts_SV
    logits_SV = torch.where(counts_SV > 0, logits_SV - lost_SV - floats_SC[:, Column.PRESENCE, None], logits_SV)

    biases_SB2 = params.biases[row_S]
    ids_SB, bias_SB = biases_SB2[..., 0].to(torch.int64), biases_SB2[..., 1].contiguous().view(torch.float32)
    index_B = torch.arange(ids_SB.shape[1], device=ids_SB.device)
    is_bias_SB = (index_B < values_SC[:, Column.NUM_BIASES, None]) & (ids_SB >= 0) & (ids_SB < vocab_size)
    return logits_SV.scatter_add(1, ids_SB.clamp(0, vocab_size - 1), bias_SB.masked_fill(~is_bias_SB, 0.0))


def mask(
    logits_SV: torch.Tensor, masks_MW: torch.Tensor, index_S: torch.Tensor, *, first_token_id: int
) -> torch.Tensor:
    """See `ops.sampling.MaskLogits`."""
    token_V = torch.arange(first_token_id, first_token_id + logits_SV.shape[1], device=logits_SV.device)
    num_words = masks_MW.shape[1]
    words_SV = masks_MW[index_S.clamp(min=0)][:, (token_V // 32).clamp(max=num_words - 1)]
    is_set_SV = ((words_SV >> (token_V % 32).to(torch.int32)) & 1).to(torch.bool) & (token_V < 32 * num_words)
    return logits_SV.to(torch.float32).masked_fill(~is_set_SV & (index_S[:, None] >= 0), float("-inf"))


def accept(token_ids_P: torch.Tensor, rows: DrawnRows, tables: RowTables) -> torch.Tensor:
    """See `ops.sampling.AcceptTokens`."""
    index_K = torch.arange(rows.max_drafts + 1, device=token_ids_P.device)
    drawn_SK = token_ids_P[(rows.first_sample[:, None] + index_K).clamp(max=len(token_ids_P) - 1)]
    position_SK = rows.newest_position[:, None] + 1 + index_K
    row_SK = rows.row[:, None].expand_as(position_SK)
    draft_SK = tables.tokens[row_SK, position_SK].to(torch.int64)
    is_kept_SK = ((drawn_SK == draft_SK) & (index_K < rows.num_drafts[:, None])).to(torch.int64).cumprod(dim=1)
    num_kept_S = is_kept_SK.sum(dim=1)
    # What is behind the last sample of a row stays. Padding keeps its token, and that it has one.
    is_padding_S = rows.row == rows.padding_row
    is_drawn_SK = (index_K <= rows.num_drafts[:, None]) & ~is_padding_S[:, None]
    tables.tokens.index_put_((row_SK, position_SK), torch.where(is_drawn_SK, drawn_SK, draft_SK).to(torch.int32))
    num_known_S = (rows.newest_position + num_kept_S + 2).masked_fill(is_padding_S, 1)
    tables.num_known.index_put_((rows.row,), num_known_S)
    return num_kept_S


def truncate(scaled_SV: torch.Tensor, values_SC: torch.Tensor) -> torch.Tensor:
    """Logits divided by temperature, [S, V] float32, with -inf for tokens that min-p, top-k or top-p remove.

    values_SC: the rows' `SamplingTensors.values`.
    """
    floats_SC, vocab_size = values_SC.view(torch.float32), scaled_SV.shape[1]
    floor_S1 = scaled_SV.amax(dim=-1, keepdim=True) + floats_SC[:, Column.LOG_MIN_P, None]
    scaled_SV = scaled_SV.masked_fill(scaled_SV < floor_S1, float("-inf"))
    ordered = scaled_SV.sort(dim=-1, descending=True, stable=True)
    k_S1 = values_SC[:, Column.TOP_K, None]
    is_behind_SV = (torch.arange(vocab_size, device=scaled_SV.device) >= k_S1) & (k_S1 > 0)
    kept_SV = ordered.values.masked_fill(is_behind_SV, float("-inf"))
    mass_SV = kept_SV.double().softmax(dim=-1).cumsum(dim=-1)
    top_p_S1 = floats_SC[:, Column.TOP_P, None]
    # Rounding may leave a row's whole mass just below a top_p of 1: never cut there.
    kept_SV[:, 1:].masked_fill_((mass_SV[:, :-1] >= top_p_S1) & (top_p_S1 < 1.0), float("-inf"))
    return torch.empty_like(scaled_SV).scatter_(1, ordered.indices, kept_SV)


def _scores(
    logits_SV: torch.Tensor,
    row_S: torch.Tensor,
    position_S: torch.Tensor,
    params: SamplingTensors,
    *,
    draw: Draw,
    first_token_id: int,
) -> torch.Tensor:
    """What the winner has most of, [S, V] float32: logits of greedy rows, logits with noise of others."""
    logits_SV = logits_SV.to(torch.float32)
    if draw is Draw.GREEDY:
        return logits_SV
    values_SC = params.values[row_S]
    scale_S1 = values_SC.view(torch.float32)[:, Column.INVERSE_TEMPERATURE, None]
    scaled_SV = logits_SV * scale_S1
    if draw is Draw.TRUNCATED:
        scaled_SV = truncate(scaled_SV, values_SC)
    output_position_S = position_S.to(torch.int32) - values_SC[:, Column.NUM_PROMPT_TOKENS]
    key_S2 = noise_keys(values_SC[:, Column.SEED_LOW : Column.SEED_HIGH + 1], output_position_S)
    last_token_id = first_token_id + logits_SV.shape[1]
    token_ids = torch.arange(first_token_id, last_token_id, dtype=torch.int32, device=logits_SV.device)
    return torch.where(scale_S1 > 0, scaled_SV - exponential_noise(key_S2, token_ids).log(), logits_SV)
