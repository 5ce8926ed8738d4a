"""Products of few tokens by sm_90's kernel, run as it stands on CPU tensors, are those of the reference."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atom_cluster.ops.quantized import dequantize
from atom_cluster.ops.torch_ref.quantized import round_inputs
from atom_cluster.ops.triton import gemv_hopper as module
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.gemv_hopper import GemvBlocks, Norm, Rounding, gemv_hopper, num_parts
from atom_cluster.quantization.quantize import QUANTIZERS
from tests.ops.triton.gluon_on_cpu import Layout, Machine, Pointer, Shared

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="tensors of the CPU need the interpreter")

_FUNCTIONS = ("_gemv_hopper_kernel", "_output", "_of_columns", "_scale_of")


class Places(Pointer):
    """A tensor of pointers."""

    def __add__(self, other: Any) -> Places:
        return Places(self.tensor, self.offset + other)

    def __getitem__(self, index: Any) -> Places:
        return Places(self.tensor, self.offset[index])


class GemvMachine(Machine):
    """Copies arrive when they are waited for, by groups."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self._groups: list[list[tuple[Shared, Pointer, torch.Tensor | None]]] = []
        self._num_warps = 0

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernel = module._gemv_hopper_kernel.fn
        self.install(monkeypatch, module, list(_FUNCTIONS), launched="_gemv_hopper_kernel")
        monkeypatch.setattr(module, "_gemv_hopper_kernel", _Launcher(lambda grid: self._start(kernel, grid)))
        language = module.gl
        language.num_warps = lambda: self._num_warps
        language.tuple = tuple
        language.exp = torch.exp
        language.div_rn = torch.div
        language.rsqrt = torch.rsqrt
        language.AutoLayout = Layout
        copies = SimpleNamespace(
            async_copy_global_to_shared=self._copy, commit_group=self._commit, wait_group=self._wait_for_groups
        )
        monkeypatch.setattr(module, "async_copy", copies)
        monkeypatch.setattr(module, "range", _tensors, raising=False)

    def _start(self, kernel: Callable[..., None], grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, num_warps: int, launch_pdl: bool, **options: object) -> None:
            assert launch_pdl
            self._num_warps, self._grid = num_warps, (*grid, 1, 1)
            pointers = [Places(x, torch.tensor(0)) if isinstance(x, torch.Tensor) else x for x in args]
            for place in range(grid[0]):
                self._program = (place, 0, 0)
                self._enter()
                kernel(*pointers, **options)
                assert not any(self._groups) and not self._own.copies, "copies that nobody waits for"
                self._groups = []
            self.num_launches += 1

        return launch

    def _commit(self) -> None:
        self._groups.append(self._own.copies)
        self._own.copies = []

    def _wait_for_groups(self, num_outstanding: int) -> None:
        while len(self._groups) > num_outstanding:
            for target, pointer, mask in self._groups.pop(0):
                target.data.copy_(self._load(pointer, mask))


class _Launcher:
    def __init__(self, start: Callable[[tuple[int, ...]], Callable[..., None]]) -> None:
        self._start = start

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._start(grid)


def _tensors(*bounds: int) -> Iterator[torch.Tensor]:
    return (torch.tensor(index) for index in range(*bounds))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> GemvMachine:
    found = GemvMachine()
    found.prepare(monkeypatch)
    return found


@pytest.mark.parametrize("kind", ["plain", "fp8", "fp8_block"])
@pytest.mark.parametrize("seed", range(5))
def test_products_are_right(machine: GemvMachine, kind: str, seed: int) -> None:
    generator = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    num_tokens, num_in = generator.randint(1, 8), generator.choice([256, 384, 512, 1536, 2048])
    num_out = generator.choice([16, 34, 130])
    gates, has_bias, has_norm = (generator.random() < 0.5 for _ in range(3))
    inputs = 128 if kind == "fp8_block" else generator.choice([64, 128])
    blocks = GemvBlocks(inputs=inputs, num_warps=4, num_stages=generator.choice([2, 3, 4]))
    plain, bias = torch.randn(num_out, num_in) * 0.1, torch.randn(num_out) if has_bias else None
    x = torch.randn(num_tokens, num_in + 16)[:, :num_in]
    x[0] *= 30
    norm, seen = None, x
    if has_norm:
        residual, weight = torch.randn(num_tokens, num_in + 16)[:, :num_in], torch.randn(num_in)
        total = torch.full((num_tokens, num_in + 16), torch.nan)[:, :num_in]
        norm = Norm(residual_TI=residual, weight_I=weight, eps=1e-5, sum_TI=total)
        seen = torch.nn.functional.rms_norm(x + residual, (num_in,), weight, 1e-5)
    codes, rounding, expected = plain, None, seen @ plain.T
    if kind != "plain":
        quantized = QUANTIZERS[kind](plain)
        codes = quantized.codes
        expected = round_inputs(seen, quantized) @ dequantize(quantized, torch.float32).T
        rounding = Rounding(of_outputs=quantized.scale, block=quantized.block, limit=448.0, max_abs=torch.inf)
    expected = expected if bias is None else expected + bias
    if gates:
        gate, up = expected.chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
    out = torch.full_like(expected, torch.nan)
    gemv_hopper(x, codes, bias, out, blocks, rounding, norm=norm, gates=gates)
    assert norm is None or torch.equal(norm.sum_TI, x + norm.residual_TI)
    assert float((out - expected).norm() / expected.norm()) < (1e-5 if kind == "plain" else 2e-2)


def test_inputs_are_cut_into_as_many_parts_as_whole_steps_allow() -> None:
    assert [num_parts(num_tokens, 4096, 128) for num_tokens in (1, 2, 3, 4, 5, 8)] == [8, 4, 2, 2, 1, 1]
    assert num_parts(1, 1536, 128) == 4 and num_parts(1, 2304, 128) == 2 and num_parts(1, 1152, 128) == 1
    assert num_parts(1, 1000, 128) == 0
