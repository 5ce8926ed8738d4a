"""Plots of results as SVG, to be put into a page. Needs matplotlib; knows nothing of pages."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Literal

import matplotlib
import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#ea7a17", "#14915b", "#cc2936", "#8a94a3"
_COLORS = {"ttft": BLUE, "tpot": ORANGE, "itl": GREEN, "e2el": GREY}
_SIZE_IN = (6.2, 2.9)
_LOWEST_PERCENT = 1
"""Where distributions begin to be shown: the smallest of thousands of gaps may be next to nothing."""
_WIDE = 3000.0
"""Range of a logarithmic axis, as a factor, from which on it has fewer ticks."""
_LEAST_MS = 0.01
"""Shown for less: a logarithmic axis has no zero."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "benchmarks",
    "font.family": ["sans-serif"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3af",
    "axes.labelcolor": "#4b5563",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}
_numbers = count()


@contextmanager
def _figure(found: list[str]) -> Iterator[Axes]:
    """Axes of a figure that becomes text when the block ends."""
    with matplotlib.rc_context(_STYLE):
        figure = matplotlib.figure.Figure(figsize=_SIZE_IN, layout="constrained")
        yield figure.add_subplot()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    found.append(_embedded(buffer.getvalue()))


def _embedded(svg: str) -> str:
    """Without the XML head, as wide as its place, and with names that no other plot of the page has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", svg, count=1)
    prefix = f"p{next(_numbers)}-"
    for name in set(re.findall(r'\bid="([^"]+)"', svg)):
        svg = svg.replace(f'id="{name}"', f'id="{prefix}{name}"').replace(f'"#{name}"', f'"#{prefix}{name}"')
        svg = svg.replace(f"url(#{name})", f"url(#{prefix}{name})")
    return svg


def over_time(timeline: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(caption, SVG) of a run over time."""
    at_s = [timeline["window_s"] * (index + 0.5) for index in range(len(timeline["sent_per_s"]))]
    found: list[str] = []
    with _figure(found) as axes:
        axes.plot(at_s, timeline["sent_per_s"], color=GREY, label="sent")
        axes.plot(at_s, timeline["ended_per_s"], color=BLUE, label="answered")
        if any(timeline["failed_per_s"]):
            axes.plot(at_s, timeline["failed_per_s"], color=RED, label="failed")
        _finish(axes, "seconds", "requests per second")
    with _figure(found) as axes:
        axes.fill_between(at_s, timeline["under_way"], color=BLUE, alpha=0.15, linewidth=0)
        axes.plot(at_s, timeline["under_way"], color=BLUE)
        _finish(axes, "seconds", "requests under way", legend=False)
    with _figure(found) as axes:
        axes.plot(at_s, timeline["prompt_tokens_per_s"], color=GREY, label="prompt, when sent")
        axes.plot(at_s, timeline["output_tokens_per_s"], color=GREEN, label="output")
        _finish(axes, "seconds", "tokens per second")
    with _figure(found) as axes:
        axes.plot(at_s, _gaps(timeline["ttft_ms_p99"]), color=ORANGE, label="p99")
        axes.plot(at_s, _gaps(timeline["ttft_ms_median"]), color=BLUE, label="median")
        _logarithmic(axes, "y")
        _finish(axes, "seconds (when sent)", "TTFT, ms", from_zero=False)
    captions = ("Requests", "Under way", "Tokens", "Time to first token")
    return list(zip(captions, found, strict=True))


def distributions(quantiles_ms: Mapping[str, Sequence[float]]) -> list[tuple[str, str]]:
    """(caption, SVG): share of requests, or gaps, below each latency."""
    found: list[str] = []
    captions = []
    for caption, names in (("First token and whole answer", ("ttft", "e2el")), ("Between tokens", ("tpot", "itl"))):
        shown = [name for name in names if name in quantiles_ms]
        if not shown:
            continue
        captions.append(caption)
        with _figure(found) as axes:
            for name in shown:
                values = quantiles_ms[name]
                percents = [100 * index / (len(values) - 1) for index in range(len(values))]
                axes.plot(
                    [max(value, _LEAST_MS) for value in values], percents, color=_COLORS[name], label=name.upper()
                )
            axes.set_xlim(left=max(_LEAST_MS, _lowest(quantiles_ms[name] for name in shown) / 2))
            _logarithmic(axes, "x")
            axes.set_ylim(0, 101)
            _finish(axes, "milliseconds", "% below", from_zero=False)
    return list(zip(captions, found, strict=True))


def _lowest(distributions_ms: Iterable[Sequence[float]]) -> float:
    """The first percentile, or the first value above nothing where even that is nothing: events that came together."""
    values = [value for found in distributions_ms for value in found[_LOWEST_PERCENT:] if value > _LEAST_MS]
    return min(values, default=_LEAST_MS)


def over_points(points: Sequence[Mapping[str, Any]], label: str) -> list[tuple[str, str]]:
    """(caption, SVG) of a sweep. points: results with the swept value as `x`, in its order."""
    xs = [point["x"] for point in points]
    found: list[str] = []
    with _figure(found) as axes:
        _line(axes, xs, [point["output_throughput"] for point in points], GREEN, "output tokens")
        if any((point.get("request_goodput:") or 0) > 0 for point in points):
            other = axes.twinx()
            other.spines["right"].set_visible(True)
            _line(other, xs, [point.get("request_goodput:") for point in points], BLUE, "goodput")
            other.set_ylabel("requests per second as promised", color=BLUE)
            other.set_ylim(bottom=0)
            other.grid(visible=False)
        _finish(axes, label, "output tokens per second", legend=False)
    for name in ("ttft", "tpot"):
        with _figure(found) as axes:
            for statistic, color in (("mean", _COLORS[name]), ("p99", RED)):
                _line(axes, xs, [point.get(f"{statistic}_{name}_ms") for point in points], color, statistic)
            _finish(axes, label, f"{name.upper()}, ms")
    with _figure(found) as axes:
        per_user = [_per_user(point) for point in points]
        _line(axes, per_user, [point["output_throughput"] for point in points], GREEN, "output tokens")
        for point, at in zip(points, per_user):
            if at is not None:
                place = (at, point["output_throughput"])
                axes.annotate(f"{point['x']:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        _finish(axes, "tokens per second and user (1 / mean TPOT)", "output tokens per second", legend=False)
        axes.set_xlim(left=0)
    captions = ("Throughput", "Time to first token", "Time per output token", "Speed of one user against throughput")
    return list(zip(captions, found, strict=True))


def _per_user(point: Mapping[str, Any]) -> float | None:
    tpot_ms = point.get("mean_tpot_ms")
    return 1e3 / tpot_ms if tpot_ms else None


def _line(axes: Axes, xs: Sequence[float | None], ys: Sequence[float | None], color: str, label: str) -> None:
    pairs = [(x, y) for x, y in zip(xs, ys) if x is not None and y is not None]
    if pairs:
        axes.plot(*zip(*pairs), color=color, marker="o", markersize=4, label=label)


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else max(value, _LEAST_MS) for value in values]


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """With ticks at 1, 2, 5 and their tenfolds, or at those of 1 alone where that are too many, as plain numbers."""
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < _WIDE * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def _finish(axes: Axes, x: str, y: str, *, legend: bool = True, from_zero: bool = True) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    if from_zero:
        axes.set_ylim(bottom=0)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", ncols=3)
