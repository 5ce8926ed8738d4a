"""A trace of torch.profiler becomes steps with what the device did for each. Knows no tables and no groups.

Steps are found by the labels that runner/step_profiler.py writes. Work of a GPU belongs to the step during which the
host launched it, whatever is running by the time it starts; a replayed graph is one launch of many kernels. What has no
launch in the trace belongs to the step whose label covers it on the GPU's own timeline. Without a GPU the ops
themselves are the work: the time of an op without that of the ops inside it.
"""

from __future__ import annotations

import bisect
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atom_cluster.errors import ConfigError

_LABEL = re.compile(r"(decode|prefill|mixed|draft)\[([^\]]*)\]")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver", "hip_runtime", "xpu_runtime")


@dataclass(frozen=True, slots=True)
class Work:
    """A kernel, a copy, or an op of a CPU. Times in us since the trace began."""

    name: str
    start_us: float
    end_us: float
    lane: int
    """Stream of a GPU, thread of a CPU."""
    num_calls: int = 1
    """0 for an op's further pieces, when other ops ran inside it."""

    @property
    def duration_us(self) -> float:
        """How long it took."""
        return self.end_us - self.start_us


@dataclass(slots=True)
class Step:
    """One labelled step, or the drafting inside of one."""

    kind: str
    """decode, prefill, mixed or draft"""
    sizes: dict[str, int]
    """What the label says: bs, q, ctx, tokens, rows, k."""
    host_start_us: float
    host_end_us: float
    lane: int
    """Thread that issued it."""
    external_id: int
    """What the profiler calls it, on the host and on the device."""
    work: list[Work] = field(default_factory=list)
    """In order of start; a step's drafting included."""

    @property
    def phase(self) -> str:
        """Steps of one phase do the same work: `decode bs=32 q=2`, `prefill`."""
        if self.kind == "decode":
            q = self.sizes.get("q", 1)
            return f"decode bs={self.sizes.get('bs', 0)}" + (f" q={q}" if q > 1 else "")
        return self.kind

    @property
    def start_us(self) -> float:
        """When the device began."""
        return self.work[0].start_us

    @property
    def end_us(self) -> float:
        """When the device was done."""
        return max(item.end_us for item in self.work)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Everything the tables need of a trace."""

    device: str
    """Name of the GPU, or CPU."""
    steps: list[Step]
    """In order of start on the device; those for which it did nothing are left out. Drafting is not among them."""
    drafts: list[Step]
    work: list[Work]
    """All of it, in order of start, what belongs to no step included."""


def read_trace(path: Path) -> Trace:
    """Raises ConfigError for a file that is no such trace, or has no labelled steps."""
    data = _read_json(path)
    events = data.get("traceEvents") if isinstance(data, dict) else None
    if not isinstance(events, list):
        raise ConfigError(f"{path} is no trace of torch.profiler: it has no traceEvents")
    complete = [event for event in events if isinstance(event, dict) and event.get("ph") == "X" and "ts" in event]
    began_us = min((float(event["ts"]) for event in complete), default=0.0)
    labelled = sorted(_steps(complete, began_us), key=lambda step: step.host_start_us)
    if not labelled:
        raise ConfigError(f"{path} has no labelled steps: it was not recorded by an engine, or while it did nothing")
    device_work = [event for event in complete if event.get("cat") in _DEVICE_WORK]
    steps = [step for step in labelled if step.kind != "draft"]
    drafts = [step for step in labelled if step.kind == "draft"]
    if device_work:
        work = _assign_device_work(device_work, complete, (steps, drafts), began_us)
    else:
        work = _assign_ops(complete, (steps, drafts), began_us)
    for step in labelled:
        step.work.sort(key=lambda item: item.start_us)
    devices = [str(device.get("name", "")) for device in data.get("deviceProperties") or []]
    return Trace(
        device=(devices[0] if devices else "GPU") if device_work else "CPU",
        steps=sorted((step for step in steps if step.work), key=lambda step: step.start_us),
        drafts=[step for step in drafts if step.work],
        work=sorted(work, key=lambda item: item.start_us),
    )


def _read_json(path: Path) -> Any:
    try:
        raw = path.read_bytes()
        return json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (OSError, EOFError, zlib.error, ValueError) as exc:
        raise ConfigError(f"{path} cannot be read as a trace: {exc}") from exc


def _steps(complete: Iterable[dict[str, Any]], began_us: float) -> list[Step]:
    steps = []
    for event in complete:
        if event.get("cat") != "user_annotation":
            continue
        label = _LABEL.fullmatch(str(event.get("name")))
        if label is None:
            continue
        start_us = float(event["ts"]) - began_us
        steps.append(
            Step(
                kind=label[1],
                sizes={key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", label[2])},
                host_start_us=start_us,
                host_end_us=start_us + float(event.get("dur", 0)),
                lane=_lane(event.get("tid")),
                external_id=event.get("args", {}).get("External id", -1),
            )
        )
    return steps


class _Finder:
    """Which of some steps the host was issuing at a time, on a thread."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._by_lane: dict[int, list[Step]] = {}
        for step in steps:
            self._by_lane.setdefault(step.lane, []).append(step)
        self._starts = {lane: [step.host_start_us for step in of_lane] for lane, of_lane in self._by_lane.items()}

    def find(self, lane: int, at_us: float) -> Step | None:
        starts = self._starts.get(lane)
        if starts is None:
            return None
        index = bisect.bisect_right(starts, at_us) - 1
        step = self._by_lane[lane][index] if index >= 0 else None
        return step if step is not None and at_us <= step.host_end_us else None


