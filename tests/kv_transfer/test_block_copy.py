"""The copy kernel, interpreted on CPU memory where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from atom_cluster.kv_transfer.block_copy import BlockCopier

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("block_bytes", "stride", "alignment"),
    [
        (64, 64, 16),
        (4096, 4608, 16),
        (40_000, 40_000, 16),
        (200, 200, 8),
        (4104, 4200, 8),
        (37, 39, 1),
        (1500, 1502, 2),
    ],
)
def test_blocks_arrive_whole_and_nothing_else_is_written(block_bytes: int, stride: int, alignment: int) -> None:
    generator = torch.Generator().manual_seed(block_bytes)
    source = torch.randint(0, 256, (20, stride), dtype=torch.uint8, generator=generator).to(DEVICE)
    target = torch.zeros_like(source)
    remote, local = [3, 4, 19, 0, 7], [5, 18, 2, 0, 3]
    pairs = [(target.data_ptr() + stride * to, source.data_ptr() + stride * fro) for to, fro in zip(local, remote)]
    unused = [(0, 0)] * 3
    addresses = torch.tensor(pairs + unused, pin_memory=DEVICE.type == "cuda")
    BlockCopier(DEVICE).copy(addresses, len(pairs), block_bytes, alignment)
    expected = torch.zeros_like(source)
    expected[local, :block_bytes] = source[remote, :block_bytes]
    assert torch.equal(target, expected)


def test_more_chunks_than_programs_are_all_copied() -> None:
    source = torch.arange(300, device=DEVICE).repeat_interleave(8).view(300, 8)
    target = torch.zeros_like(source)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    starts = torch.stack([order * 64 + target.data_ptr(), torch.arange(300) * 64 + source.data_ptr()], dim=1)
    BlockCopier(DEVICE).copy(starts.to(DEVICE), 300, 64, 16)
    assert torch.equal(target[order], source)
