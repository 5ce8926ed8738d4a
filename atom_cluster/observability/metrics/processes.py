"""Processes: what they are, whether their gangs are well, what they take."""

from __future__ import annotations

from atom_cluster.observability.metrics.kinds import Metric

BUILD_INFO = Metric(
    name="atom_build_info",
    kind="gauge",
    unit="info",
    labels=("version", "python", "model"),
    help="1, with what this process runs.",
    advice="Two versions at once outside of an upgrade: a replica was not replaced.",
)
CHOICE_INFO = Metric(
    name="atom_choice_info",
    kind="gauge",
    unit="info",
    labels=("choice", "setting"),
    help="1, for each automatic choice of an engine: op backend, transport, dtype, graphs ... with its reason, cut to "
    "120 characters; whole at /v1/cluster.",
    advice="Differs between replicas of a role: unequal nodes.",
)
GANG_HEALTHY = Metric(
    name="atom_gang_healthy",
    kind="gauge",
    unit="gangs",
    help="1 if all ranks of the replica's gang answered their last check, else 0. By its head.",
    advice="0: Serve replaces the replica. If it stays: its log names the rank and the reason.",
)
GANG_FAILED_CHECKS = Metric(
    name="atom_gang_failed_checks_total",
    kind="counter",
    unit="checks",
    help="Checks of a gang in which a rank was dead, stuck or did not answer. By its head.",
    advice="Without a restart: ranks are slow to answer; a longer `serving.health_check_timeout_s`.",
)
GANG_START_S = Metric(
    name="atom_gang_start_seconds",
    kind="gauge",
    unit="s",
    help="From the head's start to its gang being ready. By its head.",
    advice="How long a lost replica is missed. Parts are in `atom_start_seconds`.",
)
PROCESS_RESIDENT = Metric(
    name="atom_process_resident_bytes",
    kind="gauge",
    unit="bytes",
    help="Resident memory of the process.",
    advice="Grows for hours under even load: a leak; say which role it is.",
)
PROCESS_CPU_S = Metric(
    name="atom_process_cpu_seconds_total",
    kind="counter",
    unit="s",
    help="Processor time that the process took.",
    advice="Of an ingress or the router near one second per second: its event loop is full. More ingress replicas.",
)
PROCESS_OPEN_FILES = Metric(
    name="atom_process_open_files",
    kind="gauge",
    unit="files",
    help="Open file descriptors of the process.",
    advice="Near the process's limit: raise it (`ulimit -n`), or find who does not close connections.",
)
