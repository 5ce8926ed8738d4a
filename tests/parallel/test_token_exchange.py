"""Tokens that are sent to the ranks of their experts get the same sums as with all experts on one rank."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from atom_cluster.errors import ConfigError
from atom_cluster.ops import torch_ref
from atom_cluster.ops.moe import ExpertActivation
from atom_cluster.parallel.groups import Group, ProcessGroups
from atom_cluster.parallel.mori_ep import MoriExchange
from atom_cluster.parallel.token_exchange import AllToAllExchange, TokenExchange
from tests.parallel import mori_stand_in
from tests.processes import run_ranks

NUM_EXPERTS, SIZE, EXPERT_SIZE, NUM_CHOSEN = 6, 8, 4, 3
STEPS = [(5, 2), (0, 4), (3, 0), (4, 4), (0, 0)]
"""Tokens of each rank."""
MAX_TOKENS = 5


def inputs(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A rank's tokens. In the first step all of them stay on the first rank, in the fourth all change the rank."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    num_tokens = STEPS[step][rank]
    expert = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(-1)[:, :NUM_CHOSEN]
    if step in (0, 3):
        first = 0 if step == 0 or rank == 1 else NUM_EXPERTS // 2
        expert = first + torch.arange(NUM_CHOSEN).expand(num_tokens, -1)
    x = torch.randn(num_tokens, SIZE, generator=generator)
    return x, expert, torch.rand(num_tokens, NUM_CHOSEN, generator=generator)


def experts(span: slice) -> object:
    generator = torch.Generator().manual_seed(100)
    gate_up = torch.randn(NUM_EXPERTS, 2 * EXPERT_SIZE, SIZE, generator=generator)
    down = torch.randn(NUM_EXPERTS, SIZE, EXPERT_SIZE, generator=generator)
    return torch_ref.prepare_experts(
        gate_up[span],
        down[span],
        gate_up_bias=None,
        down_bias=None,
        activation=ExpertActivation(),
        dtype=torch.float32,
    )


def outputs(exchange: TokenExchange, span: slice, rank: int) -> list[torch.Tensor]:
    op = experts(span)
    results = []
    for step in range(len(STEPS)):
        received = exchange.dispatch(*inputs(step, rank))
        assert received.expert_RK.dtype == torch.int64
        y = op(received.x_RD, received.expert_RK, received.weight_RK)
        results.append(exchange.combine(y, received))
    return results


def run_rank(rank: int, folder: str) -> None:
    groups = ProcessGroups.connect(
        rank=rank,
        world_size=2,
        init_method=f"file://{folder}/meeting",
        device=torch.device("cpu"),
        divides_experts=True,
        timeout_s=60,
    )
    half = NUM_EXPERTS // 2
    span = slice(rank * half, (rank + 1) * half)
    found = {"torch": outputs(AllToAllExchange(groups.expert, num_local_experts=half), span, rank)}
    for version in mori_stand_in.SIGNATURES:
        calls = mori_stand_in.install(version)
        exchange = mori_exchange(groups.expert)
        found[version] = outputs(exchange, span, rank)
        exchange.close()
        assert calls == ["shmem_torch_process_group_init", "shmem_finalize"]
    groups.close()
    torch.save(found, f"{folder}/{rank}.pt")


def mori_exchange(group: Group, ranks_per_node: int = 8) -> MoriExchange:
    return MoriExchange(
        group,
        num_local_experts=NUM_EXPERTS // 2,
        experts_per_token=NUM_CHOSEN,
        hidden_size=SIZE,
        max_tokens=MAX_TOKENS,
        dtype=torch.float32,
        num_units=64,
        ranks_per_node=ranks_per_node,
    )


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    run_ranks(run_rank, str(tmp_path), num_ranks=2)
    op = experts(slice(None))
    for rank in range(2):
        for name, found in torch.load(tmp_path / f"{rank}.pt").items():
            for step, y in enumerate(found):
                expected = op(*inputs(step, rank))
                torch.testing.assert_close(y, expected, msg=f"{name}, rank {rank}, step {step}")


def test_a_group_of_one_keeps_its_tokens() -> None:
    exchange = AllToAllExchange(ProcessGroups.single().expert, num_local_experts=NUM_EXPERTS)
    for found, step in zip(outputs(exchange, slice(None), 0), range(len(STEPS))):
        torch.testing.assert_close(found, experts(slice(None))(*inputs(step, 0)))


class Handle:
    group_name = "experts"


def test_ranks_of_several_nodes_use_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mori", "mori.ops", "mori.shmem"):
        monkeypatch.setitem(sys.modules, name, None)
    mori_stand_in.install("amd-mori 1.2.4")
    group = Group(rank=1, size=16, handle=Handle())
    config = mori_exchange(group)._op.config
    assert (config.kernel_type, config.gpu_per_node, config.block_num) == ("between nodes", 8, 32)
    config = mori_exchange(group, ranks_per_node=16)._op.config
    assert (config.kernel_type, config.gpu_per_node, config.block_num) == ("in node", 16, 64)
    with pytest.raises(ValueError, match="6 tokens"):
        mori_exchange(group).dispatch(torch.zeros(6, SIZE), torch.zeros(6, 3), torch.zeros(6, 3))


def test_without_mori_or_other_ranks_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="this group has one"):
        mori_exchange(ProcessGroups.single().expert)
    monkeypatch.setitem(sys.modules, "mori.ops", None)
    with pytest.raises(ConfigError, match=r"mori\.ops"):
        mori_exchange(Group(rank=0, size=2, handle=Handle()))
