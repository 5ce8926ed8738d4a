"""Runs kernels written in Gluon, as they stand, on CPU tensors: what Triton's interpreter does not do.

Partitions are threads, barriers are counted. Copies and products are carried out as late as the kernel lets them, and
what a copy will fill in holds NaN until then, so that an operand that is read too early or replaced too soon is found;
a wait that never ends fails. Layouts, and what a compiler makes of them, are not looked at. Knows no kernels.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

DEADLOCK_SECONDS = 20.0
THREADS_PER_PARTITION = 128
"""Of the partitions that copy, whose threads each arrive."""


@dataclass
class Pointer:
    tensor: torch.Tensor
    offset: Any = 0

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.tensor.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + other)

    def places(self, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(all of the memory, places in it, which of them are meant)"""
        memory = self.tensor.as_strided(
            (self.tensor.untyped_storage().nbytes() // self.tensor.element_size(),), (1,), 0
        )
        place = torch.as_tensor(self.offset).long() + self.tensor.storage_offset()
        place, mask = torch.broadcast_tensors(place, torch.tensor(True) if mask is None else mask)
        meant = place[mask]
        assert not len(meant) or (meant.min() >= 0 and meant.max() < len(memory)), "outside of the memory"
        return memory, place, mask


@dataclass
class Shared:
    data: torch.Tensor
    layout: object = None

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, index: Any) -> Shared:
        return Shared(self.data[int(index)], self.layout)

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.data.narrow(dim, start, length), self.layout)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: object) -> Boxes:
        """Of places, one after the other, their panels of columns, of each the boxes of rows."""
        assert dtype == self.dtype and shape[0] * shape[1] * shape[2] == self.data.numel()
        return Boxes(self.data, (shape[1], shape[2]))

    def store(self, x: torch.Tensor) -> None:
        self.data.copy_(x)

    def load(self, layout: object = None) -> torch.Tensor:
        return self.data.clone()


