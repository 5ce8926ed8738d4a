"""What the sampler adds to the ops it calls: rows of a table, log probabilities, adjusted logits, several ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.layers.logits import Logits
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, StepPlan
from atom_cluster.ops.sampling import Draw
from atom_cluster.ops.select import select_ops
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.groups import Group, ProcessGroups
from atom_cluster.platform.detect import detect_platform
from atom_cluster.runner.row_state import RowTable
from atom_cluster.runner.sampler import SampledBatch, Samples, sample
from atom_cluster.runner.sampling_table import draw_of
from tests.processes import run_ranks
from tests.runner.context_model import ContextModel

VOCAB = 40
CPU = torch.device("cpu")


@pytest.fixture(params=["torch", "cpu"])
def ops(request: pytest.FixtureRequest) -> OpTable:
    return ops_of(request.param)


def ops_of(backend: str) -> OpTable:
    return select_ops(OpsConfig(backend=backend), detect_platform("cpu"), torch.float32)


def table_of(
    samplings: list[SamplingParams], *, tokens: list[list[int]], eos: tuple[int, ...] = (), num_rows: int = 0
) -> RowTable:
    """Rows with one prompt token each, and output."""
    table = RowTable(
        num_rows=max(num_rows, len(samplings)),
        max_model_len=60,
        block_size=4,
        groups=ContextModel().kv_layout.groups,
        num_pages=(9,),
        num_drafts=0,
        device=CPU,
    )
    new_rows = tuple(
        NewRow(
            row=row,
            request_id=str(row),
            token_ids=tuple(tokens[row]),
            num_prompt_tokens=1,
            pages=((),),
            sampling=sampling,
            eos_token_ids=eos,
        )
        for row, sampling in enumerate(samplings)
    )
    table.apply(StepPlan(step_id=0, new_rows=new_rows))
    return table


def choose(
    ops: OpTable,
    logits: torch.Tensor,
    samplings: list[SamplingParams],
    *,
    position: int = 0,
    tokens: list[list[int]] | None = None,
    eos: tuple[int, ...] = (),
    group: Group | None = None,
) -> SampledBatch:
    """Choose after one prompt token and `position` output tokens; `tokens` are those of each row, if they matter."""
    tokens = tokens or [[0] * (position + 1)] * len(samplings)
    index = torch.arange(len(samplings))
    samples = Samples(row=index, position=torch.full_like(index, len(tokens[0])), samplings=tuple(samplings))
    group = group or ProcessGroups.single().tensor
    width = -(-logits.shape[1] // group.size)
    padded = torch.nn.functional.pad(logits, (0, width * group.size - logits.shape[1]), value=1e9)
    part = padded[:, group.rank * width : (group.rank + 1) * width]
    table = table_of(samplings, tokens=tokens, eos=eos)
    return sample(Logits(part, logits.shape[1], group), samples, table=table, ops=ops)


def random_logits(num_rows: int, vocab_size: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("temperature", [0.0, 1e-9])
def test_temperature_zero_or_tiny_takes_the_most_likely_token(ops: OpTable, temperature: float) -> None:
    logits = random_logits(3)
    rows = [SamplingParams(temperature=temperature, seed=s) for s in range(3)]
    assert torch.equal(choose(ops, logits, rows).token_ids, logits.argmax(-1))


def test_a_small_temperature_does_not_overflow(ops: OpTable) -> None:
    logits = random_logits(1) * 1e4
    assert choose(ops, logits, [SamplingParams(temperature=1e-4)]).token_ids.item() == logits.argmax().item()


def test_successive_positions_of_one_seed_follow_the_distribution(ops: OpTable) -> None:
    logits = torch.tensor([[0.7, 0.3]]).log().expand(2000, 2)
    rows = torch.zeros(2000, dtype=torch.int64)
    sampling = SamplingParams(seed=11)
    samples = Samples(row=rows, position=torch.arange(1, 2001), samplings=(sampling,) * 2000)
    table = table_of([sampling], tokens=[[0]])
    drawn = sample(Logits(logits, 2, ProcessGroups.single().tensor), samples, table=table, ops=ops).token_ids
    assert abs(int(drawn.sum()) - 600) < 5 * math.sqrt(2000 * 0.21)


def test_the_draw_depends_on_seed_and_position_and_nothing_else(ops: OpTable) -> None:
    logits = torch.zeros(1, 1000)

    def draw(seed: int, position: int) -> float:
        return choose(ops, logits, [SamplingParams(seed=seed)], position=position).token_ids.item()

    assert draw(1, 1) == draw(1, 1)
    assert len({draw(seed, position) for seed in range(5) for position in range(5)}) > 20


def test_endings_are_not_sampled_before_min_tokens(ops: OpTable) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 100.0
    logits[0, 9] = 50.0
    logits[0, 11] = 70.0
    row = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(11, *range(VOCAB, VOCAB + 20)))
    found = [choose(ops, logits, [row], position=p, eos=(7, VOCAB + 3)).token_ids.item() for p in range(4)]
    assert found == [9, 9, 7, 7]


def test_logprobs_are_those_of_the_raw_logits(ops: OpTable) -> None:
    logits = random_logits(2)
    rows = [SamplingParams(temperature=0.3, top_k=2, logprobs=3, min_tokens=5), SamplingParams(temperature=0.0)]
    batch = choose(ops, logits, rows, eos=(1,))
    assert batch.logprobs is not None
    first, second = batch.logprobs.read()
    expected = logits[0].log_softmax(-1)
    assert second is None
    assert first is not None
    assert first.logprob == pytest.approx(expected[batch.token_ids[0]].item(), abs=1e-5)
    assert [top.token_id for top in first.top] == expected.topk(3).indices.tolist()
    assert [top.logprob for top in first.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)


def test_more_top_logprobs_than_tokens_gives_all_of_them(ops: OpTable) -> None:
    batch = choose(ops, random_logits(1, vocab_size=4), [SamplingParams(logprobs=10)])
    assert batch.logprobs is not None
    (found,) = batch.logprobs.read()
    assert found is not None
    assert sum(math.exp(top.logprob) for top in found.top) == pytest.approx(1.0, abs=1e-5)


def test_penalties_of_one_row_leave_the_others_alone(ops: OpTable) -> None:
    rows = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, presence_penalty=2.0)]
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert choose(ops, logits, rows, tokens=[[1, 0], [1, 0]]).token_ids.tolist() == [0, 1]


def test_rows_that_stand_for_no_request_disturb_nothing(ops: OpTable) -> None:
    samplings = [SamplingParams(seed=3, logprobs=1, frequency_penalty=0.5)]
    table = table_of(samplings, tokens=[[0]], num_rows=4)
    samples = Samples(
        row=torch.tensor([0, table.padding_row, table.padding_row]),
        position=torch.tensor([1, 1, 1]),
        samplings=tuple(samplings),
    )
    logits = random_logits(3)
    batch = sample(Logits(logits, VOCAB, ProcessGroups.single().tensor), samples, table=table, ops=ops)
    assert batch.token_ids.tolist()[1:] == logits[1:].argmax(-1).tolist()
    assert batch.logprobs is not None and len(batch.logprobs.read()) == 1
    assert batch.token_ids[0] == choose(ops, logits[:1], samplings).token_ids[0]


@pytest.mark.parametrize(
    ("sampling", "draw"),
    [
        (SamplingParams(temperature=0.0, top_k=4, top_p=0.3, min_p=0.1), Draw.GREEDY),
        (SamplingParams(), Draw.RANDOM),
        (SamplingParams(top_k=4), Draw.TRUNCATED),
        (SamplingParams(top_p=0.3), Draw.TRUNCATED),
        (SamplingParams(min_p=0.1), Draw.TRUNCATED),
    ],
)
def test_what_a_row_takes(sampling: SamplingParams, draw: Draw) -> None:
    assert draw_of(sampling) is draw


BATCHES = [
    [SamplingParams(temperature=0.0)] * 3,
    [SamplingParams(seed=1), SamplingParams(temperature=0.0), SamplingParams(seed=2, temperature=0.5)],
    [SamplingParams(seed=1, top_p=0.5), SamplingParams(temperature=0.0), SamplingParams(seed=2, top_k=4)],
    [SamplingParams(seed=1, presence_penalty=1.0), SamplingParams(temperature=0.0, logprobs=2), SamplingParams()],
]


def sample_batches(group: Group) -> list[tuple[list[int], bool]]:
    found = []
    for i, rows in enumerate(BATCHES):
        for vocab_size in (VOCAB, 41, 3):
            batch = choose(ops_of("cpu"), random_logits(3, vocab_size, seed=i), rows, group=group)
            found.append((batch.token_ids.tolist(), batch.logprobs is not None))
    return found


def run_rank(rank: int, folder: str) -> None:
    groups = ProcessGroups.connect(
        rank=rank, world_size=2, init_method=f"file://{folder}/meeting", device=CPU, timeout_s=60
    )
    torch.save(sample_batches(groups.tensor), f"{folder}/{rank}.pt")
    groups.close()


def test_two_ranks_choose_what_one_does(tmp_path: Path) -> None:
    expected = sample_batches(ProcessGroups.single().tensor)
    run_ranks(run_rank, str(tmp_path), num_ranks=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == expected
    assert second == [(token_ids, False) for token_ids, _ in expected]
