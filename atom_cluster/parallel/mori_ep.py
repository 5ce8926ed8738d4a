"""The token exchange by MORI-EP: AMD's dispatch and combine kernels, which write to the other ranks' memory themselves.

Knows no layers. Buffers have room for the most tokens that can come, and the device alone knows how many came: nothing
waits for it. MORI's signatures differ between versions: all calls are by keyword.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

from atom_cluster.errors import ConfigError
from atom_cluster.parallel.groups import Group
from atom_cluster.parallel.token_exchange import ReceivedTokens, local_experts

WARPS_PER_BLOCK = 16
BLOCKS = 80
INTER_NODE_BLOCKS = 32
INTER_NODE_RDMA_BLOCKS = 16
"""Launch sizes that MORI's own tests and AMD's engine use; blocks are capped by the units of the chip, as the kernels
meet at a barrier of all blocks."""


class MoriExchange:
    """Dispatch and combine among the ranks of one group. `close` is for every rank to call, once."""

    def __init__(
        self,
        group: Group,
        *,
        num_local_experts: int,
        experts_per_token: int,
        hidden_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        num_units: int,
        ranks_per_node: int = 8,
    ) -> None:
        """max_tokens: the most that a rank dispatches at a time. num_units: multiprocessors of the device.

        Raises ConfigError where MORI cannot be used.
        """
        if group.handle is None:
            raise ConfigError("MORI-EP exchanges tokens between ranks; this group has one")
        ops = _import("mori.ops")
        self._shmem = _import("mori.shmem")
        self._shmem.shmem_torch_process_group_init(group_name=group.handle.group_name)
        is_in_node = group.size <= ranks_per_node
        kinds = ops.EpDispatchCombineKernelType
        config = ops.EpDispatchCombineConfig(
            data_type=dtype,
            rank=group.rank,
            world_size=group.size,
            hidden_dim=hidden_size,
            scale_dim=0,
            scale_type_size=0,
            max_token_type_size=dtype.itemsize,
            max_num_inp_token_per_rank=max_tokens,
            num_experts_per_rank=num_local_experts,
            num_experts_per_token=experts_per_token,
            warp_num_per_block=WARPS_PER_BLOCK,
            block_num=min(num_units, BLOCKS if is_in_node else INTER_NODE_BLOCKS),
            kernel_type=kinds.IntraNode if is_in_node else kinds.InterNodeV1,
            gpu_per_node=min(ranks_per_node, group.size),
            rdma_block_num=0 if is_in_node else min(num_units // 2, INTER_NODE_RDMA_BLOCKS),
        )
        self._op: Any = ops.EpDispatchCombineOp(config=config)
        self._group, self._num_local_experts, self._max_tokens = group, num_local_experts, max_tokens

    def dispatch(self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> ReceivedTokens:
        """Send each token once to every rank that has an expert of it."""
        if len(x_TD) > self._max_tokens:
            raise ValueError(f"{len(x_TD)} tokens at a time; buffers are for {self._max_tokens}")
        index_TK = expert_TK.to(torch.int32).contiguous()
        x_RD, weight_RK, _, index_RK, num_received = self._op.dispatch(
            input=x_TD.contiguous(), weights=weight_TK.contiguous(), scales=None, indices=index_TK
        )
        expert_RK = local_experts(index_RK.long(), self._group, self._num_local_experts)
        row_R1 = torch.arange(len(index_RK), device=index_RK.device)[:, None]
        expert_RK = expert_RK.masked_fill(row_R1 >= num_received, self._num_local_experts)
        return ReceivedTokens(x_RD, expert_RK, weight_RK, way_back=index_TK)

    def combine(self, y_RD: torch.Tensor, received: ReceivedTokens) -> torch.Tensor:
        """Addends go back to where their tokens came from, and are added up."""
        index_TK: torch.Tensor = received.way_back
        y_TD: torch.Tensor
        y_TD, _ = self._op.combine(input=y_RD.contiguous(), weights=None, indices=index_TK)
        return y_TD[: len(index_TK)]

    def close(self) -> None:
        """Give the shared memory back."""
        self._op = None
        self._shmem.shmem_finalize()


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(f"MORI-EP cannot be used here: {module}: {error}") from error
