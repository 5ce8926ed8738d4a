"""One launch that copies many scattered blocks between memories which the device can address, its peers' included.

Copy engines take one command per contiguous piece, which costs them half a microsecond or more whatever the size. This
kernel is for lists of small pieces. What limits it is the link, and what fills a link are loads under way: about a MiB
of them at any time. On NVIDIA loads go into shared memory, some turns ahead of the stores, so that few multiprocessors
have that many and forward passes keep the others. Between two H200 (NVLink, 2026-11-21), in percent of what a plain
copy of as many bytes reaches, 512 MiB in blocks of

                                    4 KiB   16 KiB   64 KiB  256 KiB    2 MiB
    16 programs                        34       93       94       94       94
    32 programs                        68       94       94       94       95
    64 programs without stages         46       93       94       93       91
    16 programs without stages         11       40       74       81       83
    copy engines, no program            6       18       49       87       95

That was with the addresses in the device's memory. The kernel reads them from the host's now, so that nothing has to
bring them first; whole reads of blocks of 4 and 16 KiB became shorter too (2026-11-22: 19 and 73 percent, before 16 and
63).

Knows nothing of peers, handles or tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.units import KiB, ceil_div

_CHUNK_BYTES = 16 * KiB
"""Of one program's turn."""
_MAX_PROGRAMS = 128
_WORD_BYTES = 8
_VECTOR_BYTES = 16
_IS_HIP = torch.version.hip is not None
_NUM_WARPS, _STAGES, _UNDER_WAY_BYTES = (8, 1, 1024 * KiB) if _IS_HIP else (4, 6, 1536 * KiB)
"""Of a program; turns of it that are under way; bytes of all programs together. For HIP not measured yet."""


class BlockCopier:
    """Copies lists of blocks on one device.

    Holds its kernels compiled, so that a copy waits for no compiler, and launches them as they are: to find the one
    that fits the arguments, as Triton does for others, would take the host longer than all the rest of a launch.
    """

    def __init__(self, device: torch.device) -> None:
        """Compiles all that `copy` can need, or finds it compiled."""
        scratch = torch.zeros(2 * _VECTOR_BYTES, dtype=torch.uint8, device=device)
        addresses = torch.tensor([[scratch.data_ptr(), scratch.data_ptr() + _VECTOR_BYTES]], device=device)
        self._kernels = {
            unit_bytes: _copy_kernel[(1,)](
                addresses, 1, _VECTOR_BYTES // unit_bytes, 1, *_constants(unit_bytes), num_warps=_NUM_WARPS
            )
            for unit_bytes in (_VECTOR_BYTES, _WORD_BYTES, 1)
        }
        scratch.cpu()

    def copy(
        self, addresses: torch.Tensor, num_blocks: int, block_bytes: int, alignment: int, stream: int | None = None
    ) -> None:
        """Copy block i from `addresses[i, 1]` to `addresses[i, 0]`, on this stream, or else the device's current one.

        addresses: int64 [num_blocks or more, 2], which the device can read: pinned memory of the host will do, and is
        faster than to copy it first. It has to stay as it is until the stream has made the copy. No block that is
        written may overlap another of the list. alignment: what all addresses and `block_bytes` are multiples of; 16 is
        fastest, less than 8 is slow.
        """
        unit_bytes = next(size for size in (_VECTOR_BYTES, _WORD_BYTES, 1) if alignment % size == 0)
        chunk_bytes = _chunk_bytes(unit_bytes)
        chunks_per_block = ceil_div(block_bytes, chunk_bytes)
        enough = ceil_div(_UNDER_WAY_BYTES, _STAGES * min(chunk_bytes, block_bytes))
        num_programs = min(enough, _MAX_PROGRAMS, num_blocks * chunks_per_block)
        arguments = addresses, num_blocks, block_bytes // unit_bytes, chunks_per_block, *_constants(unit_bytes)
        compiled = self._kernels[unit_bytes]
        if compiled is None:  # the interpreter has no compiled kernels
            _copy_kernel[(num_programs,)](*arguments)
            return
        compiled[(num_programs, 1, 1)](*arguments, stream=stream)


def _chunk_bytes(unit_bytes: int) -> int:
    return _CHUNK_BYTES if unit_bytes > 1 else _CHUNK_BYTES // _VECTOR_BYTES


def _constants(unit_bytes: int) -> tuple[int, int, int, int]:
    """What the kernel is compiled for."""
    word_bytes = min(unit_bytes, _WORD_BYTES)
    return unit_bytes, unit_bytes // word_bytes, _chunk_bytes(unit_bytes) // word_bytes, _STAGES


@triton.jit
def _words(addresses_ptr, index, UNIT_BYTES: tl.constexpr):
    """Where a block begins. Alignment has to be told: the address comes out of memory."""
    address = tl.load(addresses_ptr + index)
    if UNIT_BYTES == 1:
        words = address.to(tl.pointer_type(tl.uint8))
    else:
        words = tl.multiple_of(address.to(tl.pointer_type(tl.int64)), UNIT_BYTES)
    return words


# Not specialized: one compiled kernel serves all lists.
@triton.jit(do_not_specialize=["num_blocks", "block_units", "chunks_per_block"])
def _copy_kernel(
    addresses_ptr,
    num_blocks,
    block_units,
    chunks_per_block,
    UNIT_BYTES: tl.constexpr,
    WORDS_PER_UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    for task in tl.range(tl.program_id(0), num_blocks * chunks_per_block, tl.num_programs(0), num_stages=STAGES):
        block = task // chunks_per_block
        word = (task % chunks_per_block) * CHUNK + tl.arange(0, CHUNK)
        is_inside = word < block_units * WORDS_PER_UNIT
        target = _words(addresses_ptr, 2 * block, UNIT_BYTES)
        source = _words(addresses_ptr, 2 * block + 1, UNIT_BYTES)
        tl.store(target + word, tl.load(source + word, is_inside), is_inside)
