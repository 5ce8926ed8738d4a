"""Errors that the page quotes are errors of ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A literal that goes on in the next line is one text.
SOURCES = re.sub(r'"\s*\n?\s*f?"', "", "\n".join(path.read_text() for path in (ROOT / "atom_cluster").rglob("*.py")))


def quoted() -> list[str]:
    """In the first columns, between backticks: what a sentence of ours contains."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    texts = [text for row in rows for text in re.findall(r"`(.+?)`(?: \.\.\. |$|,|\s)", row)]
    return [text for text in texts if " " in text.strip()]


def test_there_are_many() -> None:
    assert len(quoted()) > 20


@pytest.mark.parametrize("text", quoted())
def test_it_is_in_the_sources(text: str) -> None:
    assert text in SOURCES
