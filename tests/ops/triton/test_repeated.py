"""From the second launch on a compiled kernel is launched as it is, but only for what it was compiled for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atom_cluster.ops.triton.repeated import RepeatedKernel


class Kernel:
    """Stands for a kernel, or for one that was compiled: notes what it is launched with."""

    def __init__(self, compiled: Kernel | None = None) -> None:
        self.compiled = compiled
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **named: Any) -> Kernel | None:
            self.launches.append((grid, *arguments, named))
            return self.compiled

        return launch


@pytest.fixture
def compiled() -> Kernel:
    return Kernel()


@pytest.fixture
def kernel(compiled: Kernel) -> Kernel:
    return Kernel(compiled)


def test_layers_that_are_alike_have_the_compiled_kernel_launched(kernel: Kernel, compiled: Kernel) -> None:
    repeated = RepeatedKernel(kernel)
    first, second = torch.zeros(64), torch.zeros(64)
    for layer, x in enumerate((first, second)):
        repeated.launch(3 + layer, (x,), (0.5, 16), {"D": 8, "GROUP": 2}, {"num_warps": 4})
    assert kernel.launches == [((3,), first, 0.5, 16, {"D": 8, "GROUP": 2, "num_warps": 4})]
    assert len(compiled.launches) == 1
    grid, x, *rest = compiled.launches[0]
    assert grid == (4, 1, 1) and x is second and rest == [0.5, 16, 8, 2, {}]


@pytest.mark.parametrize("other", ["dtype", "alignment", "number", "constant"])
def test_what_a_kernel_may_be_compiled_for_is_compared(kernel: Kernel, compiled: Kernel, other: str) -> None:
    repeated = RepeatedKernel(kernel)
    x = torch.zeros(64)
    repeated.launch(1, (x,), (16,), {"D": 8}, {})
    repeated.launch(
        1,
        ({"dtype": x.half(), "alignment": x[1:]}.get(other, x),),
        (1 if other == "number" else 16,),
        {"D": 16 if other == "constant" else 8},
        {},
    )
    assert len(kernel.launches) == 2 and not compiled.launches


def test_an_interpreted_kernel_is_launched_the_usual_way_each_time() -> None:
    kernel = Kernel()
    repeated = RepeatedKernel(kernel)
    for _ in range(2):
        repeated.launch(1, (torch.zeros(4),), (), {}, {})
    assert len(kernel.launches) == 2
