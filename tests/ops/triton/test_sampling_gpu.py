"""Choice of tokens on a GPU: what a CPU chooses, for rows of any kind, alone, together, in graphs and in parts."""

from __future__ import annotations

import pytest
import torch

from atom_cluster.messages.requests import SamplingParams
from atom_cluster.ops import torch_ref
from atom_cluster.ops import triton as kernels
from atom_cluster.ops.sampling import NUM_COLUMNS, Draw, DrawnRows, SamplingTensors, winners
from atom_cluster.ops.step_inputs import RowTables
from tests.ops.sampling_rows import expected_scores, is_winner, samplings, tensors_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

SHAPES = [(1, 151936), (14, 128256), (130, 32000), (56, 1000), (3, 262144), (28, 129280)]


def poison() -> None:
    """New memory is what was freed last: numbers that are none."""
    blocks = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(8)]
    del blocks


def random_logits(kind: str, num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator, device="cuda") * 2
    if kind == "rounded":
        return logits.to(torch.bfloat16).float()
    if kind == "peaked":
        return logits * logits.abs() * 2
    if kind == "masked":
        return logits.masked_fill(torch.rand(logits.shape, generator=generator, device="cuda") < 0.9, float("-inf"))
    return logits.to(torch.bfloat16) if kind == "bfloat16" else logits


def wrong_rows(
    logits: torch.Tensor, rows: list[SamplingParams], found: torch.Tensor, expected: torch.Tensor
) -> list[str]:
    """Rows that got another token than expected, but for those of which rounding decides."""
    differing = (found.cpu() != expected.cpu()).nonzero()[:, 0].tolist()
    return [str(rows[i]) for i in differing if not is_winner(expected_scores(logits[i], rows[i], 4), int(found[i]))]


@pytest.mark.parametrize("kind", ["smooth", "rounded", "peaked", "masked", "bfloat16"])
@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
def test_a_gpu_chooses_what_a_cpu_does(kind: str, num_rows: int, vocab_size: int) -> None:
    rows = samplings(num_rows)
    params = tensors_of(rows, device="cuda")
    index = torch.arange(num_rows, device="cuda")
    position = torch.full((num_rows,), 5, device="cuda")
    logits = random_logits(kind, num_rows, vocab_size, seed=num_rows + len(kind))
    poison()
    found = kernels.sample(logits, index, position, params, draw=Draw.TRUNCATED)
    expected = torch_ref.sample(logits, index, position, params, draw=Draw.TRUNCATED)
    # The mass of a row is summed up in another order, which may move a limit by a token; few such tokens win.
    assert len(wrong_rows(logits, rows, found, expected)) <= num_rows // 50
    again = kernels.sample(logits, index, position, params, draw=Draw.TRUNCATED)
    assert torch.equal(found, again)
    alone = kernels.sample(logits[-1:], index[-1:], position[-1:], params, draw=Draw.TRUNCATED)
    assert alone[0] == found[-1]


@pytest.mark.parametrize("draw", [Draw.GREEDY, Draw.RANDOM])
@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
def test_parts_of_the_vocabulary_race_for_what_the_whole_gives(draw: Draw, num_rows: int, vocab_size: int) -> None:
    rows = [SamplingParams(temperature=0.0 if draw is Draw.GREEDY or i % 2 else 0.8, seed=i) for i in range(num_rows)]
    args = (
        torch.arange(num_rows, device="cuda"),
        torch.full((num_rows,), 5, device="cuda"),
        tensors_of(rows, device="cuda"),
    )
    logits = random_logits("rounded", num_rows, vocab_size, seed=1)
    cut = vocab_size // 3 // 16 * 16
    first = kernels.race(logits[:, :cut], *args, draw=draw, first_token_id=0)
    second = kernels.race(logits[:, cut:], *args, draw=draw, first_token_id=cut)
    found = winners(torch.maximum(first, second))
    assert torch.equal(found, kernels.sample(logits, *args, draw=draw))
    if draw is Draw.GREEDY:
        assert torch.equal(found.cpu(), logits.cpu().argmax(-1))


