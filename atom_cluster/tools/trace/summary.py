"""`atom-cluster trace`: reads a trace and writes `breakdown.xlsx`, `summary.md` and pictures into a directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from atom_cluster.errors import ConfigError
from atom_cluster.tools.trace.breakdown import Breakdown, Phase, break_down
from atom_cluster.tools.trace.events import read_trace
from atom_cluster.tools.trace.pictures import draw_phases
from atom_cluster.tools.trace.workbook import (
    GAP_COLUMNS,
    KERNEL_COLUMNS,
    PHASE_COLUMNS,
    Cell,
    gap_rows,
    phase_row,
    write_workbook,
)

_NUM_KERNELS = 15
_NUM_GAPS = 10
_MAX_NAME = 90


def analyze_trace(path: Path, output: Path | None) -> str:
    """Write everything; the table of phases and where the files are, in words. `output` None: beside the trace.

    Raises ConfigError for a file that is no trace, a directory that cannot be written, or a missing library.
    """
    breakdown = break_down(read_trace(path))
    directory = path.with_name(path.name.split(".")[0] + "_breakdown") if output is None else output
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_workbook(directory / "breakdown.xlsx", breakdown)
        pictures = draw_phases(directory, breakdown)
        (directory / "summary.md").write_text(describe(path.name, breakdown, pictures), encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"cannot write to {directory}: {exc}") from exc
    return f"{overview(breakdown)}\n\nwritten to {directory}: breakdown.xlsx, summary.md, {len(pictures)} pictures"


def overview(breakdown: Breakdown) -> str:
    """The table of phases, and idle time."""
    idle_us = breakdown.idle_in_steps_us + breakdown.idle_between_steps_us
    share = idle_us / breakdown.span_us if breakdown.span_us else 0.0
    return "\n".join(
        [
            _table(PHASE_COLUMNS, (phase_row(phase) for phase in breakdown.phases)),
            "",
            f"{breakdown.span_us / 1000:.1f} ms on {breakdown.device}, {share:.1%} of it idle: "
            f"{breakdown.idle_in_steps_us / 1000:.2f} ms in steps, "
            f"{breakdown.idle_between_steps_us / 1000:.2f} ms between them.",
        ]
    )


def describe(name: str, breakdown: Breakdown, pictures: Mapping[str, str]) -> str:
    """The whole summary as Markdown. `pictures`: file by phase."""
    sections = [f"# {name}", overview(breakdown)]
    sections += [_describe_phase(phase, pictures.get(phase.name)) for phase in breakdown.phases]
    gaps = _table(GAP_COLUMNS, gap_rows(breakdown)[:_NUM_GAPS])
    sections.append(f"## Largest gaps\n\n{gaps}")
    return "\n\n".join(sections) + "\n"


def _describe_phase(phase: Phase, picture: str | None) -> str:
    groups = [(group, us, us / (phase.mean_step_us or 1.0)) for group, us in phase.us_by_group.items()]
    groups.append(("idle", phase.idle_us, phase.idle_share))
    kernels = [
        (row.name, row.group, row.calls_per_step, row.us_per_step, row.share, row.mean_us)
        for row in phase.rows[:_NUM_KERNELS]
    ]
    parts = [f"## {phase.name}", _table(("group", "us per step", "share of the step"), groups)]
    if picture is not None:
        parts.append(f"![{phase.name}]({picture})")
    parts.append(_table(KERNEL_COLUMNS, kernels))
    return "\n\n".join(parts)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    lines = [_line(columns), _line(["---"] * len(columns))]
    lines += [_line([_text(column, cell) for column, cell in zip(columns, row)]) for row in rows]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(column: str, cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.1%}" if "share" in column else f"{cell:.2f}"
    if isinstance(cell, int):
        return str(cell)
    short = cell if len(cell) <= _MAX_NAME else f"{cell[: _MAX_NAME - 3]}..."
    return short.replace("|", "\\|").replace("<", "&lt;")
