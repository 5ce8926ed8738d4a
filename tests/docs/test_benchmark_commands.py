"""Commands that pages and configurations name can be given: the benchmark is there and takes these arguments."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", *(ROOT / "configs").glob("*.yaml")])


def commands_in(path: Path) -> list[str]:
    """Behind `python -m benchmarks.`, of blocks of code and of comments."""
    text = path.read_text().replace("\\\n", " ")
    return re.findall(r"^(?:#   )?python -m benchmarks\.(\S.*)$", text, flags=re.MULTILINE)


FOUND = sorted({line for path in PAGES for line in commands_in(path)})


def test_there_are_many() -> None:
    assert len(FOUND) > 8


@pytest.mark.parametrize("line", FOUND)
def test_it_can_be_given(line: str) -> None:
    name, *arguments = shlex.split(line)
    module = f"benchmarks.{name}"
    if name == "accuracy":
        module += ".__main__"
    assert importlib.util.find_spec(module) is not None
    # Ends the process, with what is wrong, for arguments that it does not take.
    importlib.import_module(module).parse_arguments(arguments)
