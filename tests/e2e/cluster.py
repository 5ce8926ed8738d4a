"""A whole cluster as a user starts it, from this checkout; see `atom_cluster.tools.drill.cluster`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atom_cluster.tools.drill import cluster
from atom_cluster.tools.drill.cluster import RunningCluster, with_args

__all__ = ["REPO", "RunningCluster", "serve_run", "with_args"]

REPO = Path(__file__).resolve().parents[2]


@contextmanager
def serve_run(config: Path, directory: Path) -> Iterator[RunningCluster]:
    """`serve run` a file of this checkout until the block ends; the cluster is ready when the block begins."""
    with cluster.serve_run(config, directory, working_dir=REPO) as running:
        yield running
