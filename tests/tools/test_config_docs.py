from __future__ import annotations

from pathlib import Path

import pytest

from atom_cluster.tools.config_docs import main, render


def test_the_page_in_the_repository_is_current(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(repo_root / "docs" / "configuration.md"), "--check"]) == 0, capsys.readouterr().err


def test_a_page_that_is_not_current_is_reported(tmp_path: Path) -> None:
    page = tmp_path / "configuration.md"
    assert main([str(page), "--check"]) == 1
    assert main([str(page)]) == 0
    assert main([str(page), "--check"]) == 0
    page.write_text(page.read_text() + "edited")
    assert main([str(page), "--check"]) == 1


def test_keys_have_type_range_default_and_meaning() -> None:
    page = render()
    assert (
        "| `block_size` | integer ≥ 1, ≤ 1024 | `16` | Tokens per KV block, of groups that do not have their own. |"
        in page
    )
    assert "| `num_blocks` | integer ≥ 2 or `auto` | `auto` |" in page
    assert "| `model` | text | required |" in page
    assert "### `prefill`, `decode`, `unified`" in page
