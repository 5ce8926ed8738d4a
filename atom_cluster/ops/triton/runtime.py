"""What kernels and their launchers ask about the chip, and whether they are interpreted. Knows no kernels.

Kernels are compiled for the chip that Triton's active driver names, so nothing here depends on torch seeing a device:
the tests compile every kernel for chips that are not there.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any, cast

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors. Decided when they are imported.
Float32 only: its arithmetic on bfloat16 is wrong."""


SIZES = (1, 8, 32, 128, 512, 2048)
"""Blocks of rows that kernels know: `room_for`."""


def varying(*names: str) -> dict[str, list[str]]:
    """Options of `triton.jit` for a kernel's arguments that differ from step to step.

    Triton compiles a kernel anew for integers that are 1 or multiples of 16, and for pointers that are not multiples
    of 16 bytes. A step would wait a second for that, and with it everybody who decodes.
    """
    return {"do_not_specialize": list(names), "do_not_specialize_on_alignment": list(names)}


def room_for(count: int) -> int:
    """The smallest of `SIZES`, or power of two behind them, that is no less: few enough to compile all before a request
    comes (`runner/warm_up.py`)."""
    return next((size for size in SIZES if size >= count), triton.next_power_of_2(count))


def is_hip() -> bool:
    """Whether kernels are compiled for an AMD chip."""
    return not INTERPRETED and _target()[0] == "hip"


def is_hopper() -> bool:
    """Whether kernels are compiled for an NVIDIA chip with warp-group matrix units and bulk copies (sm_90)."""
    return not INTERPRETED and _target() == ("cuda", "sm_90")


def arch() -> str:
    """The chip that kernels are compiled for, as `Platform.arch` spells it: `sm_90`, `gfx942`; `interpreter`."""
    return "interpreter" if INTERPRETED else _target()[1]


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of the chip, for grids that fill it; few where there is no chip."""
    return 8 if INTERPRETED or device.type == "cpu" else _count_multiprocessors(device)


def _target() -> tuple[str, str]:
    """Backend and chip of the active driver, which tests change. Asked at every launch."""
    return _target_of(triton.runtime.driver.active)


@cache
def _target_of(driver: Hashable) -> tuple[str, str]:
    target = cast("Any", driver).get_current_target()
    return target.backend, f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


@cache
def _count_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
