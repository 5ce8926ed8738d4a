"""Kernels compiled ahead for a chip that is not there: python -m tests.ops.triton.compile_ahead_of_nothing

Runs in a process of its own, without the interpreter. Prints what was found as a line of JSON.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from atom_cluster.ops.triton.compile_ahead import compiling_ahead
from tests.ops.triton.compile_kernels import CHIPS, AbsentDriver


@triton.jit
def _add(x_ptr, value, size: tl.constexpr):
    offsets = tl.arange(0, size)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) + value)


@triton.jit
def _negate(x_ptr, size: tl.constexpr):
    offsets = tl.arange(0, size)
    tl.store(x_ptr + offsets, -tl.load(x_ptr + offsets))


@triton.jit
def _impossible(x_ptr, size: tl.constexpr):
    tl.static_assert(size < 0, "sizes are never negative")


def main() -> None:
    triton.runtime.driver.set_active(AbsentDriver(CHIPS["sm_90"]))
    launched: list[str] = []
    compiled: list[str] = []
    run = JITFunction.run

    def note_launch(kernel: JITFunction, *args: Any, warmup: bool, **options: Any) -> object:
        """No launch can do more than compile here."""
        if not warmup:
            launched.append(kernel.fn.__name__)
        return run(kernel, *args, warmup=True, **options)

    def note_compiled(*, src: Any, **_: Any) -> None:
        compiled.append(src.name)

    JITFunction.run = note_launch
    triton.knobs.compilation.listener = note_compiled
    x = torch.full((64,), 5.0)
    with ThreadPoolExecutor(1) as other_thread, compiling_ahead(torch.device("cpu"), num_threads=2) as ahead:
        for _ in range(3):
            _add[1,](x, 3, size=64)
            _add[1,](x, 3, size=32)
            _negate[1,](x, size=64)
            _impossible[1,](x, size=64)
        launched_here = list(launched)
        other_thread.submit(lambda: _negate[1,](x, size=16)).result()
        empties = [torch.empty(1000), torch.empty_like(x), x.new_empty(1000)]
    _add[1,](x, 3, size=64)
    _negate[1,](x, size=64)
    try:
        _impossible[1,](x, size=64)
        error = ""
    except triton.CompilationError as exc:
        error = str(exc)
    compiled_later = list(compiled)
    raised = ""
    try:
        with compiling_ahead(torch.device("cpu"), num_threads=2):
            _negate[1,](x, size=256)
            raise ArithmeticError("of the body")
    except ArithmeticError as exc:
        raised = str(exc)
    _negate[1,](x, size=128)
    found = {
        "num_kernels": ahead.num_kernels,
        "num_compiled": ahead.num_compiled,
        "launched_here": launched_here,
        "launched": launched,
        "x": x.unique().tolist(),
        "empties": torch.cat(empties).unique().tolist(),
        "compiled_later": compiled_later,
        "watched_again": compiled[len(compiled_later) :],
        "error": error,
        "raised": raised,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
