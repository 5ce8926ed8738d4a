"""What a request holds of each cache group, and the rules by which pages of each kind come and go. Ids, no tensors.

A group (`FullGroup`, `WindowGroup`, `StateGroup`) has a pool of pages, which may be kept for reuse under the prefix
that they end; what one request holds of it are `ColumnPages` or `StatePages`:

- full: a page per column of `block_size` positions
- window: the same, but pages that no later token sees go back, and their columns are left without one
- state: pages that states are written to, and some that are only read. A *checkpoint* is the state at a block boundary:
  the step that reaches the boundary writes it, the next one reads it and writes elsewhere

A page that a step reads is held until that step has run, so whoever gets it next writes in a later plan. Knows nothing
of requests, steps and hashes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from atom_cluster.kv_cache.block_pool import BlockPool, Holder, Prefix
from atom_cluster.kv_cache.layout import PageGroup
from atom_cluster.units import ceil_div

NO_PAGE = 0
"""Stands for a column without page where ids are told; it is not read."""


class GroupPages(ABC):
    """What one request holds of a group."""

    @abstractmethod
    def held(self) -> Sequence[int]:
        """Every page held."""

    @abstractmethod
    def at_entry(self) -> tuple[int, ...]:
        """What a runner is told when the request enters a row (`NewRow.pages`)."""

    @abstractmethod
    def missing(self, num_tokens: int) -> int:
        """Pages lacking to compute the tokens up to so many."""

    @abstractmethod
    def extend(self, num_missing: int, holder: Holder) -> tuple[int, ...]:
        """Take what `missing` counted, which must be there; what the runner is told of it (`RowStep.new_pages`)."""

    @abstractmethod
    def adopt(self, prefixes: Sequence[Prefix], holder: Holder) -> None:
        """Hold the cached pages that tokens behind these prefixes need, as `PageGroupPool.longest` found them."""

    @abstractmethod
    def keep(self, column: int, prefix: Prefix) -> None:
        """The column's tokens are computed: others may use what is held of it."""

    @abstractmethod
    def settle(self, num_confirmed: int, holder: Holder) -> None:
        """Give back what is of no use to tokens from `num_confirmed` on."""

    @abstractmethod
    def receive(self, num_tokens: int, holder: Holder) -> None:
        """Take pages, which must be there, for what tokens behind so many need and another engine computes."""

    @abstractmethod
    def handed_over(self, columns: range) -> tuple[int, ...]:
        """Pages of columns, on either side of a transfer."""


class PageGroupPool(ABC):
    """A group's pages on one device."""

    max_chunk: int | None = None
    """Most tokens that one request alone can compute in a step; None: any number."""

    def __init__(self, name: str, num_pages: int) -> None:
        self.name = name
        self.pool = BlockPool(num_pages)

    @abstractmethod
    def new_pages(self, num_prompt: int) -> GroupPages:
        """Nothing yet, for a request with so many tokens at first."""

    def longest(self, prefixes: Sequence[Prefix], num_blocks: int) -> int:
        """Most leading blocks, up to `num_blocks`, for which tokens behind them find what they need in the cache.

        `prefixes` end with blocks that the first group has cached.
        """
        return num_blocks

    @abstractmethod
    def columns_behind(self, num_tokens: int, block_size: int | None = None) -> range:
        """Columns that tokens behind so many need, in blocks of this group's or of another size."""

    @abstractmethod
    def columns_with(self, columns: range, block_size: int) -> range:
        """Columns that share tokens with these of blocks of another size."""

    def find(self, prefix: Prefix) -> int | None:
        """The cached page that ends this prefix."""
        found = self.pool.find(prefix.hash, prefix.tokens, prefix.parent)
        return None if found is None else found[0]

    def take(self, num_pages: int, holder: Holder) -> list[int]:
        """Acquire pages that are known to be there."""
        taken = self.pool.acquire(num_pages, holder)
        if taken is None:
            raise AssertionError(f"{num_pages} pages of group {self.name} were there, and are gone")
        return taken


