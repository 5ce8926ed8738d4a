"""Launches of one kernel by layer after layer. Knows no kernels.

To find the compiled kernel that fits, Triton looks at every argument of every launch. Layers of a step differ in little
else than in where their tensors are: from the second launch on, the compiled kernel is launched as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class RepeatedKernel:
    """One kernel, launched with arguments that are mostly alike."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[object, Any] = {}

    def launch(
        self,
        num_programs: int,
        tensors: Sequence[Any],
        numbers: Sequence[float],
        constants: Mapping[str, object],
        options: Mapping[str, object],
    ) -> None:
        """On the current stream. The kernel's parameters are these, in this order; options: Triton's own.

        tensors: or what describes one, always of the same dtype, box and layout. For AMD Triton also looks at the sizes
        of storages: layers of a plan share theirs.
        """
        alike = (
            tuple((x.dtype, x.data_ptr() % 16) for x in tensors if isinstance(x, torch.Tensor)),
            tuple(numbers),
            tuple(constants.values()),
        )
        compiled = self._compiled.get(alike)
        if compiled is not None:
            compiled[(num_programs, 1, 1)](*tensors, *numbers, *constants.values())
            return
        # The interpreter compiles nothing.
        compiled = self._kernel[(num_programs,)](*tensors, *numbers, **constants, **options)
        if compiled is not None:
            self._compiled[alike] = compiled