def test_a_graph_chooses_for_whatever_rows_take_its_places() -> None:
    rows = samplings(14)
    params = tensors_of([*rows, *rows[::-1]], device="cuda")
    index = torch.arange(14, device="cuda")
    position = torch.full((14,), 5, device="cuda")
    logits = random_logits("smooth", 14, 128256, seed=2)
    kernels.sample(logits, index, position, params, draw=Draw.TRUNCATED)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.sample(logits, index, position, params, draw=Draw.TRUNCATED)
    for first in (0, 14):
        index.copy_(torch.arange(first, first + 14))
        logits.copy_(random_logits("smooth", 14, 128256, seed=first))
        graph.replay()
        assert torch.equal(found, kernels.sample(logits, index, position, params, draw=Draw.TRUNCATED))


@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
def test_penalties_and_endings(num_rows: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    rows = [
        SamplingParams(
            repetition_penalty=[1.0, 1.3, 0.7][i % 3],
            presence_penalty=[0.0, 1.5][i % 2],
            frequency_penalty=[0.0, -0.2, 0.5, 0.1][i % 4],
            min_tokens=[0, 10_000][i // 2 % 2],
            logit_bias=tuple((j * 3, 1.0 + j) for j in range(300 * (i % 2))),
        )
        for i in range(num_rows)
    ]
    endings = [tuple(range(i, 300 * (i % 3), 7)) for i in range(num_rows)]
    params = tensors_of(rows, num_prompt_tokens=700, endings=endings, device="cuda")
    tokens = torch.randint(0, min(vocab_size, 500), (num_rows, 5000), generator=generator, dtype=torch.int32).cuda()
    position = torch.randint(700, 5000, (num_rows,), generator=generator).cuda()
    index = torch.randperm(num_rows, generator=generator).cuda()
    logits = random_logits("smooth", num_rows, vocab_size, seed=5)
    poison()
    found = kernels.adjust(logits, index, position, params, tokens)
    torch.testing.assert_close(found, torch_ref.adjust(logits, index, position, params, tokens), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("max_drafts", [0, 1, 3, 6])
@pytest.mark.parametrize("num_rows", [1, 33, 256])
def test_drafts(num_rows: int, max_drafts: int) -> None:
    generator = torch.Generator().manual_seed(max_drafts)

    def numbers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    drafts = numbers(max_drafts + 1, num_rows)
    rows = DrawnRows(
        row=torch.randperm(num_rows, generator=generator).cuda(),
        first_sample=torch.arange(num_rows).cuda() * (max_drafts + 1),
        newest_position=numbers(80, num_rows).cuda(),
        num_drafts=drafts.cuda(),
        max_drafts=max_drafts,
        padding_row=num_rows // 2,
    )
    drawn = numbers(2, num_rows * (max_drafts + 1)).cuda()
    tokens = numbers(2, num_rows, 100).int().cuda()
    known = torch.ones(num_rows, dtype=torch.int64, device="cuda")
    pairs = []
    for accept in (kernels.accept, torch_ref.accept):
        tables = RowTables(tokens=tokens.clone(), num_known=known.clone(), pages=(), block_size=16)
        poison()
        pairs.append((accept(drawn, rows, tables), tables.tokens, tables.num_known))
    is_padding = rows.row == rows.padding_row
    assert torch.equal(pairs[0][0].masked_fill(is_padding, 0), pairs[1][0].masked_fill(is_padding, 0))
    assert torch.equal(pairs[0][1], pairs[1][1])
    assert torch.equal(pairs[0][2], pairs[1][2])


@pytest.mark.parametrize("first_token_id", [0, 70_000])
def test_masks(first_token_id: int) -> None:
    generator = torch.Generator().manual_seed(6)
    words = torch.randint(-(2**31), 2**31, (40, 4700), generator=generator).to(torch.int32).cuda()
    index = torch.randint(-1, 40, (256,), generator=generator).cuda()
    logits = random_logits("smooth", 256, 81_000, seed=8)
    poison()
    found = kernels.mask(logits, words, index, first_token_id=first_token_id)
    assert torch.equal(found, torch_ref.mask(logits, words, index, first_token_id=first_token_id))


def test_no_rows() -> None:
    nothing = torch.empty(0, dtype=torch.int64, device="cuda")
    params = SamplingTensors(
        values=torch.zeros(1, NUM_COLUMNS, dtype=torch.int32, device="cuda"),
        endings=torch.zeros(1, 8, dtype=torch.int32, device="cuda"),
        biases=torch.zeros(1, 0, 2, dtype=torch.int32, device="cuda"),
    )
    for draw in Draw:
        assert len(kernels.sample(torch.empty(0, 1000, device="cuda"), nothing, nothing, params, draw=draw)) == 0
