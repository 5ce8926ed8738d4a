"""Which KV transports there are: names to dotted paths, imported when one is opened. Best first.

Knows no transport's internals; importing this file imports neither torch nor any transport.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from atom_cluster.config.faults import FaultsConfig
from atom_cluster.errors import ConfigError

if TYPE_CHECKING:
    from atom_cluster.kv_transfer.protocol import KvTransport


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """What any transport may need to know about the rank it works for."""

    rank: int
    host: str
    """Address of this node, IPv4 or IPv6, that listeners bind to. Never a wildcard."""
    secret: bytes = field(repr=False)
    """The cluster's secret, at least 16 bytes."""
    is_named: bool = True
    """Whether the transport was asked for by its name, not tried by `auto`."""
    faults: FaultsConfig | None = None
    """What goes wrong on purpose."""


@dataclass(frozen=True, slots=True)
class _Entry:
    path: str
    """`module:function`, a function from `TransportSettings` to a `KvTransport`."""
    device_types: tuple[str, ...]
    modules: tuple[str, ...] = ()
    """Of the library it needs, which is optional; any one of them will do."""

    @property
    def is_installed(self) -> bool:
        return not self.modules or any(importlib.util.find_spec(module) is not None for module in self.modules)


NIXL_MODULES = ("nixl_cu13", "nixl_cu12", "nixl")
"""What NIXL can be installed as: two wheels, by version of CUDA; the last is a build of one's own."""

_TRANSPORTS = {
    "shm": _Entry("atom_cluster.kv_transfer.shm:open_transport", ("cpu",)),
    "ipc": _Entry("atom_cluster.kv_transfer.ipc:open_transport", ("cuda",)),
    "mori": _Entry("atom_cluster.kv_transfer.mori:open_transport", ("cuda",), ("mori",)),
    "nixl": _Entry("atom_cluster.kv_transfer.nixl:open_transport", ("cpu", "cuda"), NIXL_MODULES),
    "tcp": _Entry("atom_cluster.kv_transfer.tcp:open_transport", ("cpu", "cuda")),
}


def available(device_type: str) -> tuple[str, ...]:
    """Names of the transports for KV memory on this type of device (`cpu`, `cuda`), best first.

    Those whose library is not installed are left out; `missing` has them.
    """
    fitting = {name: entry for name, entry in _TRANSPORTS.items() if device_type in entry.device_types}
    return tuple(name for name, entry in fitting.items() if entry.is_installed)


def missing(device_type: str) -> dict[str, str]:
    """Transports for this type of device whose library is not installed, and which that is."""
    return {
        name: f"not installed ({' or '.join(entry.modules)})"
        for name, entry in _TRANSPORTS.items()
        if device_type in entry.device_types and not entry.is_installed
    }


def open_transport(name: str, settings: TransportSettings) -> KvTransport:
    """Import and open a transport. Raises `ConfigError` for an unknown name, `TransferError` if it cannot work here."""
    entry = _TRANSPORTS.get(name)
    if entry is None:
        raise ConfigError(f"kv_transfer.transport: no transport {name!r}; there are {', '.join(_TRANSPORTS)}")
    module, _, function = entry.path.partition(":")
    opener = getattr(importlib.import_module(module), function)
    transport = cast("Callable[[TransportSettings], KvTransport]", opener)(settings)
    if settings.faults is None:
        return transport
    from atom_cluster.kv_transfer.faults import FaultyTransport  # imports torch

    return FaultyTransport(transport, settings.faults, rank=settings.rank)
