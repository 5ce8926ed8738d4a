"""The secret that all processes of one cluster share, and from which their ZMQ keys are derived.

It comes from the environment (a Kubernetes secret, say) or else is made up once per Ray cluster and kept in Ray's own
control store, which only members of the Ray cluster can read. It is never part of a deployment's arguments, so a
redeploy does not change it and a dump of the configuration does not show it.
"""

from __future__ import annotations

import secrets

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from atom_cluster.config.env import read_environment

_KEY = b"cluster_secret"
_NAMESPACE = b"atom_cluster"


def cluster_secret() -> bytes:
    """The secret, the same in every process of the cluster. Needs a connection to Ray."""
    configured = read_environment().secret
    if configured is not None:
        return configured
    # Put-if-absent: whoever comes first decides, everybody reads what was decided.
    _internal_kv_put(_KEY, secrets.token_bytes(32), overwrite=False, namespace=_NAMESPACE)
    secret = _internal_kv_get(_KEY, namespace=_NAMESPACE)
    if not isinstance(secret, bytes):
        raise RuntimeError("Ray's control store did not keep the cluster secret")
    return secret
