"""Triton's kernels compiled side by side, before launches need them. Knows no kernels.

Triton compiles in the thread that launches. For most of that time it does not hold the interpreter's lock, so threads
do it side by side.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import triton
from triton.runtime import jit
from triton.runtime.jit import JITFunction

from atom_cluster.ops.compile_ahead import CompiledAhead
from atom_cluster.ops.triton.runtime import INTERPRETED

_ZEROS = (
    (torch, "empty", torch.zeros),
    (torch, "empty_like", torch.zeros_like),
    (torch.Tensor, "new_empty", torch.Tensor.new_zeros),
)


def can_compile_ahead() -> bool:
    """Whether kernels are compiled, and by a version of Triton that can do it in threads (3.6 or later)."""
    mode = getattr(triton, "AsyncCompileMode", None)
    has_mode = mode is not None and "ignore_errors" in inspect.signature(mode).parameters
    return has_mode and hasattr(jit, "compute_cache_key") and not INTERPRETED


@contextmanager
def compiling_ahead(device: torch.device, *, num_threads: int, begin_at: float = 0.0) -> Iterator[CompiledAhead]:
    """See `ops.compile_ahead.CompileAhead`. Launches by other threads are as ever."""
    ahead = CompiledAhead()
    run, listener = JITFunction.run, triton.knobs.compilation.listener
    seen, queue, lock = set(), _Queue(device), threading.Lock()

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        variant = id(kernel), variant_of(kernel, *args, **options)[0]
        if variant not in seen:
            seen.add(variant)
            run(kernel, *args, grid=grid, warmup=True, **options)

    def note(*, cache_hit: bool, **_: Any) -> None:
        with lock:
            ahead.num_compiled += not cache_hit

    triton.knobs.compilation.listener = note
    try:
        with triton.AsyncCompileMode(queue, ignore_errors=True):
            try:
                with _replaced(JITFunction, "run", compile_only), zeroed_memory():
                    yield ahead
                queue.run(num_threads, begin_at)
            finally:
                queue.drop()
    finally:
        triton.knobs.compilation.listener = listener
        ahead.num_kernels = len(seen)


def variant_of(kernel: JITFunction, *args: Any, **options: Any) -> tuple[str, dict[str, Any], list[Any]]:
    """What Triton looks up when these arguments are launched; the arguments by name, and what it specializes on.

    These are its own ways (3.6 to 3.9), which nothing else gives access to.
    """
    options |= {
        "debug": options.get("debug", kernel.debug) or triton.knobs.runtime.debug,
        "instrumentation_mode": triton.knobs.compilation.instrumentation_mode,
    }
    _, keys, _, _, bind = kernel.device_caches[triton.runtime.driver.active.get_current_device()]
    bound, specialization, found = bind(*args, **options)
    return jit.compute_cache_key(keys, specialization, found), bound, specialization


class _Queue(Executor):
    """What is to be compiled, which begins when all of it is known: threads that compile would slow the launches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._entries: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, compile_kernel: Callable[[], Any], /, *_: Any, **__: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._entries.append((future, compile_kernel))
        return future

    def run(self, num_threads: int, begin_at: float) -> None:
        """Returns when all is compiled and loaded."""
        middle = int(begin_at * len(self._entries))
        with ThreadPoolExecutor(num_threads, thread_name_prefix="compile") as threads:
            for future, compile_kernel in self._entries[middle:] + self._entries[:middle]:
                threads.submit(self._compile_and_load, future, compile_kernel)

    def drop(self) -> None:
        """Nobody is to wait for what was not run, as something else failed."""
        for future, _ in self._entries:
            if not future.done():
                future.set_exception(RuntimeError("not compiled"))

    def _compile_and_load(self, future: Future[Any], compile_kernel: Callable[[], Any]) -> None:
        try:
            kernel = compile_kernel()
            if self._device.type != "cpu":
                torch.cuda.set_device(self._device)
                kernel.run  # noqa: B018 - what launches it is built, and it is loaded, when that is first asked for
        except Exception as exc:  # noqa: BLE001 - whoever launches it gets the same
            future.set_exception(exc)
        else:
            future.set_result(kernel)


@contextmanager
def zeroed_memory() -> Iterator[None]:
    """Within, memory that this thread does not want to be initialized is: what kernels do not write may be indices that
    torch reads."""
    with ExitStack() as stack:
        for owner, name, instead in _ZEROS:
            stack.enter_context(_replaced(owner, name, instead))
        yield


@contextmanager
def _replaced(owner: object, name: str, instead: Callable[..., object]) -> Iterator[None]:
    """Within, this thread gets something else under a name. No mode of torch's: those slow all that it does."""
    usual, thread = getattr(owner, name), threading.get_ident()

    def chosen(*args: Any, **kwargs: Any) -> object:
        return (instead if threading.get_ident() == thread else usual)(*args, **kwargs)

    setattr(owner, name, chosen)
    try:
        yield
    finally:
        setattr(owner, name, usual)
