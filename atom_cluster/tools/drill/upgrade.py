"""Two versions side by side: the application is deployed again, with a model whose fingerprint is another.

The new model is the old one with a word more in its config.json, which changes the fingerprint and no answer.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from ray import serve

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.model_path import resolve_model_path
from atom_cluster.serving.builders import build_cluster
from atom_cluster.tools.drill.cluster import DrillError, RunningCluster
from atom_cluster.tools.drill.watch import EngineWatch, addresses_of

NEEDS: dict[str, Any] = {
    "prefill": {"replicas": 3},
    "decode": {"replicas": 3},
    "cache": {"num_blocks": 256},
    "serving": {"ingress_replicas": 2},
}
"""Serve replaces replicas one by one, and each role for itself: with three of each there are both versions of both for
a while."""
_APPLICATION = "atom"
_POLL_S = 0.1


def another_version(config: ClusterConfig, directory: Path) -> ClusterConfig:
    """The same cluster with a model that answers alike and has another fingerprint; its files are linked to."""
    source = resolve_model_path(config.model, config.model_options.revision)
    target = directory / f"version-{time.time_ns()}"
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path.resolve())
    (target / "config.json").unlink()
    facts = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(facts | {"drill_version": target.name}))
    return ClusterConfig.model_validate(config.model_dump(mode="json") | {"model": str(target)})


class SideBySide:
    """Looks at all engines until the end of a `with` block, and remembers what it saw of two versions."""

    def __init__(self, cluster: RunningCluster, watch: EngineWatch) -> None:
        self._cluster = cluster
        self._watch = watch
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="drill-side-by-side", daemon=True)
        self._num_mismatches: dict[str, int] = {}
        self._handing_over: set[str] = set()
        self.seconds = 0.0
        """For which there were prefill and decode engines of both versions."""

    @property
    def num_mismatches(self) -> int:
        """Handoffs refused for another fingerprint, by any engine that ever was there."""
        return sum(self._num_mismatches.values())

    @property
    def num_versions_handing_over(self) -> int:
        """Versions of which, while there were two, an engine was seen in the middle of a handoff."""
        return len(self._handing_over)

    def __enter__(self) -> SideBySide:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        seen_s = time.monotonic()
        while not self._is_over.wait(_POLL_S):
            try:
                replicas = self._cluster.get("/v1/cluster", timeout_s=2.0)["replicas"]
            except OSError:
                continue
            statuses = self._watch.statuses(addresses_of(replicas))
            fingerprint_of = {str(replica["id"]): str(replica["fingerprint"]) for replica in replicas}
            for peer_id, status in statuses.items():
                self._num_mismatches[peer_id] = status.num_mismatches
            now_s, before_s = time.monotonic(), seen_s
            seen_s = now_s
            if len({(replica["role"], replica["fingerprint"]) for replica in replicas}) >= 4:
                self.seconds += now_s - before_s
                busy = (peer_id for peer_id, status in statuses.items() if status.num_tickets)
                self._handing_over |= {fingerprint_of[peer_id] for peer_id in busy}


def upgrade(cluster: RunningCluster, watch: EngineWatch) -> dict[str, float]:
    """Deploy another version and wait until it is all there is; what was seen meanwhile.

    Raises `DrillError` if versions were never side by side, or met.
    """
    if cluster.log is None:
        raise DrillError("an upgrade needs a cluster that the drill has started")
    page = cluster.page()
    before = {replica["fingerprint"] for replica in page["replicas"]}
    config = another_version(ClusterConfig.model_validate(page["configuration"]), cluster.log.parent)
    with SideBySide(cluster, watch) as seen:
        serve.run(build_cluster(config), name=_APPLICATION, route_prefix="/")
        cluster.wait_until(
            lambda: not before & {replica["fingerprint"] for replica in cluster.replicas()},
            what="only engines of the new version",
            timeout_s=180.0,
        )
    if seen.num_mismatches:
        raise DrillError(f"{seen.num_mismatches} handoffs between engines of two versions were begun")
    if seen.num_versions_handing_over < 2:
        raise DrillError(f"two versions were side by side for {seen.seconds:.1f} s, and did not both hand over")
    return {"side_by_side_s": round(seen.seconds, 1), "mixed_pairs": seen.num_mismatches}
