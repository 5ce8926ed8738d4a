"""Speculative output has exactly the model's distribution, over three positions together; a wrong rule is noticed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import msgspec
import pytest
import torch

from atom_cluster.kv_cache.layout import KvLayerLayout, KvLayout
from atom_cluster.layers.forward_batch import ForwardBatch
from atom_cluster.layers.logits import Logits
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from atom_cluster.ops.select import torch_table
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.runner import step_program
from atom_cluster.runner.inputs import StepInputs
from atom_cluster.runner.kv_memory import allocate_kv_memory
from atom_cluster.runner.model_runner import ModelRunner
from atom_cluster.runner.rank_info import RankInfo
from atom_cluster.runner.row_state import RowTable

CPU = torch.device("cpu")
VOCAB = 5
PROMPT = (2, 4, 4, 1)
NUM_DRAWS = 20_000
NUM_TOKENS = 3
MAX_DRAFTS = 2

Rule = Callable[[torch.Tensor, StepInputs, RowTable], torch.Tensor]


def random_table(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5


def whole(logits: torch.Tensor) -> Logits:
    return Logits(logits, VOCAB, ProcessGroups.single().tensor)


class BigramModel:
    """Logits depend on the last token; drafts come from another table, which agrees with the first in part."""

    kv_layout = KvLayout(layers=(KvLayerLayout(num_kv_heads=1, key_dim=1, value_dim=1, dtype="float32"),))
    num_draft_layers = 1
    vocab_size = VOCAB
    target = random_table(1)
    proposal = random_table(1) * 0.5 + random_table(2) * 0.7

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return batch.token_ids[:, None].float()

    def compute_logits(self, hidden_SD: torch.Tensor) -> Logits:  # noqa: N803 - the protocol's name
        return whole(self.target[hidden_SD[:, 0].long()])

    def forward_draft(
        self,
        index: int,
        next_token_ids_T: torch.Tensor,  # noqa: N803 - the protocol's names
        hidden_TD: torch.Tensor,  # noqa: N803
        batch: ForwardBatch,
    ) -> torch.Tensor:
        return next_token_ids_T[:, None].float()

    def compute_draft_logits(self, index: int, hidden_SD: torch.Tensor) -> Logits:  # noqa: N803
        return whole(self.proposal[hidden_SD[:, 0].long()])


def draw_outputs(sampling: SamplingParams) -> tuple[Counter[tuple[int, ...]], float]:
    """How often each output came up, and the share of drafts that were kept."""
    max_model_len = len(PROMPT) + NUM_TOKENS + MAX_DRAFTS + 1
    info = RankInfo(
        num_blocks=NUM_DRAWS,
        max_drafts=MAX_DRAFTS,
        block_size=16,
        max_num_requests=NUM_DRAWS,
        max_model_len=max_model_len,
        vocab_size=VOCAB,
    )
    memory = allocate_kv_memory(BigramModel.kv_layout, num_pages=(NUM_DRAWS,), block_size=16, device=CPU)
    groups, ops = ProcessGroups.single(), torch_table("test")
    runner = ModelRunner(model=BigramModel(), groups=groups, memory=memory, ops=ops, info=info, device=CPU)
    new_rows = tuple(
        NewRow(
            row=row,
            request_id=str(row),
            token_ids=PROMPT,
            num_prompt_tokens=len(PROMPT),
            pages=((row,),),
            sampling=msgspec.structs.replace(sampling, seed=row),
        )
        for row in range(NUM_DRAWS)
    )
    steps = [RowStep(row, 0, len(PROMPT), samples=True) for row in range(NUM_DRAWS)]
    outputs: list[list[int]] = [[] for _ in range(NUM_DRAWS)]
    num_drafted = num_kept = 0
    while steps:
        result = runner.run(StepPlan(step_id=0, new_rows=new_rows, rows=tuple(steps)))
        for one in result.sampled:
            outputs[one.row] += one.token_ids
        num_drafted += sum(step.num_drafts for step in steps)
        num_kept += sum(len(one.token_ids) - 1 for one in result.sampled)
        new_rows = ()
        steps = [
            RowStep(row, len(PROMPT) + len(output) - 1, 1 + MAX_DRAFTS, samples=True, num_drafts=MAX_DRAFTS)
            for row, output in enumerate(outputs)
            if len(output) < NUM_TOKENS
        ]
    return Counter(tuple(output[:NUM_TOKENS]) for output in outputs), num_kept / num_drafted


def target_probabilities(tokens: list[int], sampling: SamplingParams) -> list[float]:
    """The distribution of the next token, written out."""
    logits = BigramModel.target[tokens[-1]].tolist()
    output = tokens[len(PROMPT) :]
    for token in set(tokens):
        factor = sampling.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(output):
        logits[token] -= sampling.frequency_penalty * output.count(token) + sampling.presence_penalty
    weights = (torch.tensor(logits, dtype=torch.float64) / sampling.temperature).softmax(0).tolist()
    order = sorted(range(VOCAB), key=lambda token: -weights[token])
    kept = order[: sampling.top_k] if sampling.top_k else order
    mass = sum(weights[token] for token in kept)
    before = 0.0
    allowed = []
    for token in kept:
        if before < sampling.top_p:
            allowed.append(token)
        before += weights[token] / mass
    total = sum(weights[token] for token in allowed)
    return [weights[token] / total if token in allowed else 0.0 for token in range(VOCAB)]


def p_value(counts: Counter[tuple[int, ...]], sampling: SamplingParams) -> float:
    """Of a chi-square test of the outputs against the target's distribution; 0 when one came that cannot come."""
    expected: list[float] = []
    found: list[int] = []
    for output in itertools.product(range(VOCAB), repeat=NUM_TOKENS):
        probability = 1.0
        for i, token in enumerate(output):
            probability *= target_probabilities([*PROMPT, *output[:i]], sampling)[token]
        if probability == 0.0:
            if counts[output]:
                return 0.0
            continue
        expected.append(probability * NUM_DRAWS)
        found.append(counts[output])
    # Rare outputs are counted together, as the test needs.
    common = [i for i, want in enumerate(expected) if want >= 5]
    pairs = [(expected[i], found[i]) for i in common]
    rare = NUM_DRAWS - sum(want for want, _ in pairs)
    if rare >= 5:
        pairs.append((rare, NUM_DRAWS - sum(count for _, count in pairs)))
    chi_square = sum((count - want) ** 2 / want for want, count in pairs)
    halves = torch.tensor([(len(pairs) - 1) / 2, chi_square / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, top_k=3),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(repetition_penalty=1.3, frequency_penalty=0.6, presence_penalty=0.3),
        SamplingParams(temperature=1.5, top_k=4, top_p=0.9, frequency_penalty=0.5),
    ],
    ids=["temperature 1", "top-k", "top-p", "penalties", "all"],
)
def test_outputs_come_as_often_as_the_model_says(sampling: SamplingParams) -> None:
    counts, share_kept = draw_outputs(sampling)
    assert 0.2 < share_kept < 0.95, "drafts should be both kept and not"
    assert p_value(counts, sampling) > 0.01


