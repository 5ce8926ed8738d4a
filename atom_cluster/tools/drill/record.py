"""Record: a drill's results as JSON, with what is needed to repeat and compare it. Written anew with each result."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atom_cluster.tools.facts import git_commit, hardware, software


class Record:
    """A drill takes long and may be interrupted: whatever is known is in the file."""

    def __init__(self, output: Path | None, *, names: Sequence[str], num_clients: int) -> None:
        """output: None writes nothing."""
        self._output = output
        self._facts: dict[str, Any] = {
            "benchmark": "drill",
            "command": f"atom-cluster {shlex.join(sys.argv[1:])}",
            "commit": git_commit(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "hardware": hardware(),
            "software": software(),
            "drills": list(names),
            "num_clients": num_clients,
        }
        self._rows: dict[str, list[dict[str, object]]] = {}

    def add(self, table: str, row: dict[str, object]) -> None:
        """One more row of a table; the file has it when this returns."""
        self._rows.setdefault(table, []).append(row)
        if self._output is not None:
            self._output.write_text(json.dumps(self._facts | self._rows, indent=1) + "\n")
