"""A stand-in for MORI-EP: its signatures as published, and what it is documented to do, by gathers of everything.

Nothing here was run next to the real package. Tokens arrive in any order, in buffers for the most that can come, with
what was there before behind them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from tests.published_signatures import read_signatures, with_signature

SIGNATURES = read_signatures(Path(__file__).parent / "mori_signatures.json")
OPS, SHMEM = "mori.ops.dispatch_combine", "mori.shmem.api"


class ExchangeOp:
    """One rank's end."""

    def __init__(self, config: Any, check: Callable[[Callable[..., Any], str], Callable[..., Any]]) -> None:
        self.config = config
        self.dispatch = check(self._dispatch, "dispatch")
        self.combine = check(self._combine, "combine")
        self._num_dispatched = 0
        self._sources: list[tuple[int, int]] = []

    def _dispatch(
        self, input: torch.Tensor, weights: torch.Tensor, scales: None, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, torch.Tensor, torch.Tensor]:
        config = self.config
        assert scales is None and indices.dtype == torch.int32 and weights.dtype == torch.float32
        assert len(input) <= config.max_num_inp_token_per_rank and input.shape[1] == config.hidden_dim
        assert indices.shape == weights.shape == (len(input), config.num_experts_per_token)
        self._num_dispatched = len(input)
        everyone: list[Any] = [None] * config.world_size
        dist.all_gather_object(everyone, (input, weights, indices))
        self._sources = [
            (rank, token)
            for rank, (_, _, ids) in enumerate(everyone)
            for token in range(len(ids))
            if (ids[token] // config.num_experts_per_rank == config.rank).any()
        ][::-1]
        num_rows = config.world_size * config.max_num_inp_token_per_rank
        x = torch.full((num_rows, config.hidden_dim), float("nan"), dtype=input.dtype)
        share = torch.full((num_rows, config.num_experts_per_token), float("nan"))
        ids = torch.full((num_rows, config.num_experts_per_token), config.rank * config.num_experts_per_rank)
        ids = ids.to(torch.int32)
        for row, (rank, token) in enumerate(self._sources):
            x[row], share[row], ids[row] = (rows[token] for rows in everyone[rank])
        return x, share, None, ids, torch.tensor([len(self._sources)], dtype=torch.int32)

    def _combine(self, input: torch.Tensor, weights: None, indices: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert weights is None and len(indices) == self._num_dispatched, "indices are those that were dispatched"
        config = self.config
        everyone: list[Any] = [None] * config.world_size
        dist.all_gather_object(everyone, (self._sources, input))
        total = torch.zeros(config.max_num_inp_token_per_rank, config.hidden_dim)
        for sources, rows in everyone:
            for row, (rank, token) in enumerate(sources):
                if rank == config.rank:
                    total[token] += rows[row].float()
        return total.to(input.dtype), None


def install(version: str, modules: dict[str, ModuleType] = sys.modules) -> list[str]:
    """Put it in the place of the package; the list gets the names of what is called outside of the op."""
    signatures = SIGNATURES[version]
    calls: list[str] = []

    def check(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        return with_signature(function, signatures[f"{OPS}:EpDispatchCombineOp.{name}"])

    def make_config(**kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(**kwargs)

    def make_op(config: SimpleNamespace) -> ExchangeOp:
        return ExchangeOp(config, check)

    ops, shmem = ModuleType("mori.ops"), ModuleType("mori.shmem")
    ops.EpDispatchCombineKernelType = SimpleNamespace(  # type: ignore[attr-defined]
        IntraNode="in node", InterNodeV1="between nodes"
    )
    ops.EpDispatchCombineConfig = with_signature(  # type: ignore[attr-defined]
        make_config, signatures[f"{OPS}:EpDispatchCombineConfig"]
    )
    ops.EpDispatchCombineOp = with_signature(  # type: ignore[attr-defined]
        make_op, signatures[f"{OPS}:EpDispatchCombineOp.__init__"]
    )
    for name in ("shmem_torch_process_group_init", "shmem_finalize"):
        signature: inspect.Signature = signatures[f"{SHMEM}:{name}"]
        setattr(shmem, name, with_signature(lambda name=name, **_: calls.append(name), signature))
    modules.update({"mori": ModuleType("mori"), "mori.ops": ops, "mori.shmem": shmem})
    return calls