class ColumnPages(GroupPages):
    """Pages of a full or window group."""

    __slots__ = ("_group", "num_absent", "page_ids")

    def __init__(self, group: ColumnGroup) -> None:
        self._group = group
        self.page_ids: list[int] = []
        """By column; `NO_PAGE` in the first `num_absent`."""
        self.num_absent = 0

    def held(self) -> Sequence[int]:
        """Every page held."""
        return self.page_ids[self.num_absent :]

    def at_entry(self) -> tuple[int, ...]:
        """All columns."""
        return tuple(self.page_ids)

    def missing(self, num_tokens: int) -> int:
        """Columns lacking."""
        return max(0, ceil_div(num_tokens, self._group.block_size) - len(self.page_ids))

    def extend(self, num_missing: int, holder: Holder) -> tuple[int, ...]:
        """New columns."""
        if not num_missing:
            return ()
        new = self._group.take(num_missing, holder)
        self.page_ids.extend(new)
        return tuple(new)

    def adopt(self, prefixes: Sequence[Prefix], holder: Holder) -> None:
        """Share the cached pages of the columns that are needed."""
        columns = self._group.columns_behind(len(prefixes) * self._group.block_size)
        self._leave_out(columns.start)
        for column in columns:
            page = self._group.find(prefixes[column])
            if page is None:
                raise AssertionError(f"a page of group {self._group.name} was cached, and is gone")
            self._group.pool.share(page, holder)
            self.page_ids.append(page)

    def keep(self, column: int, prefix: Prefix) -> None:
        """Cache the column's page, unless there is none."""
        if column >= self.num_absent:
            self._group.pool.cache(self.page_ids[column], prefix)

    def settle(self, num_confirmed: int, holder: Holder) -> None:
        """Give back the columns behind the window."""
        first = min(self._group.columns_behind(num_confirmed).start, len(self.page_ids))
        if first > self.num_absent:
            self._group.pool.release(self.page_ids[self.num_absent : first], holder)
            self.page_ids[self.num_absent : first] = [NO_PAGE] * (first - self.num_absent)
            self.num_absent = first

    def receive(self, num_tokens: int, holder: Holder) -> None:
        """Columns up to the end, but for those that are here or not needed."""
        if not self.page_ids:
            self._leave_out(self._group.columns_behind(num_tokens).start)
        self.extend(self.missing(num_tokens), holder)

    def handed_over(self, columns: range) -> tuple[int, ...]:
        """Pages of columns."""
        return tuple(self.page_ids[columns.start : columns.stop])

    def _leave_out(self, num_columns: int) -> None:
        self.num_absent = num_columns
        self.page_ids = [NO_PAGE] * num_columns


