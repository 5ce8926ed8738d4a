"""Compiles every launch of `launches/` for chips that need not be there: python -m tests.ops.triton.compile_kernels

Runs in a process of its own, without the interpreter. Prints one line of JSON per launch and chip:
{"launch": ..., "chip": ..., "num_kernels": ..., "error": null or a traceback}.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tests.ops.triton import launches

CHIPS = {
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "sm_90": GPUTarget("cuda", 90, 32),
}


class AbsentDriver:
    """Stands in for a chip's driver as far as compiling needs one."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Kernels remember by device what they were compiled for: each chip has to be a device of its own.
        return [str(target.arch) for target in CHIPS.values()].index(str(self._target.arch))

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    class launcher_cls:  # noqa: N801 - a name that Triton asks for
        def __init__(self, *args: object) -> None:
            pass


def all_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for module in pkgutil.iter_modules(launches.__path__):
        found = importlib.import_module(f"{launches.__name__}.{module.name}").LAUNCHES
        yield from ((f"{module.name}/{name}", launch) for name, launch in found.items())


def compile_launch(launch: Callable[[], object], target: GPUTarget) -> int:
    """Kernels that were compiled for it."""
    triton.runtime.driver.set_active(AbsentDriver(target))
    compiled = 0
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> object:
        nonlocal compiled
        compiled += 1
        return run(self, *args, grid=(1,) if callable(grid) else grid, warmup=True, **options)

    JITFunction.run = compile_only
    try:
        with torch.inference_mode():
            launch()
    finally:
        JITFunction.run = run
    return compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--only", default="", help="launches whose name has this in it")
    parser.add_argument("--asked", action="store_true", help="those that standard input names, as [launch, chip] each")
    args = parser.parse_args()
    found = dict(all_launches())
    chosen: Iterator[tuple[str, str]] = ((name, chip) for name in found if args.only in name for chip in args.chips)
    for name, chip in map(json.loads, sys.stdin) if args.asked else chosen:
        num_kernels, error = 0, None
        try:
            num_kernels = compile_launch(found[name], CHIPS[chip])
        except Exception:  # noqa: BLE001 - reported
            error = traceback.format_exc()
        print(json.dumps({"launch": name, "chip": chip, "num_kernels": num_kernels, "error": error}), flush=True)


if __name__ == "__main__":
    main()
