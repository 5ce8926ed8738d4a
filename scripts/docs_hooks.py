"""The site's pages that are not in docs/: README, CONTRIBUTING and Kubernetes' README, and links out of docs/.

Files elsewhere in the checkout are named on the site, not linked: there is no public place to link to.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "kubernetes.md": "kubernetes/README.md",
}
"""Of the site, and where they are in the checkout."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs: adds the pages."""
    from mkdocs.structure.files import File

    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by MkDocs: links that lead out of docs/."""
    name = page.file.src_uri
    here = posixpath.dirname(PAGES.get(name, f"docs/{name}"))
    return _LINK.sub(lambda match: _on_site(match, here, posixpath.dirname(name)), markdown)


def _on_site(match: re.Match[str], here: str, page_dir: str) -> str:
    bang, text, target = match.groups()
    path, hash_sign, anchor = target.partition("#")
    if "://" in target or not path:
        return match.group(0)
    in_checkout = posixpath.normpath(posixpath.join(here, path))
    on_site = next((page for page, source in PAGES.items() if source == in_checkout), None)
    if on_site is None and in_checkout.startswith("docs/") and (ROOT / in_checkout).suffix:
        on_site = in_checkout.removeprefix("docs/")
    if on_site is None:
        return f"{text} (`{in_checkout}`)" if f"`{in_checkout}`" != text else text
    return f"{bang}[{text}]({posixpath.relpath(on_site, page_dir or '.')}{hash_sign}{anchor})"
