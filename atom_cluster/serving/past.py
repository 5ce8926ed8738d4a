"""Whether an application has served before, kept in Ray's control store for processes that start later.

While its engines are replaced, requests wait for them; a cluster that never was there refuses them. An ingress that is
started in the middle of a redeploy, maybe before any engine, cannot tell one from the other by what it sees.
"""

from __future__ import annotations

import logging

from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_put

logger = logging.getLogger(__name__)

_NAMESPACE = b"atom_cluster"


def has_served(application: str) -> bool:
    """Whether engines of the application were there, in the life of this Ray cluster. Needs a connection to Ray."""
    return bool(_internal_kv_exists(_key(application), namespace=_NAMESPACE))


def note_served(application: str) -> bool:
    """Engines of the application are there. Whether that could be noted; if not, try again later."""
    try:
        _internal_kv_put(_key(application), b"1", overwrite=True, namespace=_NAMESPACE)
    except Exception as exc:  # noqa: BLE001  Whatever ails Ray's control store, this process serves without it.
        logger.info("Ray's control store did not take a note: %s", type(exc).__name__)
        return False
    return True


def _key(application: str) -> bytes:
    return b"has_served/" + application.encode()
