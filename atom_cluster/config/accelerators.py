"""Accelerators that a cluster can be planned for without having one: data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atom_cluster.errors import ConfigError
from atom_cluster.units import GiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One kind of GPU, and the machines that it is usually in."""

    name: str
    vendor: Literal["cuda", "rocm"]
    memory_bytes: int
    """What its driver reports as the total of one."""
    gpus_per_node: int = 8


ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        # 192 and 288 GiB of stacks by AMD's data sheets, of which the driver keeps some MiB. Not measured here.
        Accelerator(name="MI300X", vendor="rocm", memory_bytes=int(191.9 * GiB)),
        Accelerator(name="MI355X", vendor="rocm", memory_bytes=int(287.9 * GiB)),
        # As measured: `kv_blocks` in the records of benchmarks/results.
        Accelerator(name="H200", vendor="cuda", memory_bytes=int(139.8 * GiB)),
    )
}
"""By name."""


def accelerator_named(name: str) -> Accelerator:
    """The accelerator with this name, in any case. Raises ConfigError listing those that are known."""
    found = ACCELERATORS.get(name.upper())
    if found is None:
        raise ConfigError(f"accelerator `{name}` is not known; known: {', '.join(ACCELERATORS)}")
    return found
