"""Stop 1 of 14: a YAML becomes a Serve application with prefill and decode on separate replicas.

Next: atom_cluster/serving/builders.py. Knows nothing of how replicas work.
"""

# No `from __future__ import annotations`: Serve reads the class of `args` from the signature to validate the YAML.

from ray.serve import Application

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.errors import ConfigError
from atom_cluster.serving.builders import build_cluster
from atom_cluster.serving.served_file import check_served_file


def build(args: ClusterConfig) -> Application:
    """The application of a file with `import_path: deployments.disaggregated:build`.

    Raises ConfigError if the file has a key that Serve would ignore, or no `prefill` and `decode` groups.
    """
    check_served_file("deployments.disaggregated:build", args)
    if args.prefill is None or args.decode is None:
        raise ConfigError("deployments.disaggregated needs `prefill` and `decode`; see deployments.unified")
    return build_cluster(args)