@dataclass
class Boxes:
    """Places of shared memory as the boxes that they consist of."""

    data: torch.Tensor
    box: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.data.numel() // (self.box[0] * self.box[1]), *self.box)

    def index(self, index: Any) -> Shared:
        (rows, columns), (_, num_rows, num_columns) = self.box, self.data.shape
        panel, row = divmod(int(index), num_rows // rows)
        place, panel = divmod(panel, num_columns // columns)
        return Shared(self.data[place].narrow(0, row * rows, rows).narrow(1, panel * columns, columns))


@dataclass
class Barrier:
    changed: threading.Condition = field(default_factory=threading.Condition)
    count: int = 0
    pending: int = 0
    expected_bytes: int = 0
    phase: int = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def advance(self, *, arrivals: int = 0, num_bytes: int = 0) -> None:
        with self.changed:
            self.pending -= arrivals
            self.expected_bytes += num_bytes
            assert self.pending >= 0, "more have arrived than are waited for"
            if self.pending == 0 and self.expected_bytes == 0:
                self.phase, self.pending = self.phase + 1, self.count
                self.changed.notify_all()


@dataclass
class Product:
    """One that has been issued."""

    compute: Callable[[torch.Tensor], torch.Tensor]
    accumulator: Any
    value: torch.Tensor | None = None

    def finish(self) -> torch.Tensor:
        if self.value is None:
            before = self.accumulator.finish() if isinstance(self.accumulator, Product) else self.accumulator
            self.value = self.compute(before)
        return self.value


@dataclass
class Descriptor:
    """Of [C, D] or [C, heads, D], whose heads are a stride apart in one line."""

    tensor: torch.Tensor
    num_rows: int
    layout: object = None
    num_columns: int | None = None
    """Of a box; None: a head."""

    @property
    def block_type(self) -> SimpleNamespace:
        width = self.num_columns or self.tensor.shape[-1]
        return SimpleNamespace(nbytes=self.num_rows * width * self.tensor.element_size())

    @property
    def lines(self) -> torch.Tensor:
        x = self.tensor
        width = x.shape[-1] + (x.shape[1] - 1) * x.stride(1) if x.ndim == 3 else x.shape[1]
        return x.as_strided((len(x), width), (x.stride(0), 1))


class Layout:
    def __init__(self, *_: object, **__: object) -> None:
        pass

    @staticmethod
    def get_default_for(*_: object) -> Layout:
        return Layout()


class Machine:
    """Runs one program after the other."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._own = threading.local()
        self._program: tuple[int, ...] = ()
        self._grid: tuple[int, ...] = ()
        self._failed: list[BaseException] = []
        self.num_launches = 0

    def install(
        self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, functions: list[str], launched: str = "attend_kernel"
    ) -> None:
        """`functions` are all of the module's that are written in Gluon, `launched` among them is the kernel."""
        for name in functions:
            monkeypatch.setattr(module, name, getattr(module, name).fn)
        kernel = getattr(module, launched)

        def start(grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(
                *args: object, num_warps: int, maxnreg: int = 0, launch_pdl: bool = False, **options: Any
            ) -> None:
                self._grid = (*grid, 1, 1)[:3]
                pointers = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
                for place in torch.cartesian_prod(*(torch.arange(n) for n in self._grid)).view(-1, 3).tolist():
                    self._program = tuple(place)
                    self._enter()
                    kernel(*pointers, **options)
                self.num_launches += 1

            return launch

        monkeypatch.setattr(module, launched, type("Kernel", (), {"__getitem__": lambda _, grid: start(grid)})())
        self.adapt(monkeypatch, module)

    def adapt(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        """What a module's functions call is this machine's, for modules whose functions a kernel calls."""
        monkeypatch.setattr(module, "gl", self._language())
        barriers = SimpleNamespace(
            MBarrierLayout=Layout,
            init=lambda barrier, count: barrier.init(count),
            arrive=self._arrive,
            expect=lambda barrier, num_bytes: barrier.advance(arrivals=1, num_bytes=num_bytes),
            wait=self._wait,
        )
        monkeypatch.setattr(module, "mbarrier", barriers, raising=False)
        monkeypatch.setattr(module, "fence_async_shared", self._dawdle, raising=False)
        monkeypatch.setattr(module, "warpgroup_mma", self._multiply, raising=False)
        monkeypatch.setattr(module, "warpgroup_mma_wait", self._wait_for_products, raising=False)
        for name in ("gdc_wait", "gdc_launch_dependents"):
            monkeypatch.setattr(module, name, lambda: None, raising=False)
        monkeypatch.setattr(module, "mma_v2", _multiply_now, raising=False)
        bulk = SimpleNamespace(async_copy_global_to_shared=self._copy_box)
        monkeypatch.setattr(module, "tma", bulk, raising=False)
        copies = SimpleNamespace(
            async_copy_global_to_shared=self._copy, mbarrier_arrive=self._arrive_with_copies, wait_group=lambda _: None
        )
        monkeypatch.setattr(module, "async_copy", copies, raising=False)

    def _language(self) -> SimpleNamespace:
        def filled(value: float) -> Callable[..., torch.Tensor]:
            return lambda shape, dtype, layout=None: torch.full(shape, value, dtype=dtype)

        def of_both(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def apply(a: Any, b: Any) -> torch.Tensor:
                dtype = (a if isinstance(a, torch.Tensor) else b).dtype
                return function(torch.as_tensor(a, dtype=dtype), torch.as_tensor(b, dtype=dtype))

            return apply

        return SimpleNamespace(
            constexpr=None,
            int32=torch.int32,
            int64=torch.int64,
            float16=torch.float16,
            float32=torch.float32,
            load=self._load,
            store=self._store,
            atomic_add=self._atomic_add,
            program_id=lambda axis: torch.tensor(self._program[axis], dtype=torch.int32),
            num_programs=lambda axis: torch.tensor(self._grid[axis], dtype=torch.int32),
            num_warps=lambda: 4,
            arange=lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
            zeros=filled(0),
            full=lambda shape, value, dtype, layout=None: filled(value)(shape, dtype),
            minimum=of_both(torch.minimum),
            maximum=of_both(torch.maximum),
            where=_where,
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis, dtype=x.dtype),
            abs=torch.abs,
            reshape=lambda x, shape: x.reshape(shape),
            permute=lambda x, order: x.permute(order),
            join=lambda a, b: torch.stack((a, b), -1),
            split=lambda x: x.unbind(-1),
            exp2=torch.exp2,
            log2=torch.log2,
            cdiv=lambda a, b: (a + b - 1) // b,
            convert_layout=lambda x, layout: x,
            thread_barrier=self._dawdle,
            static_range=range,
            allocate_shared_memory=_allocate,
            warp_specialize=self._specialize,
            **dict.fromkeys(
                (
                    "NVMMASharedLayout",
                    "SwizzledSharedLayout",
                    "BlockedLayout",
                    "SliceLayout",
                    "NVMMADistributedLayout",
                    "DotOperandLayout",
                ),
                Layout,
            ),
        )

    def _enter(self) -> None:
        self._own.products, self._own.copies = [], []

    def _dawdle(self) -> None:
        chance = self._random.random()
        if chance < 0.1:
            time.sleep(0.001 if chance < 0.02 else 0)

    def _specialize(self, parts: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
        def run(function: Callable[..., None], args: tuple[Any, ...]) -> None:
            self._enter()
            try:
                function(*_copied(args))
            except BaseException as exc:  # noqa: BLE001 - raised where the kernel was started
                self._failed.append(exc)

        threads = [threading.Thread(target=run, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failed:
            raise self._failed[0]

    def _load(self, pointer: Pointer, mask: torch.Tensor | None = None, other: float = 0, **_: str) -> torch.Tensor:
        self._dawdle()
        memory, place, mask = pointer.places(mask)
        found = torch.full(place.shape, other, dtype=memory.dtype)
        found[mask] = memory[place[mask]]
        return found

    def _atomic_add(self, pointer: Pointer, x: int, sem: str) -> torch.Tensor:
        """Programs run one after the other."""
        before = self._load(pointer)
        self._store(pointer, before + x)
        return before

    def _store(self, pointer: Pointer, x: Any, mask: torch.Tensor | None = None) -> None:
        memory, place, mask = pointer.places(mask)
        memory[place[mask]] = torch.as_tensor(x).expand(place.shape)[mask].to(memory.dtype)

    def _copy(self, target: Shared, pointer: Pointer, mask: torch.Tensor | None = None) -> None:
        target.data.fill_(_poison(target.dtype))
        self._own.copies.append((target, pointer, mask))

    def _arrive_with_copies(self, barrier: Barrier, increment_count: bool = True) -> None:
        assert not increment_count
        self._dawdle()
        for target, pointer, mask in self._own.copies:
            target.data.copy_(self._load(pointer, mask))
        self._own.copies = []
        barrier.advance(arrivals=THREADS_PER_PARTITION)

    def _copy_box(self, descriptor: Descriptor, corner: list[Any], barrier: Barrier, target: Shared) -> None:
        row, column = map(int, corner)
        lines, (num_rows, width) = descriptor.lines, target.shape
        assert row >= 0 and 0 <= column <= lines.shape[1] - width, "outside of the tensor"
        target.data.fill_(float("nan"))

        def fill_in() -> None:
            self._dawdle()
            box = lines[row : row + num_rows, column : column + width]
            target.data[: len(box)] = box
            target.data[len(box) :] = 0
            barrier.advance(num_bytes=-target.data.numel() * target.data.element_size())

        threading.Thread(target=fill_in).start()

    def _arrive(self, barrier: Barrier, count: int = 1, pred: Any = True) -> None:
        self._dawdle()
        if pred:
            barrier.advance(arrivals=count)

    def _wait(self, barrier: Barrier, parity: Any) -> None:
        deadline = time.monotonic() + DEADLOCK_SECONDS
        with barrier.changed:
            while barrier.phase % 2 == int(parity):
                barrier.changed.wait(0.1)
                assert not self._failed, "another partition failed"
                assert time.monotonic() < deadline, "waits for ever"

    def _multiply(self, a: Any, b: Shared, accumulator: Any, *, use_acc: bool = True, is_async: bool) -> Product:
        def compute(before: torch.Tensor) -> torch.Tensor:
            found = (a.data if isinstance(a, Shared) else a).float() @ b.data.float()
            assert not found.isnan().any(), "an operand was not there"
            return before + found if use_acc else found

        product = Product(compute, accumulator)
        if self._random.random() < 0.5:
            product.finish()
        self._own.products.append(product)
        return product

    def _wait_for_products(self, num_outstanding: int, deps: list[Product]) -> torch.Tensor:
        while len(self._own.products) > num_outstanding:
            self._own.products.pop(0).finish()
        (product,) = deps
        assert product.value is not None, "not the product that was waited for"
        return product.value


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Pointer):
        return a if condition else b
    return torch.where(torch.as_tensor(condition), a, b)


def _multiply_now(a: torch.Tensor, b: torch.Tensor, accumulator: torch.Tensor) -> torch.Tensor:
    found = a.float() @ b.float()
    assert not found.isnan().any(), "an operand was not there"
    return accumulator + found


def _allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Any:
    if dtype == torch.int64:
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=barriers.__getitem__)
    return Shared(torch.full(shape, _poison(dtype), dtype=dtype), layout)


def _poison(dtype: torch.dtype) -> float:
    """Not a number, or two of eight bits that are none."""
    return float("nan") if dtype.is_floating_point else 0x7F7F


def _copied(args: Any) -> Any:
    """Numbers are tensors here, which a partition may add to."""
    if isinstance(args, tuple):
        return tuple(map(_copied, args))
    return args.clone() if isinstance(args, torch.Tensor) else args
