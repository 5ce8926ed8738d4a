"""How `gemm_hopper` cuts products, and what has room in shared memory. Knows no kernels and no tuning."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SPLITS = 16
"""Of what a round is full of, 64, every split has some."""
PIECE = 64
"""Outputs that the matrix units take at a time."""
LINE_BYTES = 128
"""Of inputs that are read at a time."""
_SHARED_BYTES = (227 << 10) - 2048
"""Of a program, without its barriers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HopperBlocks:
    """How a product is cut."""

    groups: int
    """Of four warps that multiply: 1 to 3."""
    pieces: int
    """Of 64 outputs, of each group: 1 or 2; 2 where outputs become gates."""
    tokens: int
    """A power of two from 16 to 128; at least 32 where they have scales per group, copied line by line."""
    splits: int
    """Programs that share outputs. They wait for each other: no more than can run at a time."""
    num_stages: int
    """At least as many as groups."""
    lines: int = 1
    """Stages that are filled together."""


def stages_with_room(blocks: HopperBlocks, *, is_grouped: bool) -> int:
    """In shared memory, next to what sums are exchanged in. is_grouped: tokens have scales per group of inputs."""
    stage_bytes = (blocks.groups * blocks.pieces * PIECE + blocks.tokens) * LINE_BYTES + 4 * blocks.tokens * is_grouped
    sums_bytes = blocks.groups * 4 * PIECE * chunk(blocks) if blocks.splits > 1 else 0
    return (_SHARED_BYTES - sums_bytes) // stage_bytes


def chunk(blocks: HopperBlocks) -> int:
    """Tokens whose parts are added up at a time: as many as registers have room for."""
    return min(blocks.tokens, 32 if blocks.splits <= 4 else 16 if blocks.splits <= 8 else 8)
