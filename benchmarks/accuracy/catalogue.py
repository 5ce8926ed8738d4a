"""What each model has to reach, in the format of ATOM's `models_accuracy.json`.

Fields of ours beside ATOM's: `task` (theirs is always GSM8K), `num_fewshot`, `limit`, and `acceptance_threshold`, the
least share of drafts that have to be kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CATALOGUE = Path(__file__).with_name("models_accuracy.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model and what it has to reach on one task."""

    model_name: str
    model_path: str
    task: str
    num_fewshot: int
    limit: int | None
    accuracy_threshold: float
    """Less is a failure."""
    accuracy_baseline: float
    """What was measured when the threshold was set."""
    acceptance_threshold: float | None
    """Least share of drafts kept; None: the entry is not about speculation."""


def read_catalogue(path: Path = CATALOGUE) -> list[Entry]:
    """Entries of a file. Raises ValueError naming the entry that is wrong."""
    found = []
    for index, row in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        try:
            entry = Entry(
                model_name=row["model_name"],
                model_path=row["model_path"],
                task=row.get("task", "gsm8k"),
                num_fewshot=int(row.get("num_fewshot", 3)),
                limit=row.get("limit"),
                accuracy_threshold=float(row["accuracy_threshold"]),
                accuracy_baseline=float(row["accuracy_baseline"]),
                acceptance_threshold=row.get("acceptance_threshold"),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise ValueError(f"{path}, entry {index}: {exc}") from exc
        if not 0 <= entry.accuracy_threshold <= 1:
            raise ValueError(f"{path}, entry {index}: accuracy_threshold is a share, from 0 to 1")
        found.append(entry)
    return found


def entries_of(entries: Sequence[Entry], model_name: str) -> list[Entry]:
    """Those of one model. Raises ValueError that lists the models there are."""
    found = [entry for entry in entries if entry.model_name == model_name]
    if not found:
        names = sorted({entry.model_name for entry in entries})
        raise ValueError(f"the catalogue has no {model_name!r}; it has {names}")
    return found
