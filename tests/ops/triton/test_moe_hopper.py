"""Experts in float8 blocks by sm_90's kernel, run as it stands by threads on the CPU, are the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atom_cluster.ops.moe import ExpertActivation
from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight
from atom_cluster.ops.triton import moe_config, moe_store_hopper, prepare_quantized_experts, runtime
from atom_cluster.ops.triton import moe_gemm_hopper as module
from tests.ops.triton.gluon_on_cpu import Barrier, Descriptor, Layout, Machine, Pointer, Shared
from tests.ops.triton.moe_cases import Case, error

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="tensors of the CPU need the interpreter")

_FUNCTIONS = ("multiply_kernel", "_tile", "_place", "_load", "_multiply", "_pairs", "store_rows", "store_activated")
OAI = ExpertActivation(kind="swiglu_oai", limit=0.7)


class ExpertMachine(Machine):
    """Knows what the kernel asks for besides."""

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in _FUNCTIONS:
            monkeypatch.setattr(module, name, getattr(module, name).fn)
        kernel, language = module.multiply_kernel, self._language()
        monkeypatch.setattr(module, "multiply_kernel", _Launcher(lambda grid: self._start(kernel, grid)))
        language.float8e4nv = torch.float8_e4m3fn
        language.bfloat16 = torch.bfloat16
        allocate = language.allocate_shared_memory
        language.allocate_shared_memory = torch.inference_mode(False)(allocate)
        specialize = language.warp_specialize
        # Threads that inherit the mode may write what was made in it.
        language.warp_specialize = lambda parts, *rest: specialize(
            [(torch.inference_mode()(function), args) for function, args in parts], *rest
        )
        language.abs, language.exp, language.div_rn = torch.abs, torch.exp, torch.div
        barriers = SimpleNamespace(
            MBarrierLayout=Layout,
            init=lambda barrier, count: barrier.init(count),
            arrive=self._arrive,
            expect=_expect,
            wait=lambda barrier, parity, pred=True: self._wait(barrier, parity) if pred else None,
        )
        copies = SimpleNamespace(
            async_copy_global_to_shared=self._copy, mbarrier_arrive=self._arrive_with_copies, wait_group=lambda _: None
        )
        replaced = {
            "gl": language,
            "mbarrier": barriers,
            "async_copy": copies,
            "tma": SimpleNamespace(async_copy_global_to_shared=self._copy_if),
            "fence_async_shared": self._dawdle,
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._wait_for_products,
            "gdc_wait": lambda: None,
            "gdc_launch_dependents": lambda: None,
            "range": _tensors,
            "GL_TYPES": {torch.float32: torch.float32},
            "_blocks_of": lambda matrix: Descriptor(matrix.codes.view(-1, matrix.num_in), module.BLOCK),
        }
        monkeypatch.setattr(moe_store_hopper, "gl", language)
        for name, value in replaced.items():
            monkeypatch.setattr(module, name, value, raising=False)

    def _start(self, kernel: Callable[..., None], grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, num_warps: int, launch_pdl: bool, **options: object) -> None:
            assert launch_pdl
            self._grid = (*grid, 1, 1)[:3]
            pointers = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
            for place in range(grid[0]):
                self._program = (place, 0, 0)
                self._enter()
                kernel(*pointers, **options)
            self.num_launches += 1

        return launch

    def _copy_if(
        self, descriptor: Descriptor, corner: list[Any], barrier: Barrier, target: Shared, pred: object = True
    ) -> None:
        if pred:
            self._copy_box(descriptor, corner, barrier, target)

    def _wait_for_products(self, num_outstanding: int, deps: list[Any]) -> torch.Tensor:
        if isinstance(deps[0], torch.Tensor):
            assert len(self._own.products) <= num_outstanding
            return deps[0]
        return super()._wait_for_products(num_outstanding, deps)


class _Launcher:
    def __init__(self, start: Callable[[tuple[int, ...]], Callable[..., None]]) -> None:
        self._start = start

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._start(grid)


def _expect(barrier: Barrier, num_bytes: int, pred: object = True) -> None:
    if pred:
        barrier.advance(arrivals=1, num_bytes=num_bytes)


def _tensors(*bounds: int) -> Iterator[torch.Tensor]:
    return (torch.tensor(index) for index in range(*bounds))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ExpertMachine:
    found = ExpertMachine(seed=3)
    found.prepare(monkeypatch)
    monkeypatch.setattr(moe_config, "is_for_hopper", lambda _: True)
    return found


CASES = {
    "few": Case(num_experts=3, size=256, expert_size=256, num_tokens=6, num_chosen=2, has_addend=True),
    "tiles": Case(num_experts=3, size=384, expert_size=256, num_tokens=150, num_chosen=2),
    "many": Case(num_experts=3, size=256, expert_size=384, num_tokens=400, num_chosen=2),
    "limited": Case(num_experts=2, size=256, expert_size=256, num_tokens=70, num_chosen=2, activation=OAI),
}


@pytest.mark.parametrize(
    ("case", "num_programs"), [("few", 3), ("tiles", 3), ("limited", 2), ("many", 1)], ids=lambda value: str(value)
)
def test_experts(machine: ExpertMachine, monkeypatch: pytest.MonkeyPatch, case: str, num_programs: int) -> None:
    chip = SimpleNamespace(is_hopper=lambda: True, num_multiprocessors=lambda _: num_programs)
    monkeypatch.setattr(module, "runtime", chip)
    monkeypatch.setattr(module, "_FEWEST_PAIRS_OF_MANY", 500)
    assert error(CASES[case], "float8 blocks", dtype=torch.float32) < 1e-3
    assert machine.num_launches == 2


@pytest.mark.parametrize("num_here", [0, 1])
def test_experts_elsewhere(machine: ExpertMachine, monkeypatch: pytest.MonkeyPatch, num_here: int) -> None:
    """What no expert of this rank computes adds nothing, though nothing is written of it on the way."""
    chip = SimpleNamespace(is_hopper=lambda: True, num_multiprocessors=lambda _: 2)
    monkeypatch.setattr(module, "runtime", chip)
    num_experts, new_empty = 2, torch.Tensor.new_empty

    def poisoned(x: torch.Tensor, *sizes: Any, **options: Any) -> torch.Tensor:
        found = new_empty(x, *sizes, **options)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    first, second = (
        QuantizedWeight(
            number="float8",
            codes=torch.randn(num_experts, num_out, 256).to(torch.float8_e4m3fn),
            scale=torch.ones(num_experts, num_out // 128, 2),
            block=(128, 128),
            inputs=InputQuantization(number="float8", group_size=128),
        )
        for num_out in (512, 256)
    )
    experts = prepare_quantized_experts(
        first, second, gate_up_bias=None, down_bias=None, activation=ExpertActivation(), dtype=torch.float32
    )
    chosen = torch.full((9, 2), num_experts)
    chosen[:num_here, 1] = 1
    with torch.inference_mode():
        y = experts(torch.randn(9, 256), chosen, torch.rand(9, 2))
    assert machine.num_launches == 2
    assert bool(y.isfinite().all())
    assert y.any(dim=1).tolist() == [token < num_here for token in range(9)]