def _assign_device_work(
    device_work: Sequence[dict[str, Any]],
    complete: Sequence[dict[str, Any]],
    kinds: tuple[Sequence[Step], Sequence[Step]],
    began_us: float,
) -> list[Work]:
    launches: dict[int, tuple[int, float]] = {}
    for event in complete:
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {}):
            launches[event["args"]["correlation"]] = (_lane(event.get("tid")), float(event["ts"]) - began_us)
    finders = [_Finder(steps) for steps in kinds]
    covers = [_covers(complete, steps, began_us) for steps in kinds]
    everything = []
    for event in device_work:
        work = _work(event, began_us, lane=_lane(event.get("args", {}).get("stream", event.get("tid"))))
        everything.append(work)
        launch = launches.get(event.get("args", {}).get("correlation", -1))
        for finder, cover in zip(finders, covers):
            step = finder.find(*launch) if launch is not None else _covering(cover, work)
            if step is not None:
                step.work.append(work)
    return everything


def _covers(
    complete: Iterable[dict[str, Any]], steps: Sequence[Step], began_us: float
) -> list[tuple[float, float, Step]]:
    """The steps' labels on the GPU's timeline, in order."""
    by_id = {step.external_id: step for step in steps}
    covers = []
    for event in complete:
        step = by_id.get(event.get("args", {}).get("External id", -1))
        if step is not None and event.get("cat") == "gpu_user_annotation":
            start_us = float(event["ts"]) - began_us
            covers.append((start_us, start_us + float(event.get("dur", 0)), step))
    return sorted(covers, key=lambda cover: cover[0])


def _covering(covers: Sequence[tuple[float, float, Step]], work: Work) -> Step | None:
    index = bisect.bisect_right(covers, work.start_us, key=lambda cover: cover[0]) - 1
    if index < 0:
        return None
    _, end_us, step = covers[index]
    return step if work.start_us <= end_us else None


def _assign_ops(
    complete: Sequence[dict[str, Any]], kinds: tuple[Sequence[Step], Sequence[Step]], began_us: float
) -> list[Work]:
    """Pieces of time with the innermost op of each, on the threads that issue steps."""
    lanes = {step.lane for steps in kinds for step in steps}
    ops_by_lane: dict[int, list[Work]] = {lane: [] for lane in lanes}
    for event in complete:
        if event.get("cat") == "cpu_op" and _lane(event.get("tid")) in lanes:
            lane = _lane(event.get("tid"))
            ops_by_lane[lane].append(_work(event, began_us, lane=lane))
    finders = [_Finder(steps) for steps in kinds]
    everything = [piece for ops in ops_by_lane.values() for piece in _innermost(ops)]
    for piece in everything:
        for finder in finders:
            step = finder.find(piece.lane, piece.start_us)
            if step is not None:
                step.work.append(piece)
    return everything


def _innermost(ops: Iterable[Work]) -> list[Work]:
    """Nested ops as pieces that do not overlap. Every op has at least one, so that its calls are counted."""
    pieces: list[Work] = []
    open_ops: list[tuple[Work, float, int]] = []  # op, from where on its time is its own, pieces it has

    def cut(at_us: float) -> None:
        """The innermost open op's piece ends here."""
        op, since_us, num_pieces = open_ops[-1]
        if at_us > since_us or not num_pieces:
            pieces.append(Work(op.name, since_us, max(at_us, since_us), op.lane, num_calls=int(num_pieces == 0)))
            num_pieces += 1
        open_ops[-1] = (op, at_us, num_pieces)

    def close_until(at_us: float) -> None:
        while open_ops and open_ops[-1][0].end_us <= at_us:
            end_us = open_ops[-1][0].end_us
            cut(end_us)
            open_ops.pop()
            if open_ops:
                op, _, num_pieces = open_ops[-1]
                open_ops[-1] = (op, end_us, num_pieces)

    for op in sorted(ops, key=lambda op: (op.start_us, -op.end_us)):
        close_until(op.start_us)
        if open_ops:
            cut(op.start_us)
        open_ops.append((op, op.start_us, 0))
    close_until(float("inf"))
    return pieces


def _work(event: dict[str, Any], began_us: float, *, lane: int) -> Work:
    start_us = float(event["ts"]) - began_us
    return Work(str(event.get("name", "")), start_us, start_us + float(event.get("dur", 0)), lane)


def _lane(value: object) -> int:
    return value if isinstance(value, int) else int(value) if isinstance(value, str) and value.isdecimal() else 0
