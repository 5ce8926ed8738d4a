"""The tables of a breakdown as an xlsx file. Needs openpyxl."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atom_cluster.errors import ConfigError
from atom_cluster.tools.trace.breakdown import Breakdown, Phase, percentile

if TYPE_CHECKING:
    from openpyxl.worksheet.worksheet import Worksheet

Cell = str | float | int | None

_MAX_TITLE = 31
PHASE_COLUMNS = (
    "phase",
    "steps",
    "step p50 us",
    "step p99 us",
    "p99/p50",
    "period p50 us",
    "period p99 us",
    "busy us per step",
    "idle us per step",
    "idle share",
    "total ms",
)
KERNEL_COLUMNS = ("kernel", "group", "calls per step", "us per step", "share", "mean us")
GAP_COLUMNS = ("start us", "idle us", "where", "kernel before", "kernel after")


def write_workbook(path: Path, breakdown: Breakdown) -> None:
    """A sheet `summary`, one per phase, one of gaps. Raises ConfigError when openpyxl is missing."""
    try:
        from openpyxl import Workbook
    except ImportError as exc:
        raise ConfigError("tables need openpyxl: pip install 'atom-cluster[tools]'") from exc
    book = Workbook()
    summary = book.active
    assert summary is not None
    summary.title = "summary"
    _fill(summary, PHASE_COLUMNS, [phase_row(phase) for phase in breakdown.phases])
    titles = {"summary", "gaps"}
    for phase in breakdown.phases:
        sheet = book.create_sheet(_title(phase.name, titles))
        rows = [
            (row.name, row.group, row.calls_per_step, row.us_per_step, row.share, row.mean_us) for row in phase.rows
        ]
        _fill(sheet, KERNEL_COLUMNS, rows)
        for group, us in phase.us_by_group.items():
            sheet.append([None, None, None, None, None, None, None, group, us])
    _fill(book.create_sheet("gaps"), GAP_COLUMNS, gap_rows(breakdown))
    book.save(path)


def phase_row(phase: Phase) -> tuple[Cell, ...]:
    """Values under `PHASE_COLUMNS`."""
    median_us = percentile(phase.step_us, 50)
    late_us = percentile(phase.step_us, 99)
    has_periods = bool(phase.period_us)
    return (
        phase.name + (" (part of the others)" if phase.is_part else ""),
        len(phase.steps),
        median_us,
        late_us,
        late_us / median_us if median_us else None,
        percentile(phase.period_us, 50) if has_periods else None,
        percentile(phase.period_us, 99) if has_periods else None,
        phase.busy_us,
        phase.idle_us,
        phase.idle_share,
        phase.total_us / 1000,
    )


def gap_rows(breakdown: Breakdown) -> list[tuple[Cell, ...]]:
    """Values under `GAP_COLUMNS`."""
    return [(gap.start_us, gap.idle_us, gap.where, gap.before, gap.after) for gap in breakdown.gaps]


def _fill(sheet: Worksheet, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    from openpyxl.styles import Font
    from openpyxl.utils import get_column_letter

    sheet.append(list(columns))
    for row in rows:
        sheet.append(list(row))
    for number, cells in enumerate(sheet.iter_cols(min_col=1, max_col=len(columns)), start=1):
        header = str(cells[0].value)
        cells[0].font = Font(bold=True)
        is_text = header in ("phase", "kernel", "where", "kernel before", "kernel after")
        sheet.column_dimensions[get_column_letter(number)].width = 60 if is_text else max(12, len(header) + 2)
        for cell in cells[1:]:
            cell.number_format = "0.0%" if "share" in header else "0.00" if isinstance(cell.value, float) else "General"
    sheet.freeze_panes = "A2"


def _title(name: str, taken: set[str]) -> str:
    """A sheet's title: short, without what xlsx forbids, and nobody else's."""
    base = re.sub(r"[\[\]:*?/\\]", " ", name)[:_MAX_TITLE]
    title, number = base, 1
    while title.lower() in taken:
        number += 1
        title = f"{base[: _MAX_TITLE - 4]} {number}"
    taken.add(title.lower())
    return title
