"""Log lines: fields of process, logger and call; only our own logger is touched."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from atom_cluster.observability.logging import ROOT_LOGGER, get_logger, setup_logging


@pytest.fixture(autouse=True)
def _restore_logger() -> Iterator[None]:
    logger = logging.getLogger(ROOT_LOGGER)
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]


def test_a_line_has_time_level_module_message_and_fields() -> None:
    stream = io.StringIO()
    setup_logging("INFO", stream=stream, replica="decode-1", rank=0)
    get_logger("atom_cluster.engine.core").bind(request_id="cmpl-7").info("preempted, %d blocks short", 3)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO engine\.core: preempted, 3 blocks short "
        r"\[replica=decode-1 rank=0 request_id=cmpl-7\]\n",
        stream.getvalue(),
    )


def test_the_narrower_scope_wins_and_does_not_leak_out() -> None:
    stream = io.StringIO()
    setup_logging("INFO", stream=stream)
    logger = get_logger("atom_cluster.x", rank=0)
    logger.bind(rank=1).info("inner")
    logger.info("outer")
    inner, outer = stream.getvalue().splitlines()
    assert inner.endswith("inner [rank=1]")
    assert outer.endswith("outer [rank=0]")


def test_level_traceback_and_second_setup() -> None:
    first, second = io.StringIO(), io.StringIO()
    setup_logging("INFO", stream=first)
    setup_logging("WARNING", stream=second)
    logger = get_logger("atom_cluster.x")
    logger.info("quiet")
    try:
        raise RuntimeError("reason")
    except RuntimeError:
        logger.exception("failed")
    assert first.getvalue() == ""
    assert "quiet" not in second.getvalue()
    assert second.getvalue().rstrip().endswith("RuntimeError: reason")


def test_lines_for_machines_are_one_json_object_each_whatever_is_in_them() -> None:
    stream = io.StringIO()
    setup_logging("INFO", "json", stream=stream, replica="decode-1", rank=0)
    logger = get_logger("atom_cluster.engine.core").bind(request_id="cmpl-7", message="not the message", share=0.5)
    logger.info('a "quote",\na line and %s', "\u2028 \ud83d\ude00")
    try:
        raise RuntimeError("reason")
    except RuntimeError:
        logger.exception("failed")
    first, second = map(json.loads, stream.getvalue().rstrip("\n").split("\n"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first == {
        "level": "INFO",
        "logger": "engine.core",
        "message": 'a "quote",\na line and \u2028 \U0001f600',
        "replica": "decode-1",
        "rank": 0,
        "request_id": "cmpl-7",
        "share": 0.5,
    }
    assert second["exception"].endswith("RuntimeError: reason")


def test_a_text_log_replaces_a_json_log() -> None:
    stream = io.StringIO()
    setup_logging("INFO", "json", stream=stream)
    setup_logging("INFO", "text", stream=stream)
    get_logger("atom_cluster.x").info("once")
    assert stream.getvalue().count("once") == 1


def test_other_loggers_and_the_root_logger_stay_as_they_are() -> None:
    root_handlers = logging.getLogger().handlers[:]
    setup_logging("DEBUG", stream=io.StringIO())
    assert logging.getLogger().handlers == root_handlers
    with pytest.raises(ValueError, match="NOISY"):
        setup_logging("NOISY")
