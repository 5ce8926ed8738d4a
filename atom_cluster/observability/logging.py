"""Logs: one line per record, with the fields that say which replica, rank and request it is about.

For people:

    2026-01-02 03:04:05.678 INFO engine.core: preempted, 3 blocks short [replica=decode-1 request_id=cmpl-7]

For machines, one JSON object per line, with the same fields beside `time` (UTC), `level`, `logger`, `message`, and
`exception` where there is one.

Only the `atom_cluster` logger is configured, never the root logger, which belongs to the program around us. Knows
nothing of Ray, of files or of who reads the lines.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, MutableMapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter

LogFormat = Literal["text", "json"]
Value = str | int | float

ROOT_LOGGER = "atom_cluster"
_FIELDS_ATTRIBUTE = "atom_fields"


class FieldLogger(_Adapter):
    """A logger whose records all carry the same fields; `bind` adds more for a narrower scope."""

    def __init__(self, logger: logging.Logger, fields: Mapping[str, Value]) -> None:
        super().__init__(logger, {})
        self.fields = dict(fields)

    def bind(self, **fields: Value) -> FieldLogger:
        """A logger with these fields on top of its own; the same name gets the new value."""
        return FieldLogger(self.logger, {**self.fields, **fields})

    def process(self, msg: object, kwargs: MutableMapping[str, object]) -> tuple[object, MutableMapping[str, object]]:
        """Attach the fields to the record, beside any `extra` of the call."""
        extra = kwargs.get("extra")
        kwargs["extra"] = {**(extra if isinstance(extra, Mapping) else {}), _FIELDS_ATTRIBUTE: self.fields}
        return msg, kwargs


class _FieldFormatter(logging.Formatter):
    """Knows the fields of the process."""

    def __init__(self, process_fields: Mapping[str, Value]) -> None:
        super().__init__()
        self._process_fields = dict(process_fields)

    def fields_of(self, record: logging.LogRecord) -> dict[str, Value]:
        """Of the process, then of the logger that wrote it."""
        return {**self._process_fields, **getattr(record, _FIELDS_ATTRIBUTE, {})}


class LineFormatter(_FieldFormatter):
    """One line: time, level, module without the package, message, fields. Tracebacks follow on their own lines."""

    default_msec_format = "%s.%03d"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (the name of the standard library)
        """The line without traceback."""
        line = f"{self.formatTime(record)} {record.levelname} {_module(record)}: {record.message}"
        fields = self.fields_of(record)
        if not fields:
            return line
        return f"{line} [{' '.join(f'{key}={value}' for key, value in fields.items())}]"

    def usesTime(self) -> bool:  # noqa: N802  (the name of the standard library)
        """Always: the line starts with it."""
        return True


class JsonFormatter(_FieldFormatter):
    """One JSON object on one line, whatever is in the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with the traceback in `exception`."""
        entry: dict[str, Value] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": _module(record),
            "message": record.getMessage(),
        }
        # What a line says of itself comes first: no field may pass for it.
        entry.update({name: value for name, value in self.fields_of(record).items() if name not in entry})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        # ASCII only, so that no character of a message ends the line or cannot be written.
        return json.dumps(entry)


_FORMATTERS: dict[LogFormat, type[_FieldFormatter]] = {"text": LineFormatter, "json": JsonFormatter}


def get_logger(module: str, **fields: Value) -> FieldLogger:
    """Logger of a module (`__name__`) with fixed fields, such as `rank=2`."""
    return FieldLogger(logging.getLogger(module), fields)


def setup_logging(
    level: str, log_format: LogFormat = "text", *, stream: TextIO | None = None, **process_fields: Value
) -> None:
    """Write the library's records of at least `level` to `stream` (standard error when None).

    `process_fields` (replica, role, rank) are part of every line of this process. Calling it again replaces what the
    first call set up. Raises `ValueError` for an unknown level.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_FORMATTERS[log_format](process_fields))
    logger = logging.getLogger(ROOT_LOGGER)
    logger.setLevel(level)
    for old in [old for old in logger.handlers if isinstance(old.formatter, _FieldFormatter)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.propagate = False


def _module(record: logging.LogRecord) -> str:
    return record.name.removeprefix(f"{ROOT_LOGGER}.")
