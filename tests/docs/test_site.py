"""Every page is in the site's navigation, and what it names is there. `make docs` builds it, and fails on a warning."""

from __future__ import annotations

from pathlib import Path

import yaml

from scripts import docs_hooks

ROOT = Path(__file__).parents[2]


def pages_in(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    assert isinstance(parts, (list, type({}.values())))
    return [page for part in parts for page in pages_in(part)]


def test_the_navigation_has_every_page_once() -> None:
    pages = pages_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    docs = ROOT / "docs"
    assert sorted(pages) == sorted([str(path.relative_to(docs)) for path in docs.rglob("*.md")] + [*docs_hooks.PAGES])


def test_pages_from_elsewhere_are_there() -> None:
    assert all((ROOT / source).is_file() for source in docs_hooks.PAGES.values())


def test_links_out_of_docs_become_names_and_those_between_pages_stay_links() -> None:
    def on_site(text: str, here: str, page_dir: str) -> str:
        return docs_hooks._LINK.sub(lambda match: docs_hooks._on_site(match, here, page_dir), text)

    assert on_site("[k](../kubernetes/README.md#secrets)", "docs", "") == "[k](kubernetes.md#secrets)"
    assert on_site("[a](docs/api.md)", "", "") == "[a](api.md)"
    assert on_site("[p](../performance.md#x)", "docs/decisions", "decisions") == "[p](../performance.md#x)"
    assert on_site("[code](../atom_cluster/units.py)", "docs", "") == "code (`atom_cluster/units.py`)"
    assert on_site("[out](https://example.org/a)", "docs", "") == "[out](https://example.org/a)"
    assert on_site("[here](#x)", "docs", "") == "[here](#x)"
