"""What the ranks of a gang say, made into what one engine says: their offers and their reports.

Pure functions of messages; knows no transport, no tensor and no process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from atom_cluster.errors import ProtocolError
from atom_cluster.messages.grammars import GrammarReady
from atom_cluster.messages.profile import WindowWritten
from atom_cluster.messages.transfer import BlocksTagged, KvOffer, RankReport, ReadFinished, Report

_Key = tuple[str, int, int] | tuple[str, int] | int


def merge_offers(descriptors_by_rank: Sequence[Mapping[str, bytes]]) -> tuple[KvOffer, ...]:
    """Offers of a gang: the transports that every rank exports through, in rank 0's order of preference.

    Ranks on different hosts have different names for shared memory, so it drops out for them.
    """
    names = [name for name in descriptors_by_rank[0] if all(name in known for known in descriptors_by_rank)]
    return tuple(KvOffer(name, tuple(known[name] for known in descriptors_by_rank)) for name in names)


class ReportCombiner:
    """Merges the reports of all ranks on a command; gives the merged one out when the last rank has reported."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._pending: dict[_Key, dict[int, Report]] = {}

    def add(self, report: RankReport) -> Report | None:
        """The combined report if this was the last one missing, else None.

        Raises `ProtocolError` for a rank that does not exist or reports twice.
        """
        if not 0 <= report.rank < self._world_size:
            raise ProtocolError(f"report of rank {report.rank}; there are {self._world_size}")
        key = _key(report.report)
        reports = self._pending.setdefault(key, {})
        if report.rank in reports:
            raise ProtocolError(f"rank {report.rank} reported twice on {key}")
        reports[report.rank] = report.report
        if len(reports) < self._world_size:
            return None
        del self._pending[key]
        return _combine(reports)


def _key(report: Report) -> _Key:
    if isinstance(report, ReadFinished):
        return report.read_id
    if isinstance(report, WindowWritten):
        return ("window", report.window_id)
    if isinstance(report, GrammarReady):
        return ("grammar", report.grammar_id)
    return (report.ticket_id, report.group, report.first_block)


def _combine(reports: Mapping[int, Report]) -> Report:
    in_order = [reports[rank] for rank in sorted(reports)]
    first = in_order[0]
    if isinstance(first, BlocksTagged):
        tagged = [report.tags for report in in_order if isinstance(report, BlocksTagged)]
        # By reader: what it gets from the first rank, from the second one, and so on.
        tags = tuple(tuple(tag for part in parts for tag in part) for parts in zip(*tagged, strict=True))
        return BlocksTagged(ticket_id=first.ticket_id, first_block=first.first_block, tags=tags, group=first.group)
    if isinstance(first, WindowWritten):
        windows = {rank: report for rank, report in reports.items() if isinstance(report, WindowWritten)}
        return WindowWritten(
            window_id=first.window_id,
            files=tuple(file for rank in sorted(windows) for file in windows[rank].files),
            error=_errors(windows),
        )
    if isinstance(first, GrammarReady):
        ready = [report for report in in_order if isinstance(report, GrammarReady)]
        # All ranks compile the same text within the same limits, so that what one says is what all would say.
        error = next((report.error for report in ready if report.error is not None), None)
        return GrammarReady(grammar_id=first.grammar_id, error=error)
    reads = {rank: report for rank, report in reports.items() if isinstance(report, ReadFinished)}
    return ReadFinished(
        read_id=first.read_id,
        bad_blocks=tuple(sorted({index for read in reads.values() for index in read.bad_blocks})),
        error=_errors(reads),
        num_bytes=sum(read.num_bytes for read in reads.values()),
        seconds=max(read.seconds for read in reads.values()),
        transport=reads[min(reads)].transport,
    )


def _errors(reports: Mapping[int, ReadFinished] | Mapping[int, WindowWritten]) -> str | None:
    errors = [f"rank {rank}: {reports[rank].error}" for rank in sorted(reports) if reports[rank].error is not None]
    return "; ".join(errors) or None
