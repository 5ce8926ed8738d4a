"""Checks the whole YAML behind an application, of which Serve passes on only `args:`.

Serve drops keys it does not know: `http_option:` would leave the port at its default without a word. Ray records the
command line of every driver, so inside a recipe the file of `serve run FILE` can be found again and checked strictly.
Configurations that arrive another way (KubeRay, the REST API) have no such file; then that is logged.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from pathlib import Path

from ray.util.state import list_jobs
from ray.util.state.exception import RayStateApiException

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.load import load_args, load_file, read_yaml
from atom_cluster.errors import ConfigError

_LIST_JOBS_TIMEOUT_S = 5

logger = logging.getLogger(__name__)


def check_served_file(import_path: str, args: ClusterConfig) -> None:
    """Check the file that `import_path` was started from with `args`. Raises ConfigError with all its problems."""
    entrypoints = _driver_command_lines()
    # A cluster may run several `serve run` at once, or one that outlived its driver: the content decides.
    for path in served_files(entrypoints, [Path.cwd(), *map(Path, sys.path)]):
        if _holds(path, import_path, args):
            load_file(path)
            logger.info("checked all keys of %s", path)
            return
    logger.warning(
        "cannot find the file that %s was started from: `args` is checked, but misspelt keys elsewhere in the "
        "configuration go unnoticed; `atom-cluster check-config FILE` checks all of it",
        import_path,
    )


def served_files(command_lines: Iterable[str], directories: Iterable[Path]) -> list[Path]:
    """Existing YAML files named in `serve run` command lines, relative ones looked up in `directories`."""
    roots = list(directories)
    found: dict[Path, None] = {}
    for line in command_lines:
        program, _, arguments = line.partition(" run ")
        if "serve" not in program:
            continue
        for argument in arguments.split():
            if Path(argument).suffix in (".yaml", ".yml"):
                found.update({path.resolve(): None for root in roots if (path := root / argument).is_file()})
    return list(found)


def _driver_command_lines() -> list[str]:
    try:
        jobs = list_jobs(filters=[("status", "=", "RUNNING")], timeout=_LIST_JOBS_TIMEOUT_S)
    except (RayStateApiException, OSError) as error:
        logger.warning("cannot ask Ray which file is served: %s", error)
        return []
    return [job.entrypoint for job in jobs if job.entrypoint]


def _holds(path: Path, import_path: str, args: ClusterConfig) -> bool:
    """Whether a file starts `import_path` with exactly these arguments."""
    try:
        content = read_yaml(path)
    except ConfigError:
        return False
    applications = content.get("applications") if isinstance(content, dict) else None
    for application in applications if isinstance(applications, list) else []:
        if isinstance(application, dict) and application.get("import_path") == import_path:
            try:
                if load_args(application.get("args")) == args:
                    return True
            except ConfigError:
                continue
    return False
