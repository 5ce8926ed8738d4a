"""Logs for people: one line per record, with the fields that say which replica, rank and request it is about.

    2026-01-02 03:04:05.678 INFO engine.core: preempted, 3 blocks short [replica=decode-1 request_id=cmpl-7]

Only the `atom_cluster` logger is configured, never the root logger, which belongs to the program around us. Knows
nothing of Ray, of files or of who reads the lines.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter

ROOT_LOGGER = "atom_cluster"
_FIELDS_ATTRIBUTE = "atom_fields"


class FieldLogger(_Adapter):
    """A logger whose records all carry the same fields; `bind` adds more for a narrower scope."""

    def __init__(self, logger: logging.Logger, fields: Mapping[str, str | int]) -> None:
        super().__init__(logger, {})
        self.fields = dict(fields)

    def bind(self, **fields: str | int) -> FieldLogger:
        """A logger with these fields on top of its own; the same name gets the new value."""
        return FieldLogger(self.logger, {**self.fields, **fields})

    def process(self, msg: object, kwargs: MutableMapping[str, object]) -> tuple[object, MutableMapping[str, object]]:
        """Attach the fields to the record, beside any `extra` of the call."""
        extra = kwargs.get("extra")
        kwargs["extra"] = {**(extra if isinstance(extra, Mapping) else {}), _FIELDS_ATTRIBUTE: self.fields}
        return msg, kwargs


class LineFormatter(logging.Formatter):
    """One line: time, level, module without the package, message, fields. Tracebacks follow on their own lines."""

    default_msec_format = "%s.%03d"

    def __init__(self, process_fields: Mapping[str, str | int]) -> None:
        super().__init__()
        self._process_fields = dict(process_fields)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (the name of the standard library)
        """The line without traceback."""
        name = record.name.removeprefix(f"{ROOT_LOGGER}.")
        line = f"{self.formatTime(record)} {record.levelname} {name}: {record.message}"
        fields = {**self._process_fields, **getattr(record, _FIELDS_ATTRIBUTE, {})}
        if not fields:
            return line
        return f"{line} [{' '.join(f'{key}={value}' for key, value in fields.items())}]"

    def usesTime(self) -> bool:  # noqa: N802  (the name of the standard library)
        """Always: the line starts with it."""
        return True


def get_logger(module: str, **fields: str | int) -> FieldLogger:
    """Logger of a module (`__name__`) with fixed fields, such as `rank=2`."""
    return FieldLogger(logging.getLogger(module), fields)


def setup_logging(level: str, *, stream: TextIO | None = None, **process_fields: str | int) -> None:
    """Write the library's records of at least `level` to `stream` (standard error when None).

    `process_fields` (replica, role, rank) are part of every line of this process. Calling it again replaces what the
    first call set up. Raises `ValueError` for an unknown level.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(process_fields))
    logger = logging.getLogger(ROOT_LOGGER)
    logger.setLevel(level)
    for old in [old for old in logger.handlers if isinstance(old.formatter, LineFormatter)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.propagate = False
