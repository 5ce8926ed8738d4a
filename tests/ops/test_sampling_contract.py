"""Every backend's choice of tokens, against the contract written out row by row in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.ops.sampling import NO_KEY, Draw, DrawnRows, winners
from atom_cluster.ops.select import select_ops
from atom_cluster.ops.step_inputs import RowTables
from atom_cluster.ops.table import OpTable
from atom_cluster.platform.detect import detect_platform
from tests.ops.sampling_rows import expected_scores, is_winner, samplings, tensors_of

VOCAB = 600
"""More than a kernel takes at once."""


@pytest.fixture(params=["torch", "cpu", "triton"])
def ops(request: pytest.FixtureRequest) -> OpTable:
    return select_ops(OpsConfig(backend=request.param), detect_platform("cpu"), torch.float32)


def random_logits(num_rows: int, vocab_size: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


def choose(
    ops: OpTable, logits: torch.Tensor, rows: list[SamplingParams], *, position: int = 4, draw: Draw = Draw.TRUNCATED
) -> list[int]:
    before = logits.clone()
    index = torch.arange(len(rows))
    positions = torch.full((len(rows),), 1 + position)
    found: list[int] = ops.sample(logits, index, positions, tensors_of(rows), draw=draw).tolist()
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    return found


@pytest.mark.parametrize("kind", ["smooth", "ties", "masked", "peaked", "equal", "strided"])
def test_each_row_gets_the_winner_of_what_it_keeps(ops: OpTable, kind: str) -> None:
    # Among equal logits searches are long, and kernels are interpreted.
    rows = samplings(14) if kind != "equal" else samplings(6)[2:]
    logits = random_logits(len(rows), seed=len(kind))
    if kind == "ties":
        logits = logits.round()
    if kind == "masked":
        logits[:, 3:] = logits[:, 3:].masked_fill(random_logits(len(rows), VOCAB - 3, seed=9) < 3.0, float("-inf"))
    if kind == "peaked":
        logits *= 30
    if kind == "equal":
        logits.zero_()
    if kind == "strided":
        logits = random_logits(len(rows), VOCAB + 40)[:, :VOCAB]
    found = choose(ops, logits, rows)
    wrong = [i for i, row in enumerate(rows) if not is_winner(expected_scores(logits[i], row, 4), found[i])]
    assert not wrong, [rows[i] for i in wrong]


def test_a_row_gets_the_same_alone_as_in_a_batch_whatever_the_batch_may_ask_for(ops: OpTable) -> None:
    rows = samplings(8)
    logits = random_logits(len(rows), seed=3)
    together = choose(ops, logits, rows)
    assert [choose(ops, logits[i : i + 1], [row])[0] for i, row in enumerate(rows)] == together
    assert choose(ops, logits[:2], rows[:2], draw=Draw.RANDOM) == together[:2]
    assert choose(ops, logits[:1], rows[:1], draw=Draw.GREEDY) == together[:1]


@pytest.mark.parametrize("draw", Draw)
def test_of_equal_logits_greedy_rows_take_the_first(ops: OpTable, draw: Draw) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 500:] = 1.0
    logits[2] = float("-inf")
    assert choose(ops, logits, [SamplingParams(temperature=0.0)] * 3, draw=draw) == [0, 500, 0]


@pytest.mark.parametrize("num_rows", [0, 1, 3])
@pytest.mark.parametrize("vocab_size", [1, 7, 2049])
def test_any_number_of_rows_and_tokens(ops: OpTable, num_rows: int, vocab_size: int) -> None:
    rows = samplings(6)[:num_rows]
    logits = random_logits(num_rows, vocab_size)
    for draw in Draw:
        found = choose(ops, logits, rows if draw is Draw.TRUNCATED else [SamplingParams(temperature=0.0)] * num_rows)
        assert all(0 <= token_id < vocab_size for token_id in found)
        assert len(found) == num_rows


def test_numbers_that_are_none_give_tokens_that_are_some(ops: OpTable) -> None:
    rows = samplings(14)
    found = choose(ops, torch.full((len(rows), VOCAB), math.nan), rows)
    assert all(0 <= token_id < VOCAB for token_id in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_dtype_are_taken_as_float32(ops: OpTable, dtype: torch.dtype) -> None:
    rows = samplings(14)
    logits = random_logits(len(rows), 300, seed=1).to(torch.bfloat16)
    assert choose(ops, logits.to(dtype), rows) == choose(ops, logits.float(), rows)


@pytest.mark.parametrize(
    ("sampling", "weights"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [0.16, 0.09, 0.04, 0.01]),
        ({"top_k": 2}, [0.4, 0.3, 0.0, 0.0]),
        ({"top_p": 0.65}, [0.4, 0.3, 0.0, 0.0]),
        ({"min_p": 0.4}, [0.4, 0.3, 0.2, 0.0]),
    ],
)
def test_frequencies_follow_the_distribution(
    ops: OpTable, sampling: dict[str, float], weights: list[float], request: pytest.FixtureRequest
) -> None:
    num_draws = 40 if "triton" in request.node.name else 4000
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(num_draws, 4).contiguous()
    rows = [SamplingParams(**sampling, seed=seed) for seed in range(num_draws)]
    counts = torch.bincount(torch.tensor(choose(ops, logits, rows)), minlength=4).tolist()
    expected = [weight / sum(weights) * num_draws for weight in weights]
    assert all(count == 0 for count, want in zip(counts, expected) if want == 0)
    chi_square = sum((count - want) ** 2 / want for count, want in zip(counts, expected) if want > 0)
    degrees = sum(want > 0 for want in expected) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("draw", [Draw.GREEDY, Draw.RANDOM])
@pytest.mark.parametrize("cut", [0, 1, 300, 599, 600])
def test_winners_of_parts_of_the_vocabulary_race_for_the_token_of_the_whole(ops: OpTable, draw: Draw, cut: int) -> None:
    temperature = 0.0 if draw is Draw.GREEDY else 0.9
    rows = [SamplingParams(temperature=temperature, seed=i) for i in range(6)]
    logits = random_logits(len(rows)).round()
    logits[1] -= 40.0
    logits[2] = 0.0
    logits[3] = -0.0
    logits[3, 400] = 0.0
    args = (torch.arange(len(rows)), torch.full((len(rows),), 9), tensors_of(rows))
    parts = ((logits[:, :cut], 0), (logits[:, cut:], cut))
    keys = [ops.race(part, *args, draw=draw, first_token_id=first) for part, first in parts]
    assert torch.equal(winners(torch.maximum(*keys)), ops.sample(logits, *args, draw=draw))
    assert torch.equal(winners(torch.maximum(keys[0], torch.full_like(keys[0], NO_KEY))), winners(keys[0])) or cut == 0


def test_penalties_and_endings(ops: OpTable) -> None:
    logits = torch.tensor([[4.0, -9.0, 2.5, -1.0]]).expand(8, 4).contiguous()
    rows = [
        SamplingParams(),
        SamplingParams(repetition_penalty=2.0),
        SamplingParams(presence_penalty=0.5),
        SamplingParams(frequency_penalty=0.5),
        SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25),
        SamplingParams(min_tokens=4),
        SamplingParams(min_tokens=3),
        SamplingParams(min_tokens=9, repetition_penalty=0.5, presence_penalty=-2.0),
    ]
    params = tensors_of(rows, num_prompt_tokens=2, endings=[(1, 70, 0)] * 7 + [tuple(range(20))])
    # Two tokens of a prompt, three of output, and what is left of another request.
    tokens = torch.tensor([[0, 0, 3, 2, 3, 1, 1]], dtype=torch.int32).expand(8, 7).contiguous()
    found = ops.adjust(logits, torch.arange(8), torch.full((8,), 5), params, tokens)
    nothing = float("-inf")
    expected = [
        [4.0, -9.0, 2.5, -1.0],
        [2.0, -9.0, 1.25, -2.0],
        [4.0, -9.0, 2.0, -1.5],
        [4.0, -9.0, 2.0, -2.0],
        [2.0, -9.0, 1.25 - 0.75, -2.0 - 1.0],
        [nothing, nothing, 2.5, -1.0],
        [4.0, -9.0, 2.5, -1.0],
        [nothing] * 4,
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found.data_ptr() != logits.data_ptr()


def test_samples_of_one_row_are_adjusted_by_the_tokens_before_each(ops: OpTable) -> None:
    tokens = torch.randint(0, 50, (3, 90), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    rows = [SamplingParams(frequency_penalty=0.3 * i, repetition_penalty=1.0 + 0.1 * i) for i in range(3)]
    params = tensors_of(rows, num_prompt_tokens=10)
    row, position = torch.tensor([2, 2, 1, 0, 2]), torch.tensor([60, 61, 10, 90, 3])
    logits = random_logits(5, 50)
    found = ops.adjust(logits.to(torch.bfloat16), row, position, params, tokens)
    for i in range(5):
        expected = logits[i].to(torch.bfloat16).float()
        sampling, seen = rows[row[i]], tokens[row[i], : position[i]].tolist()
        for token in set(seen):
            factor = sampling.repetition_penalty
            expected[token] = expected[token] / factor if expected[token] > 0 else expected[token] * factor
        for token in seen[10:]:
            expected[token] -= sampling.frequency_penalty
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-5)


def test_biases_come_behind_penalties(ops: OpTable) -> None:
    rows = [
        SamplingParams(logit_bias=((2, -100.0), (0, 1.5), (4000, 7.0))),
        SamplingParams(),
        SamplingParams(repetition_penalty=2.0, logit_bias=((0, 10.0), (-3, 1.0))),
        SamplingParams(min_tokens=9, logit_bias=((1, 100.0),)),
        SamplingParams(logit_bias=tuple((token_id, float(token_id)) for token_id in range(300))),
    ]
    params = tensors_of(rows, num_prompt_tokens=2, endings=[(1,)] * 5)
    logits = random_logits(5, 400)
    tokens = torch.zeros(5, 7, dtype=torch.int32)
    found = ops.adjust(logits, torch.arange(5), torch.full((5,), 3), params, tokens)
    expected = logits.clone()
    expected[0, 2] -= 100.0
    expected[0, 0] += 1.5
    expected[2, 0] = 10.0 + (logits[2, 0] / 2 if logits[2, 0] > 0 else logits[2, 0] * 2)
    expected[3, 1] = float("-inf")
    expected[4, :300] += torch.arange(300.0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [0, 37, VOCAB - 1])
def test_a_mask_leaves_the_tokens_whose_bit_is_set(ops: OpTable, dtype: torch.dtype, cut: int) -> None:
    is_allowed = torch.rand(3, VOCAB, generator=torch.Generator().manual_seed(5)) < 0.4
    is_allowed[2] = False
    masks = np.packbits(is_allowed.numpy(), axis=1, bitorder="little")
    # 600 is no multiple of 32: the last word is cut short, so its tokens have no bit.
    words = torch.from_numpy(masks[:, : VOCAB // 32 * 4].copy()).view(torch.int32)
    is_allowed[:, VOCAB // 32 * 32 :] = False
    index = torch.tensor([2, -1, 0, 1, -1, 0])
    logits = random_logits(6, VOCAB + 8)[:, :VOCAB].to(dtype)
    before = logits.clone()
    parts = [ops.mask(logits[:, :cut], words, index, first_token_id=0)] if cut else []
    found = torch.cat([*parts, ops.mask(logits[:, cut:], words, index, first_token_id=cut)], dim=1)
    keeps = is_allowed[index.clamp(min=0)] | (index == -1)[:, None]
    assert found.dtype == torch.float32
    assert torch.equal(found, before.float().masked_fill(~keeps, float("-inf")))
    assert torch.equal(logits, before)
    assert ops.mask(logits[:0], words, index[:0], first_token_id=0).shape == (0, VOCAB)


def test_drafts_are_kept_up_to_the_first_wrong_one(ops: OpTable) -> None:
    tokens = torch.zeros(6, 20, dtype=torch.int32)
    rows = torch.tensor([4, 1, 0, 2, 5, 5])
    newest = torch.tensor([3, 0, 9, 5, 0, 0])
    num_drafts = torch.tensor([3, 3, 0, 2, 1, 3])
    drafts = [(7, 8, 9), (7, 8, 9), (1, 2, 3), (4, 5, 6), (7, 7, 7), (7, 7, 7)]
    for row, start, draft in zip(rows.tolist(), newest.tolist(), drafts):
        tokens[row, start + 1 : start + 4] = torch.tensor(draft)
    before = tokens.clone()
    drawn = torch.tensor([7, 8, 9, 11, 7, 0, 9, 12, 50, 51, 52, 53, 4, 5, 60, 61, 1, 2, 3, 4, 7, 7, 7, 8])
    tables = RowTables(tokens=tokens, num_known=torch.ones(6, dtype=torch.int64), pages=(), block_size=1)
    found = ops.accept(
        drawn,
        DrawnRows(
            row=rows,
            first_sample=torch.arange(0, 24, 4),
            newest_position=newest,
            num_drafts=num_drafts,
            max_drafts=3,
            padding_row=5,
        ),
        tables,
    )
    assert found.tolist()[:4] == [3, 1, 0, 2]
    assert tables.num_known.tolist() == [11, 3, 9, 1, 8, 1]
    expected = before
    expected[4, 4:8] = torch.tensor([7, 8, 9, 11])
    expected[1, 1:5] = torch.tensor([7, 0, 9, 12])
    expected[0, 10] = 50
    expected[2, 6:9] = torch.tensor([4, 5, 60])
    assert torch.equal(tokens, expected)
