"""A new key is valid with the line that is printed with it."""

from __future__ import annotations

import pytest

from atom_cluster.api.protection.keys import parse_keys
from atom_cluster.tools.__main__ import main


def test_a_new_key_is_valid_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--role", "monitor", "--requests-per-minute", "60", "--most-urgent-priority", "-5"]
    assert main(["make-key", "chat", *arguments]) == 0
    first, _, line = capsys.readouterr().out.splitlines()
    entry = parse_keys(line, source="printed").find(first.rsplit(" ", 1)[1])
    assert entry is not None
    assert (entry.name, entry.role, entry.requests_per_minute, entry.tokens_per_minute) == ("chat", "monitor", 60, None)
    assert entry.most_urgent_priority == -5


def test_a_name_that_cannot_be_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-key", "two words"]) == 1
    assert "name: String should match" in capsys.readouterr().err
    assert main(["make-key", "chat", "--most-urgent-priority", "-101"]) == 1
    assert "most_urgent_priority: Input should be greater than or equal to -100" in capsys.readouterr().err


def test_a_limit_is_above_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["make-key", "chat", "--tokens-per-minute", "0"])
    assert "--tokens-per-minute" in capsys.readouterr().err
