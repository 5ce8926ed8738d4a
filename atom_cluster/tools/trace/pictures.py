"""Pictures of a breakdown, one file per phase. Needs matplotlib."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from atom_cluster.errors import ConfigError
from atom_cluster.tools.trace.breakdown import Breakdown, Phase
from atom_cluster.tools.trace.groups import GROUPS, group_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PICTURES = 12
"""Phases with the most time get one."""
_NUM_BINS = 40
_MAX_LANES = 8
_IDLE = "#dddddd"


def draw_phases(directory: Path, breakdown: Breakdown) -> dict[str, str]:
    """Write the pictures; file name by phase. Raises ConfigError when matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ConfigError("pictures need matplotlib: pip install 'atom-cluster[tools]'") from exc
    files: dict[str, str] = {}
    for phase in breakdown.phases[:MAX_PICTURES]:
        figure = Figure(figsize=(12, 8), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        bar, timeline, histogram = figure.subplots(3, 1, height_ratios=[1, 1.6, 1.6])
        figure.suptitle(f"{phase.name}: {len(phase.steps)} steps on {breakdown.device}, {phase.idle_share:.0%} idle")
        _draw_groups(bar, phase)
        _draw_timeline(timeline, phase)
        _draw_histogram(histogram, phase)
        name = re.sub(r"[^a-z0-9]+", "_", phase.name.lower()).strip("_") + ".png"
        canvas.print_figure(str(directory / name), dpi=110)
        files[phase.name] = name
    return files


def _color(group: str) -> str:
    return f"C{GROUPS.index(group)}"


def _draw_groups(axes: Axes, phase: Phase) -> None:
    left_us = 0.0
    for group, us in [*phase.us_by_group.items(), ("idle", phase.idle_us)]:
        color = _IDLE if group == "idle" else _color(group)
        axes.barh([0], [us], left=[left_us], color=color, label=f"{group} {us:.0f} us")
        left_us += us
    axes.set_yticks([])
    axes.set_xlabel("us per step, by group")
    axes.legend(ncols=6, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.5), frameon=False)


def _draw_timeline(axes: Axes, phase: Phase) -> None:
    step = phase.typical_step()
    lanes = sorted({work.lane for work in step.work})[:_MAX_LANES]
    for index, lane in enumerate(lanes):
        of_lane = [work for work in step.work if work.lane == lane]
        axes.broken_barh(
            [(work.start_us - step.start_us, work.duration_us) for work in of_lane],
            (index - 0.4, 0.8),
            facecolors=[_color(group_of(work.name)) for work in of_lane],
        )
    axes.set_yticks(range(len(lanes)), [str(lane) for lane in lanes])
    axes.set_ylabel("stream")
    axes.set_xlabel("us since the step began, for a step of median time")


def _draw_histogram(axes: Axes, phase: Phase) -> None:
    axes.hist(phase.step_us, bins=min(_NUM_BINS, max(1, len(phase.step_us))), color="C0")
    axes.set_xlabel("us of a step")
    axes.set_ylabel("steps")
