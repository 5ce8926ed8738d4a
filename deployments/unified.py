"""Stop 1 of 14, the other way: a YAML becomes a Serve application whose replicas do both prefill and decode.

Next: atom_cluster/serving/builders.py. Knows nothing of how replicas work.
"""

# No `from __future__ import annotations`: Serve reads the class of `args` from the signature to validate the YAML.

from ray.serve import Application

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.errors import ConfigError
from atom_cluster.serving.builders import build_cluster
from atom_cluster.serving.served_file import check_served_file


def build(args: ClusterConfig) -> Application:
    """The application of a file with `import_path: deployments.unified:build`.

    Raises ConfigError if the file has a key that Serve would ignore, or no `unified` group.
    """
    check_served_file("deployments.unified:build", args)
    if args.unified is None:
        raise ConfigError("deployments.unified needs `unified`; see deployments.disaggregated")
    return build_cluster(args)
