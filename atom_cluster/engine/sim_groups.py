"""Windows and states of a row on a device that does not exist, beside the blocks that decide its tokens (`sim_memory`).

A slot of a window, or a state, holds a number that follows from the row's digest after that position. A step looks at
all that it would read; whatever is not what the row's own blocks say spoils the row's digest, and so its tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from atom_cluster.engine.sim_memory import KvView, SimulatedMemory, mix
from atom_cluster.errors import ProtocolError
from atom_cluster.kv_cache.layout import PageGroup


class GroupView(ABC):
    """One row's pages of a group other than the first."""

    def __init__(self, memory: SimulatedMemory, group: int) -> None:
        self._memory = memory
        self._group = group
        self.page_ids: list[int] = []

    def extend(self, page_ids: Sequence[int]) -> None:
        """Take new pages into the table. Raises ProtocolError for one that does not exist."""
        for page_id in page_ids:
            self._memory.check_page(self._group, page_id)
        self._add(page_ids)

    @abstractmethod
    def enter(self, page_ids: Sequence[int]) -> None:
        """Pages that the row enters with."""

    @abstractmethod
    def read(self, view: KvView, start: int) -> None:
        """Look at what a step from `start` on needs."""

    @abstractmethod
    def write(self, view: KvView, start: int, end: int, num_drafts: int) -> None:
        """Leave what a step has computed."""

    @abstractmethod
    def _add(self, page_ids: Sequence[int]) -> None: ...

    def check_room(self, num_tokens: int) -> None:  # noqa: B027 - a state has no room
        """Raise ProtocolError if there are pages for fewer tokens."""

    def keep(self, num_drafts: int) -> None:  # noqa: B027 - a window keeps everything
        """So many of the step's drafts were right."""

    @abstractmethod
    def pages_read(self, start: int) -> set[int]:
        """Pages that no other row may write in a step in which this one begins at `start`."""

    @abstractmethod
    def pages_written(self, start: int, end: int) -> set[int]:
        """Pages that no other row may touch in a step in which this one computes these positions."""

    def _expected(self, view: KvView, position: int) -> int:
        return mix(view.digests[position], self._group)

    def _compare(self, view: KvView, position: int, page_id: int, slot: int) -> None:
        slots = self._memory.content(page_id, self._group).slots
        found = slots[slot] if slot < len(slots) else 0
        if found != self._expected(view, position):
            view.spoil(found)


class WindowView(GroupView):
    """Columns of a window group."""

    def __init__(self, memory: SimulatedMemory, group: int, window: int) -> None:
        super().__init__(memory, group)
        self._window = window

    def enter(self, page_ids: Sequence[int]) -> None:
        """All columns, some of which may be gone already."""
        self.extend(page_ids)

    def _add(self, page_ids: Sequence[int]) -> None:
        self.page_ids += page_ids

    def check_room(self, num_tokens: int) -> None:
        """Columns up to there."""
        if num_tokens > len(self.page_ids) * self._memory.block_size:
            raise ProtocolError(f"a row has {len(self.page_ids)} columns of a window for {num_tokens} tokens")

    def pages_read(self, start: int) -> set[int]:
        """Those of the window before `start`."""
        return self._pages(max(0, start - self._window + 1), start)

    def pages_written(self, start: int, end: int) -> set[int]:
        """Those of the positions."""
        return self._pages(start, end)

    def _pages(self, start: int, end: int) -> set[int]:
        return {self.page_ids[at // self._memory.block_size] for at in range(start, end)}

    def read(self, view: KvView, start: int) -> None:
        """The positions before `start` that it sees."""
        for at in range(max(0, start - self._window + 1), start):
            column, slot = divmod(at, self._memory.block_size)
            self._compare(view, at, self.page_ids[column], slot)

    def write(self, view: KvView, start: int, end: int, num_drafts: int) -> None:
        """All positions."""
        for at in range(start, end):
            column, slot = divmod(at, self._memory.block_size)
            self._memory.put(self.page_ids[column], self._group, slot, self._expected(view, at))


class StateView(GroupView):
    """The pages that states are written to, and the one that holds the newest."""

    def __init__(self, memory: SimulatedMemory, group: int, num_written: int) -> None:
        super().__init__(memory, group)
        self._num_written = num_written
        self._newest: int | None = None

    def enter(self, page_ids: Sequence[int]) -> None:
        """The state to begin with, if any."""
        for page_id in page_ids:
            self._memory.check_page(self._group, page_id)
            self._newest = page_id

    def _add(self, page_ids: Sequence[int]) -> None:
        if not page_ids:
            return
        if len(page_ids) != self._num_written:
            raise ProtocolError(f"a row got {len(page_ids)} pages to write states to; it needs {self._num_written}")
        self.page_ids = list(page_ids)

    def read(self, view: KvView, start: int) -> None:
        """The state before `start`."""
        if start and self._newest is None:
            raise ProtocolError(f"a row goes on at position {start} without a state")
        if start and self._newest is not None:
            self._compare(view, start - 1, self._newest, 0)

    def write(self, view: KvView, start: int, end: int, num_drafts: int) -> None:
        """The last state, or all of them while drafts are verified."""
        if not self.page_ids:
            raise ProtocolError("a row has no page to write its state to")
        self._newest = self.page_ids[0]
        for page_id, at in zip(self.page_ids, range(end - 1 - num_drafts, end)):
            self._memory.put(page_id, self._group, 0, self._expected(view, at))

    def keep(self, num_drafts: int) -> None:
        """The newest state is the one behind them."""
        self._newest = self.page_ids[num_drafts]

    def pages_read(self, start: int) -> set[int]:
        """The state before `start`."""
        return {self._newest} if start and self._newest is not None else set()

    def pages_written(self, start: int, end: int) -> set[int]:
        """Where states go."""
        return set(self.page_ids)


def make_views(memory: SimulatedMemory, groups: Sequence[PageGroup], max_drafts: int) -> list[GroupView]:
    """Views of a new row."""
    return [
        StateView(memory, index, 1 + max_drafts) if group.window is None else WindowView(memory, index, group.window)
        for index, group in enumerate(groups, 1)
    ]


def check_nobody_interferes(touched: Sequence[tuple[int, set[int], set[int]]]) -> None:
    """(group, pages read, pages written) of each row of a step: no row may touch what another one writes."""
    for i, (group, _, written) in enumerate(touched):
        for j, (other_group, other_read, other_written) in enumerate(touched):
            shared = written & (other_read | other_written)
            if i != j and group == other_group and shared:
                raise ProtocolError(f"pages {sorted(shared)} of group {group} are used by two rows of a step")
