"""How steps become work of a GPU: captured once in graphs, or issued kernel by kernel. CPUs ignore it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from atom_cluster.config.base import FrozenConfig

DEFAULT_CAPTURE_SIZES = (*range(1, 9), *range(12, 33, 4), *range(40, 65, 8), *range(80, 257, 16), *range(288, 513, 32))
"""Rows of a step: fine steps where a row more costs much of the whole, coarse ones where it does not."""

PIECEWISE_SIZES = (*range(16, 129, 16), *range(160, 257, 32), *range(320, 513, 64), *range(640, 1025, 128))
PIECEWISE_SIZES += (*range(1280, 2049, 256), *range(2560, 4097, 512))
"""Tokens of a step with prompts: as far as the host may need longer to launch a pass than a GPU to compute it, which
models that are small, or cut into many parts, come to."""
MAX_UNTIMED_SIZE = 2048
"""Of those that are captured when they are needed, without a look at whether that pays."""


class CompilationConfig(FrozenConfig):
    """CUDA and HIP graphs."""

    graph_mode: Literal["none", "full", "full_and_piecewise"] = "full_and_piecewise"
    """full: a step that only decodes, plain or speculative, runs as a captured graph. full_and_piecewise: steps with
    prompts too, in pieces between their attentions, up to as many tokens as a GPU computes in less time than the host
    needs to launch their kernels, 4096 at most. none: every kernel is launched by the host."""
    capture_sizes: tuple[int, ...] | None = None
    """Numbers of rows to capture steps of; a step of fewer is filled up to the next. null: up to the most requests, in
    steps of 1 up to 8, of 4 up to 32, of 8 up to 64, of 16 up to 256, of 32 beyond."""
    capture: Literal["start", "lazy"] = "start"
    """start: all sizes before the first request; on GPUs steps with prompts of all sizes, too, so that no request waits
    for kernels to be compiled. lazy: each when it is first needed, which then takes longer; of steps with prompts those
    up to 2048 tokens, whether that pays or not."""
    max_capture_rows: int = Field(default=512, gt=0)
    """Steps of more rows than this are not captured."""

    @field_validator("capture_sizes")
    @classmethod
    def _are_sizes(cls, sizes: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if sizes is not None and (not sizes or min(sizes) < 1):
            raise ValueError("sizes are numbers of rows, 1 or more; leave it out for the usual ones")
        return sizes

    def sizes(self, max_num_requests: int) -> tuple[int, ...]:
        """Rows of the steps to capture, ascending; the last one covers all requests, if that many may be captured."""
        if self.graph_mode == "none":
            return ()
        limit = min(max_num_requests, self.max_capture_rows)
        wanted = DEFAULT_CAPTURE_SIZES if self.capture_sizes is None else self.capture_sizes
        sizes = {size for size in wanted if size <= limit}
        return tuple(sorted(sizes | {limit} if self.capture_sizes is None else sizes))

    def piecewise_sizes(self, max_num_tokens: int) -> tuple[int, ...]:
        """Tokens of the steps with prompts to capture in pieces, ascending; the last is the most that a step can have,
        or the largest that is captured."""
        if self.graph_mode != "full_and_piecewise":
            return ()
        limit = min(max_num_tokens, MAX_UNTIMED_SIZE if self.capture == "lazy" else PIECEWISE_SIZES[-1])
        return (*(size for size in PIECEWISE_SIZES if size < limit), limit)