class ColumnGroup(PageGroupPool):
    """What full and window groups have in common."""

    def __init__(self, name: str, num_pages: int, block_size: int) -> None:
        super().__init__(name, num_pages)
        self.block_size = block_size

    def new_pages(self, num_prompt: int) -> ColumnPages:
        """No columns."""
        return ColumnPages(self)

    def columns_with(self, columns: range, block_size: int) -> range:
        """By position."""
        first, end = columns.start * block_size, columns.stop * block_size
        return range(first // self.block_size, ceil_div(end, self.block_size))


class FullGroup(ColumnGroup):
    """Every token sees all before it. The first group of every model."""

    def __init__(self, num_pages: int, *, block_size: int) -> None:
        super().__init__("full", num_pages, block_size)

    def columns_behind(self, num_tokens: int, block_size: int | None = None) -> range:
        """All."""
        return range(ceil_div(num_tokens, block_size or self.block_size))


class WindowGroup(ColumnGroup):
    """A token sees `window` positions, its own included."""

    def __init__(self, num_pages: int, *, block_size: int, window: int, lookahead: int) -> None:
        """`lookahead`: positions behind the computed ones that a step may write to."""
        super().__init__(f"window {window}", num_pages, block_size)
        self._window = window
        # So many positions fit into the pages wherever they begin, of which a step needs window - 1 before its own.
        self.max_chunk = (num_pages - 1) * block_size + 1 - (window - 1) - lookahead

    def longest(self, prefixes: Sequence[Prefix], num_blocks: int) -> int:
        """As far as the columns of the window before it are there."""
        column = num_blocks
        while column > self.columns_behind(num_blocks * self.block_size).start:
            column -= 1
            if self.find(prefixes[column]) is None:
                num_blocks = column
        return num_blocks

    def columns_behind(self, num_tokens: int, block_size: int | None = None) -> range:
        """The window's."""
        block_size = block_size or self.block_size
        end = ceil_div(num_tokens, block_size)
        return range(min(end, max(0, num_tokens - self._window + 1) // block_size), end)


class StatePages(GroupPages):
    """Pages of a state group."""

    __slots__ = ("_group", "_newest_output", "_num_prompt", "_successor", "_successor_at", "kept", "written")

    def __init__(self, group: StateGroup, num_prompt: int) -> None:
        self._group = group
        self._num_prompt = num_prompt
        self.written: list[int] = []
        """Where the row's states go: to the first, or, of a row with drafts, the state after its i-th token to the
        i-th."""
        self.kept: list[tuple[int, int]] = []
        """(number of tokens, page): states that are only read, in order."""
        self._successor: int | None = None
        """Takes the place of `written[0]` with the next step: that one is the checkpoint of `_successor_at` tokens."""
        self._successor_at = 0
        self._newest_output: tuple[int, Prefix] | None = None

    def held(self) -> Sequence[int]:
        """Every page held."""
        successor = () if self._successor is None else (self._successor,)
        return [*self.written, *successor, *(page for _, page in self.kept)]

    def at_entry(self) -> tuple[int, ...]:
        """The state to begin with, if there is one."""
        return tuple(page for _, page in self.kept)

    def missing(self, num_tokens: int) -> int:
        """Pages to write to, at first."""
        return 0 if self.written else self._group.num_written

    def extend(self, num_missing: int, holder: Holder) -> tuple[int, ...]:
        """The pages to write to, if they change with the next step."""
        if num_missing:
            self.written = self._group.take(num_missing, holder)
        elif self._successor is not None:
            self.kept.append((self._successor_at, self.written[0]))
            self.written[0], self._successor = self._successor, None
        else:
            return ()
        return tuple(self.written)

    def plan_checkpoint(self, num_tokens: int, holder: Holder) -> None:
        """A step is planned that ends after so many tokens: keep the state there, if a page is left to go on with."""
        is_output = num_tokens > self._num_prompt
        # With drafts nobody knows at the time of planning which page has the state behind the last one kept.
        if num_tokens % self._group.block_size or (is_output and self._group.num_written > 1):
            return
        taken = self._group.pool.acquire(1, holder)
        if taken is not None:
            (self._successor,), self._successor_at = taken, num_tokens

    def adopt(self, prefixes: Sequence[Prefix], holder: Holder) -> None:
        """Share the checkpoint."""
        page = self._group.find(prefixes[-1]) if prefixes else None
        if page is not None:
            self._group.pool.share(page, holder)
            self.kept = [(len(prefixes) * self._group.block_size, page)]

    def keep(self, column: int, prefix: Prefix) -> None:
        """Cache the checkpoint at the column's end, if one is held. Of the output only the newest one stays."""
        num_tokens = (column + 1) * self._group.block_size
        page = self._state_at(num_tokens)
        if page is None:
            return
        self._group.pool.cache(page, prefix)
        if num_tokens > self._num_prompt:
            if self._newest_output is not None:
                self._group.pool.forget_idle(*self._newest_output)
            self._newest_output = (page, prefix)

    def _state_at(self, num_tokens: int) -> int | None:
        if self._successor is not None and self._successor_at == num_tokens:
            return self.written[0]
        return next((page for at, page in self.kept if at == num_tokens), None)

    def settle(self, num_confirmed: int, holder: Holder) -> None:
        """Give back states that have been read."""
        if self.kept and self.kept[0][0] < num_confirmed:
            self._group.pool.release([page for at, page in self.kept if at < num_confirmed], holder)
            self.kept = [entry for entry in self.kept if entry[0] >= num_confirmed]

    def receive(self, num_tokens: int, holder: Holder) -> None:
        """A page for the state."""
        (page,) = self._group.take(1, holder)
        self.kept = [(num_tokens, page)]

    def handed_over(self, columns: range) -> tuple[int, ...]:
        """The state: the one received, or the one written last."""
        return tuple(page for _, page in self.kept) or tuple(self.written[:1])

    def trim(self, holder: Holder) -> None:
        """Nothing more is computed: keep only the state."""
        successor = [] if self._successor is None else [self._successor]
        self._group.pool.release([*self.written[1:], *successor], holder)
        del self.written[1:]
        self._successor = None


class StateGroup(PageGroupPool):
    """Every token rewrites the state."""

    def __init__(self, num_pages: int, *, block_size: int, num_written: int) -> None:
        """`num_written`: pages that a row writes to, one more than it may have drafts."""
        super().__init__("state", num_pages)
        self.block_size = block_size
        self.num_written = num_written

    def new_pages(self, num_prompt: int) -> StatePages:
        """No state."""
        return StatePages(self, num_prompt)

    def longest(self, prefixes: Sequence[Prefix], num_blocks: int) -> int:
        """Up to the last checkpoint."""
        return next((n for n in range(num_blocks, 0, -1) if self.find(prefixes[n - 1]) is not None), 0)

    def columns_behind(self, num_tokens: int, block_size: int | None = None) -> range:
        """The state counts as column 0."""
        return range(1)

    def columns_with(self, columns: range, block_size: int) -> range:
        """The same: a state is one whatever the size of blocks."""
        return columns


def make_group(group: PageGroup, *, block_size: int, max_drafts: int, lookahead: int) -> PageGroupPool:
    """The pool of a group other than the first. See `WindowGroup` and `StateGroup`."""
    if group.window is not None:
        return WindowGroup(group.num_pages, block_size=block_size, window=group.window, lookahead=lookahead)
    return StateGroup(group.num_pages, block_size=block_size, num_written=1 + max_drafts)
