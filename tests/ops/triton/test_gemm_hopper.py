"""Products of some tokens by sm_90's kernel, run as it stands by threads on the CPU, are the reference's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atom_cluster.ops.triton import gemm_hopper as module
from atom_cluster.ops.triton import gemm_hopper_sums, runtime
from atom_cluster.ops.triton.gemm import Scales
from atom_cluster.ops.triton.gemm_hopper import gemm_hopper
from atom_cluster.ops.triton.gemm_hopper_cut import HopperBlocks
from atom_cluster.ops.triton.linear import new_counters
from tests.ops.triton.gluon_on_cpu import Machine, Pointer, Shared

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="tensors of the CPU need the interpreter")

STEP = 32
"""Inputs in a line, of four bytes each."""
_FUNCTIONS = ["_gemm_hopper_kernel", "_first_output", "_load", "_multiply"]
_OF_SUMS = ["leave", "added_up", "finished", "gated", "write_together"]


class Boxes:
    """A descriptor whose boxes may reach beyond the tensor."""

    def __init__(self, x: torch.Tensor, shape: list[int], strides: list[int], block: list[int], layout: object) -> None:
        self.lines = x.as_strided(shape, strides)
        self.block_type = SimpleNamespace(shape=block, nbytes=block[0] * block[1] * x.element_size())
        self.dtype = x.dtype
        self.layout = layout

    def box(self, corner: list[Any], shape: tuple[int, int]) -> tuple[torch.Tensor, slice, slice]:
        """What is inside of the tensor, and where that is in the box."""
        row, column = map(int, corner)
        assert row >= 0 and column >= 0
        found = self.lines[row : row + shape[0], column : column + shape[1]]
        return found, slice(0, found.shape[0]), slice(0, found.shape[1])


class Reused(Shared):
    """Memory that results take the place of."""

    def index(self, index: Any) -> Reused:
        return Reused(self.data[int(index)], self.layout)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: object) -> Shared:
        self.data.fill_(torch.nan)
        return Shared(torch.full(shape, torch.nan, dtype=dtype), layout)


class GemmMachine(Machine):
    """Runs all programs at once, as they wait for each other."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self._counting = threading.Lock()

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernel: Callable[..., None] = module._gemm_hopper_kernel.fn
        self.install(monkeypatch, module, _FUNCTIONS, "_gemm_hopper_kernel")

        def start(grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: object, num_warps: int, maxnreg: int, launch_pdl: bool, **options: Any) -> None:
                pointers = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in args]

                def run(index: int) -> None:
                    self._own.index = index
                    self._enter()
                    try:
                        kernel(*pointers, **options)
                    except BaseException as exc:  # noqa: BLE001 - raised where the kernel was started
                        self._failed.append(exc)

                threads = [threading.Thread(target=run, args=(index,)) for index in range(grid[0])]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                if self._failed:
                    raise self._failed[0]
                self.num_launches += 1

            return launch

        launcher = type("Kernel", (), {"__getitem__": lambda _, grid: start(grid)})()
        monkeypatch.setattr(module, "_gemm_hopper_kernel", launcher)
        for name in _OF_SUMS:
            function = getattr(gemm_hopper_sums, name).fn
            monkeypatch.setattr(gemm_hopper_sums, name, function)
            monkeypatch.setattr(module, name, function, raising=False)
        monkeypatch.setattr(gemm_hopper_sums, "gl", self._language())
        monkeypatch.setattr(module, "TensorDescriptor", Boxes)
        bulk = SimpleNamespace(
            async_copy_global_to_shared=self._fill,
            async_copy_shared_to_global=self._write,
            store_wait=lambda pendings: None,
        )
        monkeypatch.setattr(module, "tma", bulk)

    def _language(self) -> SimpleNamespace:
        language = super()._language()
        allocate = language.allocate_shared_memory

        def allocate_reused(dtype: torch.dtype, shape: list[int], layout: object) -> Any:
            found = allocate(dtype, shape, layout)
            return Reused(found.data, layout) if isinstance(found, Shared) else found

        language.allocate_shared_memory = allocate_reused
        language.program_id = lambda axis: torch.tensor(self._own.index, dtype=torch.int32)
        language.tuple = tuple
        language.exp = torch.exp
        language.expand_dims = torch.unsqueeze
        language.permute = torch.permute
        language.atomic_add = self._add
        language.load = lambda pointer, mask=None, other=0, cache_modifier="": self._load(pointer, mask, other)
        return language

    def _specialize(self, parts: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
        index = self._own.index

        def within(function: Callable[..., None]) -> Callable[..., None]:
            def run(*args: Any) -> None:
                self._own.index = index
                function(*args)

            return run

        super()._specialize([(within(function), args) for function, args in parts])

    def _wait_for_products(self, num_outstanding: int, deps: list[Any]) -> Any:
        """Those that go on meanwhile are added to."""
        while len(self._own.products) > num_outstanding:
            self._own.products.pop(0).finish()
        found = [x if isinstance(x, torch.Tensor) or x.value is None else x.value for x in deps]
        return found[0] if len(found) == 1 else tuple(found)

    def _add(self, pointer: Pointer, x: int, sem: str) -> torch.Tensor:
        assert sem in ("acquire", "acq_rel")
        assert not self._failed, "another partition failed"
        with self._counting:
            before = self._load(pointer)
            self._store(pointer, before + x)
        return before

    def _fill(self, boxes: Boxes, corner: list[Any], barrier: Any, target: Shared) -> None:
        target.data.fill_(torch.nan)

        def arrive() -> None:
            self._dawdle()
            found, rows, columns = boxes.box(corner, target.shape)
            filled = torch.zeros_like(target.data)
            filled[rows, columns] = found
            target.data.copy_(filled)
            barrier.advance(num_bytes=-target.data.numel() * target.data.element_size())

        threading.Thread(target=arrive).start()

    def _write(self, boxes: Boxes, corner: list[Any], source: Shared) -> None:
        found, rows, columns = boxes.box(corner, source.shape)
        found.copy_(source.data[rows, columns])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> GemmMachine:
    found = GemmMachine()
    found.prepare(monkeypatch)
    return found


def scales_of(
    kind: str, num_tokens: int, num_out: int, num_in: int
) -> tuple[Scales | None, torch.Tensor, torch.Tensor]:
    """And what inputs and weights are multiplied by, element by element."""
    if kind == "plain":
        return None, torch.ones(num_tokens, num_in), torch.ones(num_out, num_in)
    if kind == "channels":
        of_tokens, of_outputs = torch.rand(num_tokens, 1), torch.rand(num_out, 1)
        scales = Scales(of_tokens_TG=of_tokens, of_outputs=of_outputs, group_in=num_in, block=(1, num_in))
        return scales, of_tokens.expand(-1, num_in), of_outputs.expand(-1, num_in)
    groups = num_in // STEP
    of_tokens = torch.rand(groups, -(-num_tokens // 4) * 4).T[:num_tokens]
    of_outputs = torch.rand(-(-num_out // 128), groups)
    scales = Scales(of_tokens_TG=of_tokens, of_outputs=of_outputs, group_in=STEP, block=(128, STEP))
    spread = of_outputs.repeat_interleave(128, 0)[:num_out].repeat_interleave(STEP, 1)
    return scales, of_tokens.repeat_interleave(STEP, 1), spread


@pytest.mark.parametrize("kind", ["plain", "channels", "blocks"])
@pytest.mark.parametrize(
    ("num_tokens", "num_out", "groups", "pieces", "splits", "gates"),
    [(5, 80, 1, 1, 1, False), (19, 240, 2, 2, 3, False), (37, 400, 3, 2, 1, False), (18, 256, 1, 2, 2, True)],
    ids=["piece", "split", "wide", "gates"],
)
def test_products(
    machine: GemmMachine, kind: str, num_tokens: int, num_out: int, groups: int, pieces: int, splits: int, gates: bool
) -> None:
    torch.manual_seed(0)
    num_in = 8 * STEP if kind == "blocks" else 8 * STEP - 12
    x, weight, bias = torch.randn(num_tokens, num_in), torch.randn(num_out, num_in), torch.randn(num_out)
    scales, of_x, of_weight = scales_of(kind, num_tokens, num_out, num_in)
    expected = (x * of_x) @ (weight * of_weight).T + bias
    if gates:
        gate, up = expected.chunk(2, 1)
        expected = torch.nn.functional.silu(gate) * up
    # The last before numbers are negative, as they are after some time.
    rounds = new_counters(num_out, x.device) + (2**31 - 64)
    tokens = 16 if num_tokens < 20 and kind != "blocks" else 32
    blocks = HopperBlocks(
        groups=groups, pieces=pieces, tokens=tokens, splits=splits, num_stages=3, lines=min(groups, 2)
    )
    for _ in range(2):
        out = torch.full_like(expected, torch.nan)
        gemm_hopper(x, weight, bias, out, rounds, blocks, scales, gates=gates)
        torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-4)
        assert not (rounds % 64).any()
    assert machine.num_launches == 2
