"""One safetensors file: its header, and reads of its bytes. Knows no other files and no models.

Format: the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape and offsets into what
follows), then the tensors' bytes, row-major. Bytes are read with `preadv`, not mapped: pages of a map count as memory
of the process that looks at them (docs/decisions/0007-checkpoints-are-read-not-mapped.md).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atom_cluster.errors import WeightsError

PLAIN_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes that are converted into one another while loading, as the format spells them."""

DTYPES = PLAIN_FLOATS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""All dtypes that can be loaded."""

_MAX_HEADER_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file."""

    dtype_name: str
    """As the format spells it; it may be none of `DTYPES`."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""


class SafetensorsFile:
    """An open file. Threads may share it."""

    def __init__(self, path: Path) -> None:
        """Raises WeightsError, naming the file, when it is absent or damaged."""
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as exc:
            raise WeightsError(f"no checkpoint file {path}") from exc
        except OSError as exc:
            raise WeightsError(f"{path} cannot be read: {exc}") from exc
        try:
            self.num_bytes = os.fstat(self._descriptor).st_size
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """No reads after this."""
        os.close(self._descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the file's bytes from `offset`. Raises WeightsError when there are not as many."""
        while buffer:
            try:
                num_read = os.preadv(self._descriptor, [buffer], offset)
            except OSError as exc:
                raise WeightsError(f"{self.path} cannot be read at byte {offset}: {exc}") from exc
            if num_read == 0:
                raise WeightsError(f"{self.path} is damaged: it ends at byte {offset}")
            buffer, offset = buffer[num_read:], offset + num_read

    def _read_header(self) -> dict[str, TensorEntry]:
        try:
            num_header_bytes = int.from_bytes(self._read(8, 0), "little")
            if num_header_bytes > min(self.num_bytes, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {num_header_bytes} bytes in a file of {self.num_bytes}")
            header = json.loads(self._read(num_header_bytes, 8))
            header.pop("__metadata__", None)
            start = 8 + num_header_bytes
            return {name: self._entry(name, fields, start) for name, fields in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise WeightsError(f"{self.path} is damaged: {exc!r}") from exc

    def _entry(self, name: str, fields: Any, start: int) -> TensorEntry:
        """Raises ValueError, or what wrong types bring about, for an entry that cannot be."""
        first, stop = (int(offset) for offset in fields["data_offsets"])
        shape = tuple(int(size) for size in fields["shape"])
        entry = TensorEntry(dtype_name=str(fields["dtype"]), shape=shape, offset=start + first)
        dtype = DTYPES.get(entry.dtype_name)
        is_possible = min(shape, default=0) >= 0 and 0 <= first <= stop
        if not is_possible or (dtype is not None and stop - first != math.prod(shape) * dtype.itemsize):
            raise ValueError(f"bytes {first} to {stop} are no {entry.dtype_name} of shape {list(shape)}: {name}")
        if start + stop > self.num_bytes:
            raise ValueError(f"it has {self.num_bytes} bytes, {name} ends at byte {start + stop}")
        return entry

    def _read(self, num_bytes: int, offset: int) -> bytes:
        buffer = bytearray(num_bytes)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)