def keep_always(
    token_ids_P: torch.Tensor,  # noqa: N803 - the replaced function's name
    inputs: StepInputs,
    table: RowTable,
) -> torch.Tensor:
    is_draft = torch.ones_like(token_ids_P, dtype=torch.bool)
    is_draft[inputs.layout.first_sample + inputs.layout.num_drafts] = False
    token_ids_P[is_draft] = table.tokens_at(inputs.sample_row, inputs.sample_position)[is_draft]
    return inputs.layout.num_drafts


def keep_by_ratio_without_correction(
    token_ids_P: torch.Tensor,  # noqa: N803
    inputs: StepInputs,
    table: RowTable,
) -> torch.Tensor:
    """Rejection sampling, but for the distribution that a rejected draft's place is drawn from."""
    if inputs.layout.max_drafts == 0:
        return torch.zeros_like(inputs.layout.num_drafts)
    before = table.tokens_at(inputs.sample_row, inputs.sample_position - 1)
    draft = table.tokens_at(inputs.sample_row, inputs.sample_position)
    ratio = (BigramModel.target.softmax(-1) / BigramModel.proposal.softmax(-1))[before, draft]
    is_kept = (torch.rand(len(draft), generator=torch.Generator().manual_seed(0)) < ratio).view(-1, 1 + MAX_DRAFTS)
    is_kept[:, -1] = False
    is_kept = is_kept.long().cumprod(dim=1).bool()
    token_ids_P[is_kept.flatten()] = draft[is_kept.flatten()]
    return is_kept.sum(dim=1)


@pytest.mark.parametrize("rule", [keep_always, keep_by_ratio_without_correction])
def test_a_wrong_rule_is_noticed(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(token_ids: torch.Tensor, inputs: StepInputs, table: RowTable, ops: OpTable) -> torch.Tensor:
        num_kept = rule(token_ids, inputs, table)
        table.append(inputs.sample_row, inputs.sample_position, token_ids)
        table.num_known[inputs.sampling_row] = inputs.newest_position + num_kept + 2
        return num_kept

    monkeypatch.setattr(step_program, "accept", accept)
    counts, _ = draw_outputs(SamplingParams())
    assert p_value(counts, SamplingParams()) < 1e-6
