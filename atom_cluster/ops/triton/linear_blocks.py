"""How products with weights are cut, per chip, shape and number of tokens: as measured, or a guess for other chips.

Knows no kernels. Measured choices are in `tuning/linear.<arch>.json`; a shape that was not measured takes the choice of
the one nearest to it, with as many programs.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import triton

from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.codes import KIND_NAMES
from atom_cluster.ops.triton.gemm import GemmBlocks
from atom_cluster.ops.triton.gemm_hopper_cut import MAX_SPLITS as MAX_HOPPER_SPLITS
from atom_cluster.ops.triton.gemm_hopper_cut import PIECE, HopperBlocks
from atom_cluster.ops.triton.gemv_hopper import MAX_TOKENS as MAX_GEMV_HOPPER_TOKENS
from atom_cluster.ops.triton.gemv_hopper import GemvBlocks

GEMV, GEMV_HOPPER, GEMM, GEMM_HOPPER, LIBRARY = "gemv", "gemv_hopper", "gemm", "gemm_hopper", "library"
MAX_TUNED_TOKENS = 128
_MAX_SPLITS = 8
_MIN_HOPPER_INPUTS = 512
"""Of a program of `gemm_hopper`, where several share outputs."""
_MIN_TURNS = 2
"""Blocks of inputs of a program, at least, where several share outputs."""

_AS_WIDE = {"float16": "bfloat16", "int8": "float8"}
"""Kinds that are read as fast as others, which were measured."""

Choice = dict[str, Any]
"""`kernel`, and how it cuts."""
_Row = tuple[int, int, int, Choice]
"""Outputs, inputs, tokens, choice."""


def choose(kind: str, num_out: int, num_in: int, num_tokens: int) -> Choice:
    """For weights of a kind, such as `bfloat16`, of this rank, and up to `MAX_TUNED_TOKENS` tokens, by kernels that are
    not for one chip."""
    return _choose(runtime.arch(), kind, num_out, num_in, num_tokens)


@cache
def _choose(arch: str, kind: str, num_out: int, num_in: int, num_tokens: int) -> Choice:
    measured = _measured(arch).get(_AS_WIDE.get(kind, kind), ())
    steps = sorted({tokens for _, _, tokens, _ in measured})
    step = next((tokens for tokens in steps if tokens >= num_tokens), steps[-1] if steps else 0)
    nearest = _nearest([row for row in measured if row[2] == step], num_out, num_in)
    if nearest is None:
        return _guess(kind, num_out, num_in, num_tokens)
    rows, columns, _, choice = nearest
    if choice["kernel"] != GEMM or (rows, columns) == (num_out, num_in):
        return choice
    tiles, wanted = -(-num_out // choice["outputs"]), -(-rows // choice["outputs"]) * choice["splits"]
    return {**choice, "splits": _splits(tiles, num_in // choice["inputs"], wanted)}


def hopper_blocks(kind: str, num_out: int, num_in: int, num_tokens: int) -> GemvBlocks | None:
    """How `gemv_hopper` cuts such a product; None where another kernel is faster, or nothing was measured."""
    return _hopper_blocks(runtime.arch(), kind, num_out, num_in, num_tokens)


@cache
def _hopper_blocks(arch: str, kind: str, num_out: int, num_in: int, num_tokens: int) -> GemvBlocks | None:
    nearest = _nearest(_rows_of(arch, GEMV_HOPPER, kind, num_tokens), num_out, num_in)
    return GemvBlocks(**nearest[3]) if nearest and nearest[3] else None


def gemm_hopper_blocks(kind: str, num_out: int, num_in: int, num_tokens: int) -> HopperBlocks | None:
    """How `gemm_hopper` cuts such a product; None where another kernel is faster, or nothing was measured, as for those
    few tokens that `gemv_hopper` takes."""
    if num_tokens <= MAX_GEMV_HOPPER_TOKENS:
        return None
    return _gemm_hopper_blocks(runtime.arch(), kind, num_out, num_in, num_tokens)


@cache
def _gemm_hopper_blocks(arch: str, kind: str, num_out: int, num_in: int, num_tokens: int) -> HopperBlocks | None:
    nearest = _nearest(_rows_of(arch, GEMM_HOPPER, kind, num_tokens), num_out, num_in)
    if nearest is None or not nearest[3]:
        return None
    blocks = HopperBlocks(**nearest[3])
    if nearest[:2] == (num_out, num_in):
        return blocks
    outputs = blocks.groups * blocks.pieces * PIECE
    wanted = -(-nearest[0] // outputs) * blocks.splits // -(-num_out // outputs)
    return replace(blocks, splits=max(1, min(MAX_HOPPER_SPLITS, wanted, num_in // _MIN_HOPPER_INPUTS)))


def _rows_of(arch: str, kernel: str, kind: str, num_tokens: int) -> list[_Row]:
    """What was measured of a kernel for the fewest tokens that are enough; choices are empty where others won."""
    measured = _measured(arch, kernel).get(_AS_WIDE.get(kind, kind), ())
    step = min((tokens for _, _, tokens, _ in measured if tokens >= num_tokens), default=None)
    return [row for row in measured if row[2] == step]


def _nearest(rows: list[_Row], num_out: int, num_in: int) -> _Row | None:
    """The most similar product."""

    def distance(row: _Row) -> float:
        return abs(math.log(row[0] / num_out)) + abs(math.log(row[1] / num_in))

    return min(rows, key=distance, default=None)


def gemm_blocks(choice: Choice) -> GemmBlocks:
    """Of a choice of that kernel."""
    return GemmBlocks(**{key: value for key, value in choice.items() if key != "kernel"})


def many_tokens_blocks(num_in_step: int = 128) -> GemmBlocks:
    """For products that are bound by the matrix units."""
    if runtime.is_hip():
        return GemmBlocks(outputs=128, tokens=128, inputs=min(64, num_in_step), num_warps=8, num_stages=2)
    return GemmBlocks(outputs=128, tokens=128, inputs=num_in_step, num_warps=8, num_stages=3)


def fitted(blocks: GemmBlocks, step: int) -> GemmBlocks:
    """With at most `step` inputs at a time."""
    return blocks if blocks.inputs <= step else replace(blocks, inputs=step)


def _guess(kind: str, num_out: int, num_in: int, num_tokens: int) -> Choice:
    if kind in ("float32", "float16", "bfloat16"):
        if num_tokens > 4:
            return {"kernel": LIBRARY}
        block_in = min(512, triton.next_power_of_2(num_in))
        return {"kernel": GEMV, "block_out": 4, "block_in": block_in, "num_warps": 2}
    tokens = min(128, max(16, triton.next_power_of_2(num_tokens)))
    if kind in KIND_NAMES and tokens > 16 and runtime.is_hopper():
        # Tokens are the rows of the matrix units there, of which sm_90 has at least 64.
        tokens = max(tokens, 64)
    return {
        "kernel": GEMM,
        "outputs": 64,
        "tokens": tokens,
        "inputs": 128,
        "splits": _splits(-(-num_out // 64), num_in // 128, 768 if kind in KIND_NAMES and tokens == 16 else 256),
        "num_warps": 4,
        "num_stages": 2 if runtime.is_hip() else 4,
    }


def _splits(tiles: int, turns: int, wanted: int) -> int:
    """A power of two that makes about `wanted` programs of the tiles."""
    splits = 1
    while splits < _MAX_SPLITS and tiles * splits * 1.5 <= wanted and turns // (2 * splits) >= _MIN_TURNS:
        splits *= 2
    return splits


@cache
def _measured(arch: str, part: str = "kinds") -> dict[str, list[_Row]]:
    """By kind."""
    path = Path(__file__).parent / "tuning" / f"linear.{arch}.json"
    if not path.exists():
        return {}
    kinds = json.loads(path.read_text()).get(part, {})
    return {kind: [tuple(row) for row in rows] for kind, rows in kinds.items()}
