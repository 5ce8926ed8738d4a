"""Which pages each row holds, per cache group, on the device; for states, on the host too, which decides about them.

On CPUs both are the same memory, and untouched rows cost nothing. Knows no tokens, no models and no scheduling.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from atom_cluster.errors import ProtocolError
from atom_cluster.runner.host_tensors import on_device, send
from atom_cluster.units import align_up

_LINE = 16


def whole_lines(num_columns: int) -> int:
    """No fewer columns, such that each line begins at a multiple of 64 bytes: kernels are compiled for that alone."""
    return align_up(num_columns, _LINE)


class PageTable:
    """Pages of a group of kind full or window: column i of a row holds its i-th block of positions."""

    def __init__(self, *, num_rows: int, num_columns: int, spare_page: int, device: torch.device) -> None:
        """spare_page: where a row has no page; a page that nobody reads, so that writing to it does no harm."""
        self._device = device
        self._spare_page = spare_page
        self._most_pages = num_columns
        self._host = torch.full((num_rows, whole_lines(num_columns)), spare_page, dtype=torch.int32)
        self.device = self._host.to(device)
        """[num_rows, whole lines] int32 on the device, after `flush`."""
        self._num_pages = [0] * num_rows
        self._grown: list[tuple[int, int, int]] = []

    def fill(self, row: int, pages: tuple[int, ...]) -> None:
        """The row begins with these pages."""
        self._host[row] = self._spare_page
        self._num_pages[row] = 0
        self._append(row, pages)
        if self._device.type != "cpu":
            self.device[row] = send(self._host[row].clone(), self._device)

    def extend(self, row: int, pages: tuple[int, ...]) -> None:
        """Further pages of the row. The device sees them after `flush`."""
        first = self._num_pages[row]
        self._append(row, pages)
        self._grown += [(row, first + i, page) for i, page in enumerate(pages)]

    def flush(self) -> None:
        """Bring the device up to date, in one copy."""
        if self._grown and self._device.type != "cpu":
            index = on_device(self._grown, torch.int32, self._device).unbind(1)
            self.device.index_put_((index[0], index[1]), index[2])
        self._grown = []

    def _append(self, row: int, pages: tuple[int, ...]) -> None:
        first, last = self._num_pages[row], self._num_pages[row] + len(pages)
        if last > self._most_pages:
            raise ProtocolError(f"row {row} was given {last} blocks, more than its context needs")
        self._host.numpy()[row, first:last] = pages
        self._num_pages[row] = last


class StateTable:
    """Pages of the state group: those that a row's steps write to, and the one that holds its newest state."""

    def __init__(self, *, num_rows: int, pages_per_row: int, spare_page: int, device: torch.device) -> None:
        """spare_page: where states of rows go that stand for none."""
        self.spare_page = spare_page
        self.written: npt.NDArray[np.int64] = np.full((num_rows, pages_per_row), -1)
        """[num_rows, pages_per_row]: where steps leave states; -1 before the row's first step."""
        self.newest = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
        """[num_rows] on the device: the page with the state after the row's tokens so far; -1 before its first."""

    def fill(self, row: int, pages: tuple[int, ...]) -> None:
        """The row begins with the state in this page, which it only reads, or without one."""
        if len(pages) > 1:
            raise ProtocolError(f"row {row} begins with {len(pages)} states; it can read one")
        self.written[row] = -1
        self.newest[row : row + 1].fill_(pages[0] if pages else -1)  # an assigned number would be waited for

    def replace(self, row: int, pages: tuple[int, ...]) -> None:
        """Write to these pages from now on, instead of those until now."""
        if not pages:
            return
        if len(pages) != self.written.shape[1]:
            raise ProtocolError(f"row {row} was given {len(pages)} pages for states, not {self.written.shape[1]}")
        self.written[row] = pages
