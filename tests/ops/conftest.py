"""What makes Triton's interpreter fast enough for tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from atom_cluster.ops.triton.runtime import INTERPRETED


@pytest.fixture(scope="package", autouse=True)
def language_prepared_once_a_launch() -> Iterator[None]:
    """`triton.language` is made fit for the interpreter once a launch for each module whose functions a kernel calls.

    The interpreter does it at every call, which was a third to a half of the time that interpreted kernels took.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    launch, call = interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__
    prepared: set[str] | None = None
    """Modules, during a launch."""

    def launch_once_prepared(executor: object, *args: object, **kwargs: object) -> object:
        nonlocal prepared
        prepared = set()
        try:
            return launch(executor, *args, **kwargs)
        finally:
            prepared = None

    def call_once_prepared(function: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        module = function.fn.__module__
        if prepared is None or module not in prepared:
            result = call(function, *args, **kwargs)
            if prepared is not None:
                prepared.add(module)
            return result
        return function.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch_once_prepared)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call_once_prepared)
        yield
